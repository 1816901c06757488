"""Fills in the masked spans of passages, greedily.

python scripts/generate.py --workdir=runs/quickstart/switch --prompt="In the <extra_id_0> God created the <extra_id_1>."
"""

from collections.abc import Sequence
from pathlib import Path

from switchjax import command
from switchjax.config import MeshConfig, load_workdir_config


def main(arguments: Sequence[str]) -> None:
    parser = command.make_parser(__doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="a run's workdir")
    parser.add_argument(
        "--prompt",
        action="append",
        required=True,
        help="a passage with <extra_id_0>, <extra_id_1>, ...; may be repeated",
    )
    parser.add_argument("--step", type=int, default=-1, help="checkpoint; -1 (default): the latest")
    flags = parser.parse_args(arguments)
    config = load_workdir_config(flags.workdir)

    import jax

    from switchjax.inference.decoding import fill_in
    from switchjax.inference.evaluation import load_model
    from switchjax.parallel.mesh import make_mesh
    from switchjax.training.workdir import load_vocabulary

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        _, model = load_model(config, flags.workdir, mesh, flags.step)
        for passage in fill_in(model, load_vocabulary(flags.workdir, config), config, flags.prompt):
            print(passage)


if __name__ == "__main__":
    command.run(main)
