"""The format number of what a run writes, and how configs of older formats are read."""

from collections.abc import Callable, Mapping
from typing import Any

from switchjax.config.checks import UserError

FORMAT = 1
"""The format of config.json and checkpoints that this version writes. Files without a number are of format 0."""

Values = dict[str, Any]


def _from_0(values: Values) -> Values:
    """Format 1 names the arrays of checkpoints by layer; its sections are those of format 0."""
    return values


MIGRATIONS: dict[int, Callable[[Values], Values]] = {0: _from_0}
"""Older format -> what makes sections of the next format of its sections."""


def format_of(saved: Mapping[str, Any]) -> int:
    """The format number of a saved config.

    Raises:
        UserError: if this version cannot read it.
    """
    number = saved.get("format", 0)
    if type(number) is not int or not 0 <= number <= FORMAT:
        raise UserError(f"format {number!r} is not known here, only 0 to {FORMAT}: use the switchjax that wrote it")
    return number


def migrate(saved: Mapping[str, Any]) -> Values:
    """The sections of a saved config as this version has them.

    Raises:
        UserError: as `format_of`.
    """
    values = {key: value for key, value in saved.items() if key != "format"}
    for number in range(format_of(saved), FORMAT):
        values = MIGRATIONS[number](values)
    return values
