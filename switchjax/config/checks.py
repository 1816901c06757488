"""Errors that a user can correct, and the checks that raise them."""

import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal


class UserError(ValueError):
    """An error that the user can correct; scripts print it as one line and exit with status 2."""


def require(condition: bool, message: str) -> None:
    """Raises a `UserError` with this message unless the condition holds."""
    if not condition:
        raise UserError(message)


def suggest(name: str, candidates: Iterable[str]) -> str:
    """` (did you mean 'x'?)` with the candidate closest to `name`, or the list of all candidates."""
    known = [candidate for candidate in candidates if candidate]
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else f" (known: {', '.join(known)})"


def check_choice(key: str, value: str, choices: Iterable[str]) -> None:
    """Raises a `UserError` naming `key` unless `value` is one of `choices`."""
    known = list(choices)
    require(value in known, f"{key}: unknown value '{value}'{suggest(value, known)}")


def check_choices(section: str, config: Any) -> None:
    """Raises a `UserError` unless every field that is annotated as a `Literal` holds one of its values."""
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is Literal:
            check_choice(f"{section}.{name}", getattr(config, name), typing.get_args(hint))


def check_positive(section: str, values: Mapping[str, int | float]) -> None:
    """Raises a `UserError` that names the first of these keys whose value is not positive."""
    for name, value in values.items():
        require(value > 0, f"{section}.{name} must be positive, got {value}")


def check_not_negative(section: str, values: Mapping[str, int | float]) -> None:
    """Raises a `UserError` that names the first of these keys whose value is negative."""
    for name, value in values.items():
        require(value >= 0, f"{section}.{name} must not be negative, got {value}")


def check_fraction(section: str, values: Mapping[str, int | float]) -> None:
    """Raises a `UserError` that names the first of these keys whose value is not in [0, 1)."""
    for name, value in values.items():
        require(0 <= value < 1, f"{section}.{name} must be in [0, 1), got {value}")


def check_seed(key: str, value: int) -> None:
    """Raises a `UserError` naming `key` unless `value` has 32 bits: JAX cuts or refuses larger seeds."""
    require(0 <= value < 2**32, f"{key} must be in [0, 2**32), got {value}")
