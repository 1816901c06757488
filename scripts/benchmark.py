"""Measures what the README and the docs claim about speed and routing; each table is one command.

python scripts/benchmark.py layer      # the MoE layer beside the dense network of the same FLOPs
python scripts/benchmark.py routers    # every router on the quickstart's model and text, for docs/routers.md
python scripts/benchmark.py families   # a tiny model of each family beside its dense twin, for docs/families.md
python scripts/benchmark.py decode     # tokens a second with a cache of keys and values, and without
python scripts/benchmark.py faults     # runs that are killed, filled up and poisoned, for docs/faults.md
python scripts/benchmark.py plan       # the published models, compiled for the smallest slices that hold them

The last needs the TPU compiler, no TPU: pip install -c constraints.txt libtpu
"""

import os
import sys
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from switchjax import command
from switchjax.config import Config, UserError, load_workdir_config


def main(arguments: Sequence[str]) -> None:
    parser = command.make_parser(__doc__)
    tables = parser.add_subparsers(required=True, metavar="TABLE")
    layer = tables.add_parser("layer", help="time of an MoE layer, by experts, tokens and dispatch")
    layer.add_argument("--repeats", type=int, default=3, help="runs of each program (3: a quarter of an hour)")
    layer.add_argument("--write", type=Path, metavar="FILE", help="puts the table into this document")
    layer.set_defaults(table=_layer)
    routers = tables.add_parser("routers", help="loss, drops, load and speed of every router; resumes by itself")
    routers.add_argument("--config", default="configs/quickstart.py:study", help="what each of them changes")
    routers.add_argument("--workdir", type=Path, default=Path("runs/routers"), help="one run a router")
    routers.add_argument("--write", type=Path, metavar="FILE", help="puts the table into this document")
    routers.set_defaults(table=_routers)
    families = tables.add_parser("families", help="loss of each family beside its dense twin; resumes by itself")
    families.add_argument("--config", default="configs/families.py", help="file of the pairs")
    families.add_argument("--workdir", type=Path, default=Path("runs/families"), help="two runs a family")
    families.add_argument("--write", type=Path, metavar="FILE", help="puts the table into this document")
    families.set_defaults(table=_families)
    decode = tables.add_parser("decode", help="tokens a second with the cache and without")
    configs = ["configs/families.py:glam-dense", "configs/families.py:glam", "configs/quickstart.py:switch"]
    decode.add_argument("--config", nargs="+", default=configs, metavar="CONFIG", help="of fresh models")
    decode.add_argument("--workdir", type=Path, help="a run, whose latest checkpoint is taken in their place")
    folders = "models of Hugging Face's in their place, beside transformers' generate"
    decode.add_argument("--huggingface", nargs="+", type=Path, metavar="FOLDER", help=folders)
    decode.add_argument("--new_tokens", type=int, default=256, help="tokens that each row is continued by")
    decode.add_argument("--repeats", type=int, default=3, help="runs of each program")
    decode.add_argument("--write", type=Path, metavar="FILE", help="puts the table into this document")
    decode.set_defaults(table=_decode)
    faults = tables.add_parser("faults", help="what runs survive, fault by fault; resumes by itself")
    faults.add_argument("--config", default="configs/quickstart.py:faults", help="what is trained")
    faults.add_argument("--workdir", type=Path, default=Path("runs/faults"), help="one run a fault")
    faults.add_argument("--tries", type=int, default=20, metavar="N", help="no more than N of a fault (20: all)")
    faults.add_argument("--write", type=Path, metavar="FILE", help="puts the table into this document")
    faults.set_defaults(table=_faults)
    plan = tables.add_parser("plan", help="memory, collectives and compile time on TPU slices; resumes by itself")
    plan.add_argument("--configs", type=Path, default=Path("configs"), help="folder of their configs")
    plan.add_argument("--workdir", type=Path, default=Path("runs/plan"), help="one JSON file a plan")
    plan.add_argument("--write", type=Path, metavar="FILE", help="puts the table into this document")
    plan.set_defaults(table=_plan)
    flags = parser.parse_args(arguments)
    flags.table(flags)


def _layer(flags: Namespace) -> None:
    from switchjax.analysis.layer_benchmark import benchmark_layer

    _show(flags, "layer", benchmark_layer(flags.repeats, report=print))


def _routers(flags: Namespace) -> None:
    config = command.load_config(flags.config)

    from switchjax.analysis.router_study import study_routers
    from switchjax.parallel.mesh import emulate_devices

    emulate_devices(config.mesh)
    _show(flags, "routers", study_routers(config, flags.workdir, report=print))


def _families(flags: Namespace) -> None:
    def load(name: str) -> Config:
        return command.load_config(f"{flags.config}:{name}")

    load("runlocal")  # a missing file is refused before JAX is started

    from switchjax.analysis.family_study import study_families

    _show(flags, "families", study_families(load, flags.workdir, report=print))


def _decode(flags: Namespace) -> None:
    report = partial(print, flush=True)
    if flags.huggingface:
        from switchjax.interop.decode_benchmark import benchmark_beside_transformers

        table = benchmark_beside_transformers(flags.huggingface, flags.new_tokens, flags.repeats, report)
        return _show(flags, "decode --huggingface", table)
    if flags.workdir:
        load_workdir_config(flags.workdir)  # a missing run is refused before JAX is started
    configs = {} if flags.workdir else {name: command.load_config(name) for name in flags.config}

    from switchjax.analysis.decode_benchmark import benchmark_decoding, fresh, trained

    models = [(name, partial(fresh, config)) for name, config in configs.items()]
    models = models or [(str(flags.workdir), partial(trained, flags.workdir))]
    _show(flags, "decode", benchmark_decoding(models, flags.new_tokens, flags.repeats, report))


def _faults(flags: Namespace) -> None:
    if flags.tries < 1:
        raise UserError(f"--tries must be positive, got {flags.tries}")
    config = command.load_config(flags.config)

    from switchjax.analysis.fault_study import study_faults
    from switchjax.parallel.mesh import emulate_devices

    emulate_devices(config.mesh)
    training = [sys.executable, str(Path(__file__).with_name("train.py")), f"--config={flags.config}"]
    report = partial(print, flush=True)
    _show(flags, "faults", study_faults(training, config, flags.workdir, flags.tries, report))


def _plan(flags: Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # accelerators of this machine, if any, are left alone

    from switchjax.analysis.plan_table import tabulate_plans

    def load(name: str, overrides: Sequence[str]) -> Config:
        return command.load_config(str(flags.configs / name), overrides)

    _show(flags, "plan", tabulate_plans(load, flags.workdir, report=partial(print, flush=True)))


def _show(flags: Namespace, table: str, text: str) -> None:
    from switchjax.analysis.document import write_table

    print(text)
    if flags.write:
        write_table(flags.write, f"python scripts/benchmark.py {table}", text)


if __name__ == "__main__":
    command.run(main)
