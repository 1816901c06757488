"""Exchanges weights with Hugging Face: T5, Switch Transformers, Mixtral, ViT, as safetensors in a local folder.

python scripts/convert.py from-hf models/switch-base-8 runs/switch_base_8 [--config.mesh.expert=8 ...]
python scripts/convert.py to-hf runs/quickstart/switch models/quickstart [--step=700]
python scripts/convert.py check models/switch-base-8

from-hf writes a workdir that evaluate.py and generate.py read; train.py starts from it in another workdir, with
--config.init_from.workdir. check compares logits with transformers' own, and needs it and torch.
"""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from switchjax import command
from switchjax.config import UserError, load_workdir_config


def main(arguments: Sequence[str]) -> None:
    parser = command.make_parser(__doc__)
    tasks = parser.add_subparsers(required=True, metavar="TASK")
    from_hf = tasks.add_parser("from-hf", help="a folder of Hugging Face's -> a workdir")
    from_hf.add_argument("source", type=Path, help="with config.json and model.safetensors")
    from_hf.add_argument("target", type=Path, help="the new workdir")
    from_hf.add_argument("--config.SECTION.KEY", metavar="VALUE", help="overrides a value, such as mesh or data")
    from_hf.set_defaults(task=_from_hf)
    to_hf = tasks.add_parser("to-hf", help="a workdir -> a folder of Hugging Face's")
    to_hf.add_argument("source", type=Path, help="a run's workdir")
    to_hf.add_argument("target", type=Path, help="the new folder")
    to_hf.add_argument("--step", type=int, default=-1, help="checkpoint; -1 (default): the latest")
    to_hf.set_defaults(task=_to_hf)
    check = tasks.add_parser("check", help="compares logits with transformers' own")
    check.add_argument("source", type=Path, help="with config.json and model.safetensors")
    check.set_defaults(task=_check)
    flags, rest = parser.parse_known_args(arguments)
    if rest and flags.task is not _from_hf:
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


def _check(flags: Namespace) -> None:
    from switchjax.interop.check import compare

    found = compare(flags.source)
    print("\n".join(map(str, found)))
    if not all(comparison.equal for comparison in found):
        raise UserError("the logits are not equal")


if __name__ == "__main__":
    command.run(main)
