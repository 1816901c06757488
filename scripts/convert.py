"""Exchanges weights with Hugging Face (T5, Switch Transformers, Mixtral, ViT); upcycles and prunes models.

python scripts/convert.py from-hf models/switch-base-8 runs/switch_base_8 [--config.mesh.expert=8 ...]
python scripts/convert.py to-hf runs/quickstart/switch models/quickstart [--step=700]
python scripts/convert.py check models/switch-base-8
python scripts/convert.py upcycle runs/quickstart/dense runs/upcycled --config.model.pattern="('dense', 'moe')"
python scripts/convert.py prune runs/quickstart/switch runs/pruned --experts=4

A Hugging Face model is a folder with config.json and safetensors files. evaluate.py and generate.py read the workdirs
that this script writes; train.py starts from them in another workdir, with --config.init_from.workdir. check compares
our logits with transformers' and needs transformers and torch.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

from switchjax import command
from switchjax.config import UserError, load_workdir_config


def main(arguments: Sequence[str]) -> None:
    parser = command.make_parser(__doc__)
    tasks = parser.add_subparsers(required=True, metavar="TASK")

    def add(name: str, task: Callable[[Namespace], None], summary: str, target: bool = True) -> ArgumentParser:
        added = tasks.add_parser(name, help=summary)
        added.add_argument("source", type=Path, help="the folder to read")
        if target:
            added.add_argument("target", type=Path, help="the folder to write; must be new or empty")
        added.set_defaults(task=task)
        return added

    from_hf = add("from-hf", _from_hf, "converts a Hugging Face folder to a workdir")
    to_hf = add("to-hf", _to_hf, "converts a workdir to a Hugging Face folder")
    to_hf.add_argument("--step", type=int, default=-1, help="checkpoint; -1 (default): the latest")
    add("check", _check, "compares our logits with transformers'", target=False)
    upcycled = add("upcycle", _upcycle, "makes a model whose experts are copies of a dense run's feed-forward networks")
    noise = "standard deviation of noise on the experts, relative to that of their weights"
    upcycled.add_argument("--noise", type=float, default=0.0, help=noise)
    pruned = add("prune", _prune, "keeps only the experts that a run uses most on held-out data")
    pruned.add_argument("--experts", type=int, required=True, help="number of experts to keep in each layer")
    for overridable in (from_hf, upcycled):
        overridable.add_argument("--config.SECTION.KEY", metavar="VALUE", help="overrides a value of the config")
    flags, rest = parser.parse_known_args(arguments)
    if rest and flags.task not in (_from_hf, _upcycle):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    flags.overrides = rest
    flags.task(flags)


def _from_hf(flags: Namespace) -> None:
    from switchjax.interop.convert import config_of, from_huggingface
    from switchjax.parallel.mesh import emulate_devices

    config = command.override(config_of(flags.source), flags.overrides)
    emulate_devices(config.mesh)
    print(config.to_json(), flush=True)
    print(f"{from_huggingface(flags.source, flags.target, config):,} parameters in {flags.target}")


def _to_hf(flags: Namespace) -> None:
    config = load_workdir_config(flags.source)

    from switchjax.interop.convert import to_huggingface
    from switchjax.parallel.mesh import emulate_devices

    emulate_devices(config.mesh)
    print(f"checkpoint of step {to_huggingface(flags.source, flags.target, flags.step)} in {flags.target}")


def _upcycle(flags: Namespace) -> None:
    config = command.override(load_workdir_config(flags.source), flags.overrides)

    from switchjax.interop.workdirs import upcycle_workdir
    from switchjax.parallel.mesh import emulate_devices

    emulate_devices(config.mesh)
    upcycle_workdir(flags.source, flags.target, config, flags.noise)
    print(f"{config.moe.num_experts} experts per layer in {flags.target}")


def _prune(flags: Namespace) -> None:
    config = load_workdir_config(flags.source)

    from switchjax.interop.workdirs import prune_workdir
    from switchjax.parallel.mesh import emulate_devices

    emulate_devices(config.mesh)
    prune_workdir(flags.source, flags.target, flags.experts)
    print(f"{flags.experts} of {config.moe.num_experts} experts per layer in {flags.target}")


def _check(flags: Namespace) -> None:
    from switchjax.interop.check import compare

    found = compare(flags.source)
    print("\n".join(map(str, found)))
    if not all(comparison.equal for comparison in found):
        raise UserError("our logits differ from transformers'")


if __name__ == "__main__":
    command.run(main)
