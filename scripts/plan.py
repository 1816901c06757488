"""Plans a run: parameters and FLOPs; memory and communication of a step, compiled for TPUs that need not be attached.

python scripts/plan.py --config=configs/switch.py:c
python scripts/plan.py --config=configs/switch.py:c --topology=v5p:8x8x8 --json=plan.json
python scripts/plan.py --config=configs/switch.py:xxl-128 --topology=v5e --fit

Chips: v4, v5e, v5p, v6e, tpu7x. If the config leaves the mesh open, the script chooses one. --fit finds the smallest
slice of a chip on which the step fits. The TPU compiler is in libtpu: pip install -c constraints.txt libtpu.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from switchjax import command


def main(arguments: Sequence[str]) -> None:
    parser = command.make_parser(__doc__)
    parser.add_argument("--topology", metavar="CHIP[:AxB[xC]]", help="compile for this slice, such as v5p:8x8x8")
    parser.add_argument("--fit", action="store_true", help="find the smallest slice of --topology=CHIP (default: v5p)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the whole plan to FILE")
    flags, config = command.parse_with_config(parser, arguments)
    os.environ["JAX_PLATFORMS"] = "cpu"  # do not occupy this machine's accelerators
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # so that the printed compile time is real

    from switchjax.accounting.accounting import account, mesh_axes
    from switchjax.accounting.hardware import find_chip, parse_slice
    from switchjax.planning import report
    from switchjax.planning.plan import plan_step, smallest_fit

    chip = find_chip(flags.topology or "v5p") if flags.fit else None
    slice_ = parse_slice(flags.topology) if flags.topology and not chip else None
    accounting = account(config)
    file, _, size = flags.config.partition(":")
    published = report.show_published(f"{Path(file).stem}:{size}", config)
    print(report.show_accounting(accounting), *published, sep="\n", flush=True)
    found = report.accounting_dict(accounting)
    plan = None
    if chip:
        plan = smallest_fit(config, chip, partial(print, file=sys.stderr, flush=True))
    elif slice_:
        plan = plan_step(config, slice_)
    if plan:
        print(report.show_plan(plan))
        found |= asdict(plan)
    else:
        print(report.show_estimate(accounting, mesh_axes(config, devices=1)))
    if flags.json:
        report.write_json(flags.json, found)


if __name__ == "__main__":
    command.run(main)
