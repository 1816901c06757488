"""Flags that several studies share.

A study is a module with two functions: `add_flags(parser)` adds its flags, `measure(flags, load)` yields its rows.
"""

from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable

from switchjax.config import Config

LoadConfig = Callable[..., Config]
"""`command.load_config`: loads the config of `FILE.py[:arg]`, with `--config.section.key=value` overrides."""


def positive(text: str) -> int:
    """The `type` of a flag that takes a positive integer."""
    if int(text) < 1:
        raise ArgumentTypeError(f"must be positive, got {text}")
    return int(text)


def add_repeats(parser: ArgumentParser, default: int) -> None:
    """Adds `--repeats`."""
    parser.add_argument("--repeats", type=positive, default=default, help=f"runs of each program ({default})")
