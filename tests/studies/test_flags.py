"""The command lines of all studies."""

import importlib.util
from importlib import import_module

import pytest

from switchjax import command
from switchjax.config import UserError
from switchjax.studies.flags import add_repeats
from tests.studies.written import ROOT

SPEC = importlib.util.spec_from_file_location("benchmark", ROOT / "scripts" / "benchmark.py")
assert SPEC is not None
assert SPEC.loader is not None
BENCHMARK = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(BENCHMARK)


@pytest.mark.parametrize("name", BENCHMARK.STUDIES)
def test_every_study_can_be_called_without_flags(name: str) -> None:
    study = import_module(f"switchjax.studies.{BENCHMARK.STUDIES[name]}")
    parser = command.make_parser(study.__doc__)
    study.add_flags(parser)
    assert callable(study.measure)
    assert all(action.help for action in parser._actions)
    assert not {"write", "json", "study"} & set(vars(parser.parse_args([])))
    assert f"python scripts/benchmark.py {name} " in BENCHMARK.__doc__


def test_counts_must_be_positive() -> None:
    parser = command.make_parser(None)
    add_repeats(parser, 3)
    assert parser.parse_args([]).repeats == 3
    with pytest.raises(UserError, match="argument --repeats: must be positive, got 0"):
        parser.parse_args(["--repeats=0"])
