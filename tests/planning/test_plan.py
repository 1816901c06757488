"""Plans: the mesh of a slice, the errors of steps that do not fit, and the script with the real TPU compiler."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import pytest

from switchjax.accounting.accounting import account, mesh_axes
from switchjax.accounting.hardware import Slice, find_chip, parse_slice, show_bytes
from switchjax.config import Config, MeshConfig, UserError
from switchjax.parallel.mesh import make_mesh
from switchjax.planning import plan, topology
from switchjax.planning.buffer_assignment import Held
from switchjax.planning.hlo_collectives import Traffic
from switchjax.planning.plan import (
    DeviceMemory,
    OutOfMemory,
    StepPlan,
    explain_out_of_memory,
    needed_bytes,
    smallest_fit,
)
from switchjax.planning.report import accounting_dict, show_estimate, show_plan, write_json
from switchjax.planning.roofline import Roofline
from switchjax.planning.topology import choose_mesh, state_bytes
from switchjax.studies.compile_benchmark import compiled_programs_in
from switchjax.training.state import plan_state
from tests.tiny import changed

ROOT = Path(__file__).parents[2]
# The emulated devices stand for the chips of a slice.
EIGHT = parse_slice("v5e:2x4")


def open_mesh(config: Config) -> Config:
    return dataclasses.replace(config, mesh=MeshConfig())


def choose(config: Config, slice_: Slice = EIGHT) -> tuple[int, int, int]:
    mesh = choose_mesh(config, slice_, jax.devices())
    return mesh.data, mesh.expert, mesh.model


def with_memory(memory: int) -> Slice:
    return Slice(dataclasses.replace(find_chip("v5e"), memory=memory), (2, 4))


def test_an_open_mesh_gives_each_expert_as_few_devices_as_it_can(tiny: Config) -> None:
    assert choose(open_mesh(tiny)) == (-1, 4, 1)
    assert choose(changed(open_mesh(tiny), moe={"num_experts": 32})) == (-1, 8, 1)
    assert choose(changed(open_mesh(tiny), model={"pattern": ("dense",)})) == (-1, 1, 1)


def test_a_mesh_that_the_config_sets_stays(tiny: Config) -> None:
    assert choose(tiny) == (2, 4, 1)


def test_matrices_are_sliced_where_rows_do_not_divide_or_parameters_do_not_fit(tiny: Config) -> None:
    few_rows = changed(open_mesh(tiny), data={"batch_size": 4}, moe={"group_size": 32})
    assert choose(few_rows) == (-1, 4, 2)
    parameters, optimizer = state_bytes(plan_state(tiny, make_mesh(MeshConfig(expert=4))))
    assert choose(open_mesh(tiny), with_memory(2 * (2 * parameters + optimizer))) == (-1, 4, 1)
    assert choose(open_mesh(tiny), with_memory(2 * parameters + optimizer)) == (-1, 4, 2)


def test_experts_are_spread_before_matrices_are_sliced_all_the_way(tiny: Config) -> None:
    config = changed(open_mesh(tiny), model={"num_heads": 8})
    assert choose(config, with_memory(1)) == (-1, 2, 4)
    assert choose(changed(config, model={"pattern": ("dense",)}), with_memory(1)) == (-1, 1, 8)


def test_where_no_mesh_divides_the_config_the_first_reason_is_given(tiny: Config) -> None:
    with pytest.raises(UserError, match=r"3 rows .* do not divide over the 8 shards"):
        choose(changed(open_mesh(tiny), data={"batch_size": 3}))


def test_a_state_that_does_not_fit_is_refused_without_compiling(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "describe_devices", lambda _: jax.devices())
    with pytest.raises(OutOfMemory, match=r"KiB of parameters, .* exceed the 9.8 KiB of a device"):
        plan.plan_step(tiny, with_memory(10_000))


def test_slices_that_hold_less_than_the_step_needed_are_skipped(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    chip = find_chip("v5e")
    tried: list[int] = []

    def plan_step(config: Config, slice_: Slice) -> StepPlan:
        tried.append(slice_.chips)
        raise OutOfMemory("too little", 40 * chip.memory / slice_.chips if slice_.chips < 64 else 5 * chip.memory)

    monkeypatch.setattr(plan, "require_compiler", lambda: None)
    monkeypatch.setattr(plan, "plan_step", plan_step)
    with pytest.raises(UserError, match="no slice of v5e fits; the largest: too little"):
        smallest_fit(tiny, chip, lambda _: None)
    # 40 chips' memory, of which four fifths are trusted: 32 chips. Then 320, so that only the largest slice is left.
    assert tried == [1, 32, 64, 256]


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("libtpu"), reason="the TPU compiler is not installed")
def test_the_smallest_slice_that_fits_is_compiled_for(tiny: Config) -> None:
    parameters, optimizer = state_bytes(plan_state(tiny, make_mesh(MeshConfig(expert=4))))
    chip = dataclasses.replace(find_chip("v5e"), memory=16 << 20)
    lines: list[str] = []
    with compiled_programs_in(None):  # what is compiled for a device that is not there cannot be read again
        found = smallest_fit(tiny, chip, lines.append)
    # One chip and four have no mesh of 2 x 4 devices; eight hold the step.
    assert found.topology == "v5e:2x4"
    assert [line.split()[0] for line in lines] == ["trying", "v5e:1x1", "trying", "v5e:2x2", "trying"]
    memory = found.memory_per_device
    assert (memory.parameters, memory.optimizer) == (parameters, optimizer)
    assert memory.parameters + memory.optimizer < memory.total < memory.capacity
    assert "v5e:2x4, mesh data 2 x expert 4 x model 1" in show_plan(found)


def test_without_the_compiler_one_line_says_what_to_install(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install -c constraints.txt libtpu"):
        plan.plan_step(tiny, EIGHT)


def test_the_compilers_own_account_becomes_a_line() -> None:
    message = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        'Used 30.5G of 15.75G hbm.\n\n  1. Size: 4.00G\n     Operator: op_name="jit(train_step)/dot"\n     Shape: x\n'
        '  2. Size: 1.50G\n     Operator: op_name="jit(train_step)/softmax"\n'
    )
    line = explain_out_of_memory(message)
    assert line.endswith("Largest: 4.00G of jit(train_step)/dot; 1.50G of jit(train_step)/softmax")
    assert "Used 30.5G of 15.75G hbm." in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("the total memory required for HLO temporaries (334.78G) exceeds available HBM (95.74G).", 334.78),
        ("Ran out of memory in memory space hbm. Used 30.5G of 15.75G hbm.", 30.5),
        ("Ran out of memory", 0),
    ],
)
def test_what_a_program_needs_is_read_from_the_compilers_message(message: str, gib: float) -> None:
    assert needed_bytes(message) == gib * 2**30


PLAN = StepPlan(
    topology="v5e:2x4",
    mesh={"data": 2, "expert": 4, "model": 1},
    memory_per_device=DeviceMemory(4 << 30, 1 << 20, 2 << 30, 9 << 30, 14 << 30, 16 << 30),
    held_at_peak=(Held(2 << 30, 3, "f32[2,8]", "as encoder.w_in"),),
    flops_per_device=10**12,
    hbm_bytes_per_device=10**9,
    collectives={"all-to-all": Traffic(48, 1 << 30)},
    compile_seconds=12.3,
    roofline=Roofline(0.005, 0.0012, 2.5),
)


def test_a_plan_is_shown_with_what_binds_it() -> None:
    text = show_plan(PLAN)
    for part in (
        "v5e:2x4, mesh data 2 x expert 4 x model 1; compiled in 12 s",
        "14.0 GiB of 16.0 GiB, 12% free (less than 20%)",
        "3 x f32[2,8]  as encoder.w_in",
        "48 a step, 1.0 GiB on a device",
        "compute 5 ms, HBM 1.2 ms, network 2.50 s: bound by network",
    ):
        assert part in text


def test_json_holds_what_the_plan_says(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    write_json(path, dataclasses.asdict(PLAN))
    written = json.loads(path.read_text())
    assert written["flops_per_device"] == 10**12
    assert written["roofline"] == {"compute_seconds": 0.005, "hbm_seconds": 0.0012, "network_seconds": 2.5}
    assert written["collectives"] == {"all-to-all": {"count": 48, "bytes": 1 << 30}}
    with pytest.raises(UserError, match="cannot write"):
        write_json(tmp_path / "nowhere" / "plan.json", written)


def test_bytes_are_shown_in_the_unit_that_reads_best() -> None:
    assert [show_bytes(count) for count in (0, 1023, 1 << 20, 3 << 39)] == [
        "0 bytes",
        "1023 bytes",
        "1.0 MiB",
        "1.5 TiB",
    ]


def test_what_a_device_holds_is_told_where_nothing_is_compiled(tiny: Config) -> None:
    accounting, mesh = account(tiny), mesh_axes(tiny, 1)
    head, held, sent = show_estimate(accounting, mesh).splitlines()
    assert head == "a device of data 2 x expert 4 x model 1, not compiled"
    assert f"parameters {show_bytes(accounting.memory.parameters)}" in held
    assert f"all-to-all {show_bytes(accounting.communication.all_to_all)}" in sent
    assert accounting_dict(accounting)["estimate"]["memory"] == dataclasses.asdict(accounting.memory)
    alone = changed(tiny, mesh={"data": 1, "expert": 1})
    assert len(show_estimate(account(alone), mesh_axes(alone, 1)).splitlines()) == 2  # it sends nothing


def run_plan(config: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/plan.py", f"--config=configs/{config}:runlocal", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONWARNINGS": "ignore"},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "arguments", "mesh", "moe_layers"),
    [
        ("switch.py", ["--topology=v5e:2x4"], [2, 4, 1], 2),
        # One chip holds no two shards of experts, and is skipped.
        ("glam.py", ["--topology=v5e", "--fit", "--config.mesh.expert=2"], [2, 2, 1], 1),
    ],
)
def test_the_script_compiles_for_chips_that_are_not_there(
    tmp_path: Path, config: str, arguments: list[str], mesh: list[int], moe_layers: int
) -> None:
    pytest.importorskip("libtpu")
    done = run_plan(config, *arguments, f"--json={tmp_path / 'plan.json'}")
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["parameters"]["total"] > plan["parameters"]["active"] > 0
    assert plan["flops"]["forward_per_sequence"] > 0
    memory = plan["memory_per_device"]
    assert set(memory) == {"parameters", "optimizer", "activations", "temporaries", "total", "capacity"}
    assert memory["parameters"] + memory["optimizer"] < memory["total"] < memory["capacity"]
    assert all(plan["roofline"][f"{bound}_seconds"] >= 0 for bound in ("compute", "hbm", "network"))
    assert plan["compile_seconds"] > 0
    assert list(plan["mesh"].values()) == mesh
    # There and back, forward and backward.
    assert plan["collectives"]["all-to-all"]["count"] == 4 * moe_layers
    assert "all-gather" not in plan["collectives"]
    # Progress and nothing of the compiler's own noise.
    assert all(line.startswith(("trying", "v5e:")) for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v5q:2x4"], "no chip 'v5q'"),
        (["--topology=v5e"], "names no slice of v5e"),
        (["--topology=v5e:2x4", "--fit"], "no chip 'v5e:2x4'"),
    ],
)
def test_a_bad_topology_is_one_line(arguments: list[str], message: str) -> None:
    done = run_plan("switch.py", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --topology: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
