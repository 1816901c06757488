"""Pre-trains a model; resumes by itself from the last checkpoint of the workdir.

python scripts/train.py --config=configs/switch.py:quickstart --workdir=runs/switch [--config.train.steps=500 ...]
"""

from pathlib import Path

from absl import flags
from ml_collections import config_flags

from switchjax import command
from switchjax.config import Config

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/, with its argument: FILE.py[:arg].")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where config, checkpoints and metrics go.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    config = Config.from_dict(_CONFIG.value)

    from switchjax.inference.evaluation import perplexity_evaluator
    from switchjax.parallel.mesh import emulate_devices
    from switchjax.training.loop import train

    emulate_devices(config.mesh)
    print(config.to_json())
    summary = train(config, Path(_WORKDIR.value), perplexity_evaluator)
    print(f"stopped at step {summary['steps']}" if summary.get("interrupted") else f"done: {summary}")


if __name__ == "__main__":
    command.run(main)
