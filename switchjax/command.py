"""What the scripts share: flags, log lines, and errors in one line."""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from absl import app, flags

from switchjax.config import UserError


def run(main: Callable[[], None]) -> None:
    """Parses the flags and runs `main`; bad input ends with one line on stderr and exit code 2."""
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse_flags)


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(list(argv))
    except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        _fail(str(error.args[0]) if error.args else str(error))


def _guarded(main: Callable[[], None], argv: Sequence[str]) -> None:
    if len(argv) > 1:
        _fail(f"unexpected argument {argv[1]}")
    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)
    logging.getLogger("switchjax").setLevel(logging.INFO)  # other libraries' start-up is not the user's concern
    try:
        main()
    except UserError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _fail(message: str) -> NoReturn:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    print(f"error: {' '.join(lines)}", file=sys.stderr)
    sys.exit(2)
