"""Measures what the README and the docs claim about speed and routing; each table is one command.

python scripts/benchmark.py layer      # the MoE layer beside the dense network of the same FLOPs
python scripts/benchmark.py step       # the train step beside the dense model's, and on 8 devices beside one
python scripts/benchmark.py input      # the quickstart's text pipeline beside its train step
python scripts/benchmark.py compile    # deep models beside shallow ones, and the quickstart's first step
python scripts/benchmark.py routers    # every router on the quickstart's model and text, for docs/routers.md
python scripts/benchmark.py families   # a tiny model of each family beside its dense twin, for docs/families.md
python scripts/benchmark.py decode     # tokens a second with a cache of keys and values, and without
python scripts/benchmark.py layouts    # what each layout over a mesh communicates, and its picture, for docs/layouts.md
python scripts/benchmark.py faults     # runs that are killed, filled up and poisoned, for docs/faults.md
python scripts/benchmark.py plan       # the published models, compiled for the smallest slices that hold them

The last needs the TPU compiler, no TPU: pip install -c constraints.txt libtpu
"""

import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from switchjax import command, process_settings
from switchjax.config import Config, MeshConfig, ModelConfig, UserError, load_workdir_config
from switchjax.studies.markdown import find_place, read_tables, write_table

_REPORT = partial(print, flush=True)


def main(arguments: Sequence[str]) -> None:
    parser = command.make_parser(__doc__)
    tables = parser.add_subparsers(required=True, metavar="TABLE", dest="name")

    def add(name: str, table: Callable[[Namespace], None], summary: str, repeats: int = 0) -> ArgumentParser:
        added = tables.add_parser(name, help=summary)
        if repeats:
            added.add_argument("--repeats", type=int, default=repeats, help=f"runs of each program ({repeats})")
        added.add_argument("--write", type=Path, metavar="FILE", help="puts the table into this document")
        added.add_argument("--json", type=Path, metavar="FILE", help="also writes the table there")
        added.set_defaults(table=table)
        return added

    layer = add("layer", _layer, "time of an MoE layer beside a dense network (half an hour on two cores)", repeats=7)
    sizes, dtypes, forms = [256, 512, 1024], ["float32", "bfloat16"], ["gather", "einsum", "ragged"]
    layer.add_argument("--d_model", type=int, nargs="+", default=sizes, metavar="D", help="of its tokens; d_ff is 4 D")
    layer.add_argument("--dtype", nargs="+", default=dtypes, metavar="T", help="float32, bfloat16: of all arrays")
    layer.add_argument("--experts", type=int, nargs="+", default=[8, 64], metavar="E", help="of 8, 16, 64, 128, 512")
    layer.add_argument("--dispatch", nargs="+", default=forms[:1], choices=forms, help="forms of it")
    layer.add_argument("--tokens", type=int, default=16384, metavar="N", help="of all groups together")
    step = add("step", _step, "tokens a second with experts and on a mesh, beside those without", repeats=7)
    models = step.add_mutually_exclusive_group()
    models.add_argument("--huggingface", action="store_true", help="small models, beside transformers' own in PyTorch")
    models.add_argument(
        "--config", metavar="CONFIG", help="of the models, in the place of small ones; --config.SECTION.KEY=VALUE too"
    )
    step.set_defaults(overrides=[])
    add("input", _input, "tokens a second of the text pipeline, beside those of the train step", repeats=7)
    add("compile", _compile, "time to compile many layers and few, and to a run's first step", repeats=7)
    routers = add("routers", _routers, "loss, drops, load and speed of every router; resumes by itself")
    routers.add_argument("--config", default="configs/quickstart.py:study", help="what each of them changes")
    routers.add_argument("--workdir", type=Path, default=Path("runs/routers"), help="one run a router")
    families = add("families", _families, "loss of each family beside its dense twin; resumes by itself")
    families.add_argument("--config", default="configs/families.py", help="file of the pairs")
    families.add_argument("--workdir", type=Path, default=Path("runs/families"), help="two runs a family")
    decode = add("decode", _decode, "tokens a second with the cache and without", repeats=3)
    configs = ["configs/families.py:glam-dense", "configs/families.py:glam", "configs/quickstart.py:switch"]
    decode.add_argument("--config", nargs="+", default=configs, metavar="CONFIG", help="of fresh models")
    decode.add_argument("--workdir", type=Path, help="a run, whose latest checkpoint is taken in their place")
    folders = "models of Hugging Face's in their place, beside transformers' generate"
    decode.add_argument("--huggingface", nargs="+", type=Path, metavar="FOLDER", help=folders)
    decode.add_argument("--new_tokens", type=int, default=256, help="tokens that each row is continued by")
    layouts = add("layouts", _layouts, "collectives of each layout over 8 devices, and what lies where")
    layouts.add_argument("--config", default="configs/layouts.py", help="file of the layouts")
    picture = "draws each device's weights and tokens there, as SVG"
    layouts.add_argument("--picture", type=Path, metavar="FILE", help=picture)
    faults = add("faults", _faults, "what runs survive, fault by fault; resumes by itself")
    faults.add_argument("--config", default="configs/quickstart.py:faults", help="what is trained")
    faults.add_argument("--workdir", type=Path, default=Path("runs/faults"), help="one run a fault")
    faults.add_argument("--tries", type=int, default=20, metavar="N", help="no more than N of a fault (20: all)")
    plan = add("plan", _plan, "memory, collectives and compile time on TPU slices; resumes by itself")
    plan.add_argument("--configs", type=Path, default=Path("configs"), help="folder of their configs")
    plan.add_argument("--workdir", type=Path, default=Path("runs/plan"), help="one JSON file a plan")
    flags, rest = parser.parse_known_args(arguments)
    if flags.table is _step and flags.config and all(word.startswith("--config.") for word in rest):
        flags.overrides = rest
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if getattr(flags, "repeats", 1) < 1:
        parser.error(f"argument --repeats: must be positive, got {flags.repeats}")
    flags.command = _command(flags, tables.choices[flags.name])
    if flags.write:
        find_place(flags.write, flags.command)  # refused before anything is measured
    process_settings.keep_freed_memory()
    flags.table(flags)


def _command(flags: Namespace, parser: ArgumentParser) -> str:
    """The command whose figures these are: with every flag that may change them and is not as it would be."""
    words = ["python scripts/benchmark.py", flags.name]
    skipped = {"name", "table", "overrides", "write", "json", "picture"}
    if parser.get_default("workdir"):
        skipped.add("workdir")  # where a study's runs lie; without a default it names the model
    for name, value in vars(flags).items():
        if name in skipped or value == parser.get_default(name):
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [f"--{name}", *map(str, values)]
    return " ".join([*words, *getattr(flags, "overrides", [])])


def _layer(flags: Namespace) -> None:
    models = [ModelConfig(d_model=size, d_ff=4 * size, dtype=dtype) for size in flags.d_model for dtype in flags.dtype]

    from switchjax.studies.layer_benchmark import benchmark_layer, cases_of

    cases = cases_of(flags.experts)
    for case in cases:
        if flags.tokens < 1 or flags.tokens % case.num_tokens:
            raise UserError(f"--tokens={flags.tokens} is no multiple of the {case.num_tokens} tokens of a group")
    _show(flags, benchmark_layer(models, cases, flags.tokens, flags.dispatch, flags.repeats, _REPORT))


def _step(flags: Namespace) -> None:
    if flags.huggingface:
        from switchjax.studies.huggingface_training import benchmark_beside_transformers

        return _show(flags, benchmark_beside_transformers(flags.repeats, _REPORT))
    dense = command.load_config(flags.config, flags.overrides) if flags.config else None

    from switchjax.parallel.mesh import emulate_devices
    from switchjax.studies.step_benchmark import DENSE, DEVICES, benchmark_step

    emulate_devices(MeshConfig(emulated_devices=DEVICES))
    _show(flags, benchmark_step(dense or DENSE, flags.repeats, _REPORT))


def _input(flags: Namespace) -> None:
    config = command.load_config("configs/quickstart.py:switch")

    from switchjax.parallel.mesh import emulate_devices
    from switchjax.studies.input_benchmark import benchmark_input

    emulate_devices(config.mesh)
    _show(flags, benchmark_input(config, flags.repeats, _REPORT))


def _compile(flags: Namespace) -> None:
    config = command.load_config("configs/switch.py:runlocal")
    first = command.load_config("configs/quickstart.py:switch")

    from switchjax.parallel.mesh import emulate_devices
    from switchjax.studies.compile_benchmark import benchmark_compile

    emulate_devices(config.mesh)
    _show(flags, benchmark_compile(config, first, flags.repeats, _REPORT))


def _routers(flags: Namespace) -> None:
    config = command.load_config(flags.config)

    from switchjax.parallel.mesh import emulate_devices
    from switchjax.studies.router_study import study_routers

    emulate_devices(config.mesh)
    _show(flags, study_routers(config, flags.workdir, report=_REPORT))


def _families(flags: Namespace) -> None:
    def load(name: str) -> Config:
        return command.load_config(f"{flags.config}:{name}")

    load("runlocal")  # a missing file is refused before JAX is started

    from switchjax.studies.family_study import study_families

    _show(flags, study_families(load, flags.workdir, report=_REPORT))


def _decode(flags: Namespace) -> None:
    if flags.huggingface:
        from switchjax.studies.huggingface_decoding import benchmark_beside_transformers

        table = benchmark_beside_transformers(flags.huggingface, flags.new_tokens, flags.repeats, _REPORT)
        return _show(flags, table)
    if flags.workdir:
        load_workdir_config(flags.workdir)  # a missing run is refused before JAX is started
    configs = {} if flags.workdir else {name: command.load_config(name) for name in flags.config}

    from switchjax.studies.decode_benchmark import benchmark_decoding, fresh, trained

    models = [(name, partial(fresh, config)) for name, config in configs.items()]
    models = models or [(str(flags.workdir), partial(trained, flags.workdir))]
    _show(flags, benchmark_decoding(models, flags.new_tokens, flags.repeats, _REPORT))


def _layouts(flags: Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # the devices are emulated

    from switchjax.parallel.mesh import emulate_devices
    from switchjax.planning.layout_picture import draw_layouts
    from switchjax.studies.layouts import LAYOUTS, count_layout, tabulate_layouts

    layouts = {name: command.load_config(f"{flags.config}:{name}") for name in LAYOUTS}
    emulate_devices(layouts[LAYOUTS[0]].mesh)
    if flags.picture:
        try:
            flags.picture.write_text(draw_layouts(layouts))
        except OSError as error:
            raise UserError(f"--picture: cannot write {flags.picture} ({error.strerror})") from None
    counted = {name: count_layout(config) for name, config in layouts.items()}
    _show(flags, tabulate_layouts(counted))


def _faults(flags: Namespace) -> None:
    if flags.tries < 1:
        raise UserError(f"--tries must be positive, got {flags.tries}")
    config = command.load_config(flags.config)

    from switchjax.parallel.mesh import emulate_devices
    from switchjax.studies.fault_study import study_faults

    emulate_devices(config.mesh)
    training = [sys.executable, str(Path(__file__).with_name("train.py")), f"--config={flags.config}"]
    _show(flags, study_faults(training, config, flags.workdir, flags.tries, _REPORT))


def _plan(flags: Namespace) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"  # accelerators of this machine, if any, are left alone
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # how long it takes to compile is told

    from switchjax.studies.plan_benchmark import tabulate_plans

    def load(name: str, overrides: Sequence[str]) -> Config:
        return command.load_config(str(flags.configs / name), overrides)

    _show(flags, tabulate_plans(load, flags.workdir, report=_REPORT))


def _show(flags: Namespace, text: str) -> None:
    from switchjax.planning.report import write_json
    from switchjax.studies.provenance import origin, show_origin

    found = origin(flags.command)
    shown = f"{text}\n\n{show_origin(found)}"
    print(shown)
    if flags.json:
        write_json(flags.json, found, {"tables": read_tables(text)})
    if flags.write:
        write_table(flags.write, flags.command, shown)


if __name__ == "__main__":
    command.run(main)
