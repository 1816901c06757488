"""Errors that a user can put right, and the checks that raise them."""

import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal


class UserError(ValueError):
    """Something the user can put right; scripts print it as one line and exit with 2."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def suggest(name: str, candidates: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the candidate closest to `name`, or the list of them all."""
    known = [candidate for candidate in candidates if candidate]
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else f" (known: {', '.join(known)})"


def check_choice(key: str, value: str, choices: Iterable[str]) -> None:
    """Raises a `UserError` naming `key` unless `value` is one of `choices`."""
    known = list(choices)
    require(value in known, f"{key}: unknown value '{value}'{suggest(value, known)}")


def check_choices(section: str, config: Any) -> None:
    """Raises a `UserError` unless every field annotated as a `Literal` holds one of its values.

    Args:
        section: the name of the dataclass in messages.
        config: an instance of it.
    """
    for name, hint in typing.get_type_hints(type(config)).items():
        if typing.get_origin(hint) is Literal:
            check_choice(f"{section}.{name}", getattr(config, name), typing.get_args(hint))


def check_positive(section: str, values: Mapping[str, int | float]) -> None:
    for name, value in values.items():
        require(value > 0, f"{section}.{name} must be positive, got {value}")


def check_fraction(section: str, values: Mapping[str, int | float]) -> None:
    for name, value in values.items():
        require(0 <= value < 1, f"{section}.{name} must be in [0, 1), got {value}")


def check_seed(key: str, value: int) -> None:
    """Raises a `UserError` naming `key` unless `value` is a seed: of others, JAX takes the last 32 bits or none."""
    require(0 <= value < 2**32, f"{key} must be in [0, 2**32), got {value}")
