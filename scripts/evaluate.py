"""Evaluates a checkpoint on held-out text: negative log perplexity (nats a token), of each corpus and of all.

python scripts/evaluate.py --workdir=runs/quickstart/switch [--split=test] [--batches=0] [--step=500]
"""

import dataclasses
from pathlib import Path

from absl import flags

from switchjax import command
from switchjax.config import load_workdir_config

_WORKDIR = flags.DEFINE_string("workdir", None, "A run's workdir.", required=True)
_STEP = flags.DEFINE_integer("step", -1, "Checkpoint; -1 is the latest.")
_SPLIT = flags.DEFINE_string("split", None, "train, validation or test; default: the run's own.")
_BATCHES = flags.DEFINE_integer("batches", None, "Batches a corpus, 0 for all; default: the run's own.")


def main() -> None:
    config = load_workdir_config(_WORKDIR.value)
    given = {"split": _SPLIT.value, "batches": _BATCHES.value}
    evaluate = dataclasses.replace(
        config.evaluate, **{name: value for name, value in given.items() if value is not None}
    )
    config = dataclasses.replace(config, evaluate=evaluate)

    from switchjax.inference.evaluation import evaluate_workdir
    from switchjax.parallel.mesh import emulate_devices, make_mesh

    emulate_devices(config.mesh)
    step, results = evaluate_workdir(config, Path(_WORKDIR.value), make_mesh(config.mesh), _STEP.value)
    print(f"checkpoint of step {step}, {evaluate.split} split")
    for name, value in results.items():
        print(f"{name:48} {value:12.4f}")


if __name__ == "__main__":
    command.run(main)
