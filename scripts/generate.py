"""Fills in the masked spans of passages, greedily.

python scripts/generate.py --workdir=runs/quickstart/switch --prompt="In the <extra_id_0> God created the <extra_id_1>."
"""

from pathlib import Path

from absl import flags

from switchjax import command
from switchjax.config import MeshConfig, load_workdir_config

_WORKDIR = flags.DEFINE_string("workdir", None, "A run's workdir.", required=True)
_PROMPT = flags.DEFINE_multi_string(
    "prompt", None, "A passage with <extra_id_0>, <extra_id_1>, ...; may be repeated.", required=True
)
_STEP = flags.DEFINE_integer("step", -1, "Checkpoint; -1 is the latest.")


def main() -> None:
    config = load_workdir_config(_WORKDIR.value)

    import jax

    from switchjax.data.pipeline import TextData
    from switchjax.inference.decoding import fill_in
    from switchjax.inference.evaluation import load_model
    from switchjax.parallel.mesh import make_mesh

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        _, model = load_model(config, Path(_WORKDIR.value), mesh, _STEP.value)
        vocabulary = TextData.prepare(config.data).vocabulary
        for passage in fill_in(model, vocabulary, config, _PROMPT.value):
            print(passage)


if __name__ == "__main__":
    command.run(main)
