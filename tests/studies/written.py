"""Helpers that check the tables and JSON of a study's rows, and run studies on other configs."""

import dataclasses
import json
from argparse import ArgumentParser
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from switchjax.config import Config
from switchjax.studies.report import to_json, to_markdown

ROOT = Path(__file__).parents[2]


def check_written(rows: Iterable[Any], document: str) -> list[list[str]]:
    """Returns the lines of each table below its head, and checks that `document` has a table with this head."""
    rows = list(rows)
    text, below = (ROOT / document).read_text(), []
    for table in to_markdown(rows).split("\n\n"):
        head, alignments, *lines = table.splitlines()
        assert f"{head}\n{alignments}\n" in text, f"{document} has no table\n{head}\n{alignments}"
        assert {line.count(" |") for line in lines} == {alignments.count("|") - 1}
        below.append(lines)
    written = json.loads(json.dumps(to_json(rows)))
    fields = [{field.name for field in dataclasses.fields(row)} for row in rows]
    assert [set(row) for table in written for row in table] == fields
    return below


def measure(study: ModuleType, arguments: list[str], configs: dict[str, Config]) -> list[Any]:
    """The rows of a study called with these flags; it loads the config whose key ends the name it asks for."""
    parser = ArgumentParser()
    study.add_flags(parser)

    def load(name: str, overrides: object = ()) -> Config:
        return next(config for end, config in configs.items() if name.endswith(end))

    return list(study.measure(parser.parse_args(arguments), load))
