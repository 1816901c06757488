"""Pre-trains a model; resumes by itself from the last checkpoint of the workdir.

python scripts/train.py --config=configs/switch.py:base-8 --workdir=runs/base_8 [--config.train.steps=500 ...]

--config.train.trace_steps=5 writes a profiler's trace of steps 10 to 14. What XLA compiles is kept in the user's cache
folder: JAX_COMPILATION_CACHE_DIR=DIR keeps it elsewhere, JAX_ENABLE_COMPILATION_CACHE=false does not keep it.
"""

from collections.abc import Sequence
from pathlib import Path

from switchjax import command


def main(arguments: Sequence[str]) -> None:
    parser = command.make_parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="where config, checkpoints and metrics go")
    flags, config = command.parse_with_config(parser, arguments)

    from switchjax.analysis.utilization import step_cost
    from switchjax.inference.evaluation import perplexity_evaluator
    from switchjax.parallel.mesh import emulate_devices
    from switchjax.training.loop import train

    emulate_devices(config.mesh)
    print(config.to_json(), flush=True)
    summary = train(config, flags.workdir, perplexity_evaluator, step_cost)
    if summary.get("interrupted"):
        print(f"stopped at step {summary['steps']} of {config.train.steps}; the same command resumes")
    else:
        print(f"done: {summary['steps']} steps; held-out {summary['evaluation']}")


if __name__ == "__main__":
    command.run(main)
