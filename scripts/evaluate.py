"""Evaluates a checkpoint on held-out data: negative log perplexity (nats per token) for each corpus and overall.

python scripts/evaluate.py --workdir=runs/quickstart/switch [--split=test] [--batches=0] [--step=500]
"""

import dataclasses
import math
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from switchjax import command, process_settings
from switchjax.config import Config, load_workdir_config


def main(arguments: Sequence[str]) -> None:
    parser = command.make_parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="a run's workdir")
    parser.add_argument("--step", type=int, default=-1, help="step of the checkpoint; -1 (default): the latest")
    parser.add_argument("--split", help="train, validation or test; default: the run's own")
    parser.add_argument("--batches", type=int, help="batches per corpus, 0 for all; default: the run's own")
    axes = ("DATA", "EXPERT", "MODEL")
    parser.add_argument(
        "--mesh", nargs=3, type=int, metavar=axes, help="sizes of the mesh axes; default: the run's own"
    )
    command.add_process_flags(parser)
    flags = parser.parse_args(arguments)
    config = load_workdir_config(flags.workdir)
    given = {"split": flags.split, "batches": flags.batches}
    changes = {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, **changes))
    if flags.mesh:
        sizes = dict(zip(("data", "expert", "model"), flags.mesh, strict=True))
        if config.mesh.emulated_devices and flags.mesh[0] > 0:
            sizes["emulated_devices"] = math.prod(flags.mesh)
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes))

    process_settings.keep_freed_memory()

    from switchjax.parallel.joining import joined_processes

    timeout = config.train.heartbeat_timeout
    with joined_processes(flags.coordinator, flags.process_count, flags.process_index, timeout):
        _evaluate(config, flags)


def _evaluate(config: Config, flags: Namespace) -> None:
    from switchjax.parallel.mesh import emulate_devices, make_mesh
    from switchjax.parallel.processes import process_index
    from switchjax.training.evaluation import evaluate_workdir

    emulate_devices(config.mesh)
    step, results = evaluate_workdir(config, flags.workdir, make_mesh(config.mesh), flags.step)
    if process_index():
        return
    print(f"checkpoint of step {step}, {config.evaluate.split} split")
    for name, value in results.items():
        print(f"{name:48} {value:12.4f}")


if __name__ == "__main__":
    command.run(main)
