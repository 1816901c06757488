"""Pre-trains a model; resumes by itself from the last checkpoint of the workdir.

python scripts/train.py --config=configs/switch.py:base-8 --workdir=runs/base_8 [--config.train.steps=500 ...]

In several processes, on one host or many: see docs/processes.md.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from switchjax import command
from switchjax.config import Config


def main(arguments: Sequence[str]) -> None:
    parser = command.make_parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="where config, checkpoints and metrics go")
    command.add_process_flags(parser)
    flags, config = command.parse_with_config(parser, arguments)

    from switchjax.parallel.processes import joined_processes

    timeout = config.train.heartbeat_timeout
    with joined_processes(flags.coordinator, flags.process_count, flags.process_index, timeout):
        _train(config, flags)


def _train(config: Config, flags: Namespace) -> None:
    from switchjax.inference.evaluation import perplexity_evaluator
    from switchjax.parallel.mesh import emulate_devices
    from switchjax.parallel.processes import process_index
    from switchjax.training.loop import train

    emulate_devices(config.mesh)
    if process_index() == 0:
        print(config.to_json(), flush=True)
    summary = train(config, flags.workdir, perplexity_evaluator)
    if process_index():
        return
    if summary.get("interrupted"):
        print(f"stopped at step {summary['steps']} of {config.train.steps}; the same command resumes")
    else:
        print(f"done: {summary['steps']} steps; held-out {summary['evaluation']}")


if __name__ == "__main__":
    command.run(main)
