"""Prints a run beside its baseline: parameters, speed, held-out loss, and when the first passed the second.

python scripts/compare.py --workdir=runs/quickstart/switch --baseline=runs/quickstart/dense
"""

from pathlib import Path

from absl import flags

from switchjax import command

_WORKDIR = flags.DEFINE_string("workdir", None, "A complete run.", required=True)
_BASELINE = flags.DEFINE_string("baseline", None, "The complete run that it is measured against.", required=True)


def main() -> None:
    from switchjax.analysis.comparison import compare

    print(compare(Path(_WORKDIR.value), Path(_BASELINE.value)))


if __name__ == "__main__":
    command.run(main)
