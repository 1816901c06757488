"""Compares a run with its baseline: parameters, speed, held-out loss, and the step at which the run overtakes it.

python scripts/compare.py --workdir=runs/quickstart/switch --baseline=runs/quickstart/dense
"""

from collections.abc import Sequence
from pathlib import Path

from switchjax import command


def main(arguments: Sequence[str]) -> None:
    parser = command.make_parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="workdir of a complete run")
    parser.add_argument("--baseline", type=Path, required=True, help="workdir of the complete baseline run")
    flags = parser.parse_args(arguments)

    from switchjax.studies.run_comparison import compare_runs

    print(compare_runs(flags.workdir, flags.baseline))


if __name__ == "__main__":
    command.run(main)
