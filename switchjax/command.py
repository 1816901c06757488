"""Shared parts of the scripts: the config of the command line, log lines, and errors in one line."""

import ast
import errno
import sys
import textwrap
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from absl import flags
from ml_collections import ConfigDict, config_flags

from switchjax import process_settings
from switchjax.config import OPEN_KEYS, Config, UserError, check_key, suggest

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs `main` on the command line's arguments; bad input ends with one line on stderr and exit code 2."""
    process_settings.log_to_stderr()
    process_settings.hide_repeated_checkpoint_errors()
    process_settings.stand_in_for_tpu_metadata()
    process_settings.keep_compiled_programs()
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


class _Parser(ArgumentParser):
    """A parser that raises errors as `UserError`; argparse would also print the usage, over several lines."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def make_parser(description: str | None) -> ArgumentParser:
    """A parser whose `--help` shows a script's docstring unchanged; bad arguments raise `UserError`."""
    return _Parser(description=description, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)


def add_process_flags(parser: ArgumentParser) -> None:
    """Adds the flags by which processes find each other if JAX does not detect them; see `parallel.joining`."""
    help = "address of process 0 of several; JAX detects TPU pods, SLURM, Open MPI and Kubernetes jobs without it"
    parser.add_argument("--coordinator", metavar="HOST:PORT", help=help)
    count = "number of processes; 1 forces a single process even inside a cluster"
    parser.add_argument("--process_count", type=int, metavar="N", help=count)
    parser.add_argument("--process_index", type=int, metavar="I", help="number of this process, from 0")


def parse_with_config(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[Namespace, Config]:
    """The parser's own flags, and the config of `--config=FILE[:arg]` with overrides `--config.section.key=value`.

    Raises:
        UserError: for a file that cannot be read or run, an unknown key or a value that does not fit.
    """
    source = "a file of configs/ with its argument, or the config.json of a run to repeat in another workdir"
    parser.add_argument("--config", metavar="FILE[:ARG]", required=True, help=source)
    parser.add_argument("--config.SECTION.KEY", metavar="VALUE", help="overrides a value of the config")
    if not {"-h", "--help"}.isdisjoint(arguments):
        parser.epilog = _summarize_configs(Path(sys.argv[0]).resolve().parents[1] / "configs")
    known, others = parser.parse_known_args(arguments)
    return known, load_config(known.config, others)


def _summarize_configs(folder: Path) -> str:
    """The config files with the first line of their docstrings and their sizes, read without running them."""
    lines = ["configs and their sizes:"]
    for path in sorted(folder.glob("*.py")):
        try:
            description = ast.get_docstring(ast.parse(path.read_text())) or "(no description)"
        except (OSError, SyntaxError, ValueError) as error:  # perhaps another file that is just being written
            description = f"(cannot be read: {type(error).__name__})"
        paragraphs = description.split("\n\n")
        sizes = [" ".join(text.split()) for text in paragraphs if text.startswith("Sizes:")]
        lines += [f"  {path.parent.name}/{path.name}: {paragraphs[0].splitlines()[0]}"]
        lines += textwrap.wrap("".join(sizes), 116, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """The config of `FILE.py[:arg]` or of a run's `config.json`, with overrides `--config.section.key=value`.

    Raises:
        UserError: if `parse_with_config` does.
    """
    if name.endswith(".json"):
        return override(_load_json(Path(name)), overrides)
    path = Path(name.partition(":")[0])
    if not path.is_file():
        raise UserError(f"no config file {path}{suggest(str(path), map(str, path.parent.glob('*.py')))}")
    values = flags.FlagValues()
    ordinary, opened = _divide(overrides)
    arguments = ["", f"--config={name}", *ordinary]
    config = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)  # not sys.argv
    try:
        _parse(values, arguments)
    except UserError:
        raise
    except Exception as error:  # a config file is code and may raise anything
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    return _with_open_keys(config.value, opened)


def _load_json(path: Path) -> Config:
    try:
        return Config.from_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def override(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with overrides `--config.section.key=value`.

    Raises:
        UserError: for an unknown key or a value that does not fit.
    """
    values = flags.FlagValues()
    ordinary, opened = _divide(overrides)
    arguments = ["", *ordinary]
    changed = config_flags.DEFINE_config_dict("config", config.to_config_dict(), flag_values=values, sys_argv=arguments)
    _parse(values, arguments)
    return _with_open_keys(changed.value, opened)


def _divide(overrides: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The overrides that ml_collections applies, and those of a router's own keys, which config files may omit."""
    ordinary: list[str] = []
    opened: dict[str, str] = {}
    for argument in overrides:
        key, _, value = argument.removeprefix("--config.").partition("=")
        if argument.startswith("--config."):
            check_key(key)
        if argument.startswith("--config.") and key.startswith(OPEN_KEYS):
            opened[key] = value
        else:
            ordinary.append(argument)
    return ordinary, opened


def _with_open_keys(config: ConfigDict, opened: Mapping[str, str]) -> Config:
    """The config with values at `moe.options.NAME` and `moe.loss_weights.NAME`, parsed as Python if possible."""
    values = config.to_dict()
    for key, text in opened.items():
        section, group, name = key.split(".", 2)
        try:
            value = ast.literal_eval(text)
        except (SyntaxError, ValueError):  # a plain word
            value = text
        values.setdefault(section, {}).setdefault(group, {})[name] = value
    return Config.from_dict(values)


def _parse(values: flags.FlagValues, arguments: Sequence[str]) -> None:
    try:
        rest = values(arguments)
    except (flags.Error, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(_one_line(error)) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]}")


def _one_line(error: Exception) -> str:
    """The message on one line; only the last line if ml_collections has put a config file's traceback into it."""
    lines = [line.strip() for line in str(error.args[0] if error.args else error).splitlines() if line.strip()]
    return (
        lines[-1].rpartition("UserError: ")[2]
        if any(line.startswith("Traceback") for line in lines)
        else " ".join(lines)
    )
