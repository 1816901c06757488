"""Checkpoints restore bit for bit on any mesh; errors name what is damaged or does not fit."""

import json
import logging
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from switchjax.config import Config, MeshConfig, UserError
from switchjax.config.formats import FORMAT
from switchjax.models.parameter_paths import parameter_paths
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import named_leaves
from switchjax.training.checkpoint import Checkpoints
from switchjax.training.state import StatePlan, TrainState, plan_state
from tests.models.families import FAMILIES
from tests.tiny import changed
from tests.training.make_fixture import FIXTURES


@pytest.fixture(scope="module")
def plan(tiny: Config) -> StatePlan:
    return plan_state(tiny, make_mesh(tiny.mesh))


@pytest.fixture(scope="module")
def state(plan: StatePlan) -> TrainState:
    return plan.create()


@pytest.fixture(scope="module")
def saved(tiny: Config, state: TrainState, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir to which steps 1, 2 and 3 were saved and which keeps two checkpoints."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(restored_at(step, state), position(step), tiny)
    checkpoints.close()
    return workdir


def position(step: int) -> dict[str, object]:
    return {"iterator": step, "fingerprint": "text"}


@pytest.fixture
def workdir(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "copy")


def assert_equal(actual: object, expected: object) -> None:
    wanted = named_leaves(expected)
    assert list(named_leaves(actual)) == list(wanted)
    for name, leaf in named_leaves(actual).items():
        np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)


def test_the_newest_comes_back_bit_for_bit_and_laid_out_as_asked(
    workdir: Path, plan: StatePlan, state: TrainState
) -> None:
    checkpoints = Checkpoints(workdir, keep=2)
    assert checkpoints.steps() == [2, 3]
    restored = checkpoints.restore_latest(plan, "text")
    assert restored is not None
    assert restored[1] == position(3)
    assert int(restored[0].step) == 3
    assert_equal(restored[0].model, state.model)
    assert_equal(restored[0].opt_state, state.opt_state)
    for leaf, sharding in zip(jax.tree.leaves(restored[0]), jax.tree.leaves(plan.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)])
def test_another_mesh_gets_the_same_values(
    workdir: Path, tiny: Config, state: TrainState, shape: tuple[int, int, int]
) -> None:
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: math.prod(shape)])
    assert_equal(Checkpoints(workdir).restore_state(3, plan_state(tiny, mesh)), restored_at(3, state))


def restored_at(step: int, state: TrainState) -> TrainState:
    return TrainState(state.step + step, state.model, state.opt_state)


def test_a_model_is_restored_without_its_optimiser(workdir: Path, plan: StatePlan, state: TrainState) -> None:
    for step, expected in ((2, 2), (-1, 3)):
        restored, model = Checkpoints(workdir).load_model(plan, step)
        assert restored == expected
        assert_equal(model, state.model)


def test_a_first_save_compiles_next_to_nothing(tiny: Config, state: TrainState, tmp_path: Path) -> None:
    # If each replica wrote a part of a small array, every part would need its own program.
    compiled: list[str] = []

    def listen(event: str, _: float, **details: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    checkpoints = Checkpoints(tmp_path, keep=1)
    jax.clear_caches()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        checkpoints.save(state, position(0), tiny)
        checkpoints.close()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) < 5 < len(named_leaves(state))


def test_names_and_shapes_can_be_read_without_the_config(workdir: Path, state: TrainState) -> None:
    stored = Checkpoints(workdir).shapes(3)
    assert stored["model/encoder/1/ff/experts/w_in"] == (4, 16, 32)
    assert stored["step"] == ()


def test_a_damaged_checkpoint_is_passed_over_with_a_message(
    workdir: Path, plan: StatePlan, caplog: pytest.LogCaptureFixture
) -> None:
    damage(workdir, 3)
    with caplog.at_level(logging.WARNING):
        restored = Checkpoints(workdir, keep=2).restore_latest(plan, "text")
    assert restored is not None
    assert int(restored[0].step) == 2
    assert "checkpoint 3 cannot be read" in caplog.text


def test_after_a_damaged_checkpoint_its_step_can_be_saved_again(
    workdir: Path, tiny: Config, plan: StatePlan, state: TrainState
) -> None:
    damage(workdir, 3)
    checkpoints = Checkpoints(workdir, keep=2)
    checkpoints.restore_latest(plan, "text")
    assert checkpoints.steps() == [2]
    checkpoints.save(restored_at(3, state), position(3), tiny)
    checkpoints.close()
    step, model = Checkpoints(workdir).load_model(plan)
    assert step == 3
    assert_equal(model, state.model)
    assert list((workdir / "damaged_checkpoints").glob("3-*"))


def test_a_model_is_taken_from_the_newest_checkpoint_that_can_be_read(workdir: Path, plan: StatePlan) -> None:
    damage(workdir, 3)
    assert Checkpoints(workdir).load_model(plan)[0] == 2
    with pytest.raises(UserError, match=r"checkpoint 3 .* cannot be read"):
        Checkpoints(workdir).load_model(plan, 3)


def test_only_damaged_checkpoints_are_an_error_and_not_a_fresh_start(workdir: Path, plan: StatePlan) -> None:
    damage(workdir, 2)
    damage(workdir, 3)
    with pytest.raises(UserError, match=r"none of the checkpoints \[2, 3\]"):
        Checkpoints(workdir, keep=2).restore_latest(plan, "text")


def damage(workdir: Path, step: int) -> None:
    """Truncates every data file of a checkpoint's state."""
    files = [path for path in (workdir / "checkpoints" / str(step) / "state").rglob("*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_another_shape_is_named(workdir: Path, tiny: Config) -> None:
    wider = plan_state(changed(tiny, model={"d_ff": 64}), make_mesh(tiny.mesh))
    with pytest.raises(UserError, match=r"decoder/0/ff/w_in is \(16, 32\) there and \(16, 64\) here"):
        Checkpoints(workdir).load_model(wider)


def test_a_missing_parameter_is_named(workdir: Path, tiny: Config) -> None:
    gated = plan_state(changed(tiny, model={"activation": "geglu"}), make_mesh(tiny.mesh))
    with pytest.raises(UserError, match=r"it has no .*w_gate"):
        Checkpoints(workdir, keep=2).restore_latest(gated, "text")


def test_a_surplus_parameter_is_named(workdir: Path, tiny: Config) -> None:
    unbiased = plan_state(changed(tiny, model={"positions": "rotary"}), make_mesh(tiny.mesh))
    with pytest.raises(UserError, match="checkpoint 3 does not fit the config: the model has no decoder/bias/bias"):
        Checkpoints(workdir).load_model(unbiased)
    with pytest.raises(
        UserError, match="checkpoint 3 does not fit the config: the model has no model/decoder/bias/bias"
    ):
        Checkpoints(workdir, keep=2).restore_latest(unbiased, "text")


def test_a_step_that_is_not_there_is_refused_with_those_that_are(workdir: Path, plan: StatePlan) -> None:
    with pytest.raises(UserError, match=r"no checkpoint of step 7 .* \[2, 3\]"):
        Checkpoints(workdir).load_model(plan, 7)


def test_reading_a_workdir_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoints in"):
        Checkpoints(tmp_path)


def another_programs(folder: Path) -> None:
    folder.mkdir()
    (folder / "_CHECKPOINT_METADATA").write_text("[]")
    (folder / "model.bin").write_bytes(b"weights")


def of_another_run(folder: Path) -> None:
    shutil.copytree(folder.with_name("3"), folder)
    config = folder / "config" / "metadata"
    values = json.loads(config.read_text())
    values["train"]["seed"] = 17
    config.write_text(json.dumps(values))


def without_a_description(folder: Path) -> None:
    shutil.copytree(folder.with_name("3"), folder)
    (folder / "state" / "_METADATA").unlink()


def half_copied(folder: Path) -> None:
    shutil.copytree(folder.with_name("3") / "state", folder / "state")


STRANGERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (Path.mkdir, "cannot be read and is skipped: it does not hold state, data, config"),
    "another program's": (another_programs, "cannot be read and is skipped: it does not hold state, data, config"),
    "a file": (Path.touch, "cannot be read and is skipped: it does not hold state, data, config"),
    "half copied": (half_copied, "cannot be read and is skipped: it does not hold state, data, config"),
    "no description": (without_a_description, "cannot be read and is skipped"),
    "renamed": (
        lambda folder: shutil.copytree(folder.with_name("3"), folder),
        "belongs to another run .* is of step 3",
    ),
    "another run's": (of_another_run, r"belongs to another run and is skipped: .* \(train\.seed: 17 -> 0\)"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_is_no_checkpoint_of_this_run_is_passed_over_and_its_step_can_be_saved(
    name: str, workdir: Path, tiny: Config, plan: StatePlan, state: TrainState, caplog: pytest.LogCaptureFixture
) -> None:
    make, message = STRANGERS[name]
    make(workdir / "checkpoints" / "7")
    checkpoints = Checkpoints(workdir, keep=2)
    with caplog.at_level(logging.WARNING):
        restored = checkpoints.restore_latest(plan, "text")
    assert restored is not None
    assert int(restored[0].step) == 3
    assert re.search(f"checkpoint 7 {message}", caplog.text)
    assert len(list((workdir / "damaged_checkpoints").glob("7-*"))) == 1
    checkpoints.save(restored_at(7, state), position(7), tiny)
    checkpoints.close()
    assert Checkpoints(workdir).steps() == [3, 7]
    assert Checkpoints(workdir).load_model(plan)[0] == 7


def test_other_data_is_refused(workdir: Path, plan: StatePlan) -> None:
    with pytest.raises(UserError, match="corpora or vocabulary have changed"):
        Checkpoints(workdir, keep=2).restore_latest(plan, "other text")


def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match=r"cannot use .*checkpoints for checkpoints"):
        Checkpoints(tmp_path, keep=2)


def named_layers(config: Config, model: object) -> dict[str, np.ndarray]:
    """The parameters of a model by layer."""
    leaves = named_leaves(model)
    return {
        layer: np.asarray(leaves[name][position] if path.layers else leaves[name])
        for name, path in parameter_paths(config, leaves).items()
        for position, layer in enumerate(path.by_layer)
    }


@pytest.mark.parametrize(
    "model",
    [
        pytest.param({"num_encoder_layers": 6}, id="deeper"),
        pytest.param({"pattern": ("moe",)}, id="another pattern"),
    ],
)
def test_another_model_takes_the_layers_that_it_has_too(
    model: dict[str, object],
    workdir: Path,
    tiny: Config,
    state: TrainState,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = changed(tiny, model=model, train={"seed": 1})
    plan = plan_state(config, make_mesh(config.mesh))
    fresh = plan.create().model
    with caplog.at_level(logging.INFO, "switchjax"):
        started, taken = Checkpoints(workdir).load_matching(plan, fresh)
    there, here, before = named_layers(tiny, state.model), named_layers(config, started), named_layers(config, fresh)
    assert taken == there.keys() & here.keys()
    assert "encoder/1/ff/experts/w_in" in taken
    for name, leaf in here.items():
        np.testing.assert_array_equal(leaf, there[name] if name in taken else before[name], err_msg=name)
    for leaf, sharding in zip(jax.tree.leaves(started), jax.tree.leaves(plan.shardings.model), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    for message in (
        f"takes {len(taken)} parameters of checkpoint 3",
        f"leaves {len(there.keys() - taken)} parameters of checkpoint 3",
        f"makes {len(here.keys() - taken)} parameters new: ",
    ):
        assert message in caplog.text


def test_a_model_of_other_sizes_is_not_started_from(workdir: Path, tiny: Config, state: TrainState) -> None:
    wider = plan_state(changed(tiny, model={"d_ff": 64}), make_mesh(tiny.mesh))
    message = r"decoder/0/ff/w_in is \(16, 32\) there and \(16, 64\) here; its sizes are model.d_ff=32: set those"
    with pytest.raises(UserError, match=message):
        Checkpoints(workdir).load_matching(wider, state.model)


def test_a_model_without_a_parameter_in_common_is_not_started_from(state: TrainState) -> None:
    vision = FAMILIES["v_moe"]
    with pytest.raises(UserError, match="it has none of the model's parameters, such as "):
        Checkpoints(FIXTURES / f"format_{FORMAT}" / "peer").load_matching(
            plan_state(vision, make_mesh(vision.mesh)), state.model
        )
