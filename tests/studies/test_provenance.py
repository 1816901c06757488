"""The provenance below a table."""

from argparse import ArgumentParser
from datetime import date
from importlib.metadata import version
from pathlib import Path

import pytest

from switchjax.studies import decode_benchmark, layout_study, router_study
from switchjax.studies.provenance import command_line, find_provenance


def test_figures_say_where_they_come_from() -> None:
    found = find_provenance("make table")
    assert date.fromisoformat(found.date) <= date.today()
    assert f"jax {version('jax')}," in found.versions
    assert "load" in found.machine
    assert all(value in str(found) for value in vars(found).values())


@pytest.mark.parametrize(
    ("study", "arguments", "words"),
    [
        (decode_benchmark, [], ""),
        (decode_benchmark, ["--new_tokens=8", "--workdir=run", "--repeats=3"], " --workdir run --new_tokens 8"),
        (decode_benchmark, ["--huggingface", "a", "b"], " --huggingface a b"),
        (router_study, ["--workdir=elsewhere"], ""),
        (layout_study, ["--picture=p.svg"], ""),
    ],
)
def test_a_command_names_the_flags_that_may_change_its_figures(study: object, arguments: list[str], words: str) -> None:
    parser = ArgumentParser()
    study.add_flags(parser)
    flags = parser.parse_args(arguments)
    flags.write = Path("doc.md")
    assert command_line("study", flags, parser) == f"study{words}"
