"""Measures what the README and the docs claim about speed and routing; each command makes one study's tables.

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

The last needs the TPU compiler but no TPU: pip install -c constraints.txt libtpu
`python scripts/benchmark.py STUDY --help` shows the flags of a study.
"""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from switchjax import command, process_settings

STUDIES = {
    "layer": "layer_benchmark",
    "step": "step_benchmark",
    "input": "input_benchmark",
    "compile": "compile_benchmark",
    "routers": "router_study",
    "families": "family_study",
    "decode": "decode_benchmark",
    "layouts": "layout_study",
    "faults": "fault_study",
    "plan": "plan_benchmark",
}
"""Name -> module of `switchjax.studies`."""


def main(arguments: Sequence[str]) -> None:
    chooser = command.make_parser(__doc__)
    chooser.add_argument("study", choices=STUDIES, metavar="STUDY", help=", ".join(STUDIES))
    name = chooser.parse_args(arguments[:1]).study
    study = import_module(f"switchjax.studies.{STUDIES[name]}")

    from switchjax.studies.provenance import command_line
    from switchjax.studies.report import find_place, publish

    parser = command.make_parser(study.__doc__)
    parser.prog += f" {name}"
    study.add_flags(parser)
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the tables into this document")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    flags, rest = parser.parse_known_args(arguments[1:])
    if rest and not (hasattr(flags, "overrides") and flags.config and all(w.startswith("--config.") for w in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    flags.overrides = rest
    called = command_line(f"python scripts/benchmark.py {name}", flags, parser)
    if flags.write:
        find_place(flags.write, called)  # refuses a wrong document before anything is measured
    process_settings.keep_freed_memory()
    publish(study.measure(flags, command.load_config), called, flags.write, flags.json)


if __name__ == "__main__":
    command.run(main)
