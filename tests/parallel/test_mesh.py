"""Refusals of a mesh or a config that does not fit, with sizes that would fit."""

import subprocess
import sys
from dataclasses import replace

import jax
import pytest

from switchjax.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig, TrainConfig, UserError
from switchjax.parallel import mesh
from switchjax.parallel.mesh import AXES, check_fit, emulate_devices, make_mesh

FITTING = Config(
    model=ModelConfig(vocab_size=4096, d_model=64, d_ff=96, num_heads=4, d_head=16),
    moe=MoEConfig(num_experts=8, group_size=512),
    data=DataConfig(batch_size=32, encoder_length=512, decoder_length=128),
)


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (MeshConfig(), (8, 1, 1)),
        (MeshConfig(data=-1, expert=2, model=2), (2, 2, 2)),
        (MeshConfig(data=-1, expert=8), (1, 8, 1)),
        (MeshConfig(data=2, expert=1, model=4), (2, 1, 4)),
    ],
)
def test_a_mesh_has_the_three_axes_and_every_device_once(config: MeshConfig, shape: tuple[int, ...]) -> None:
    mesh = make_mesh(config)
    assert mesh.axis_names == AXES
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices())


def test_a_mesh_may_take_some_of_the_devices() -> None:
    devices = jax.devices()[2:6]
    assert set(make_mesh(MeshConfig(expert=2), devices).devices.flat) == set(devices)
    assert make_mesh(MeshConfig(), devices[:1]).size == 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            MeshConfig(data=3, expert=2),
            r"data=3 x expert=2 x model=1 needs 6 .* there are 8: mesh.data=4 fits",
        ),
        (MeshConfig(data=8, expert=8), r"needs 64 devices, but there are 8: mesh.data=1 fits"),
        (MeshConfig(expert=3), r"there are 8: mesh.expert \* mesh.model must divide 8 \(one of 1, 2, 4, 8\)"),
        (MeshConfig(expert=4, model=4), r"needs 16 devices, but there are 8: mesh.expert \* mesh.model must divide 8"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config: MeshConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_mesh(config)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (1, 8, 1), (2, 2, 2), (1, 2, 4)])
def test_a_config_that_fits_is_let_through(shape: tuple[int, int, int]) -> None:
    check_fit(FITTING, make_mesh(MeshConfig(*shape)))


@pytest.mark.parametrize(
    ("section", "changes", "shape", "message"),
    [
        ("data", {"batch_size": 28}, (4, 2, 1), r"28 rows .* 8 shards of data x expert: .* multiples are 24 and 32"),
        ("data", {"batch_size": 4}, (4, 2, 1), r"4 rows .* 8 shards of data x expert: .* multiples are 8$"),
        ("model", {"num_heads": 6}, (2, 1, 4), r"model.num_heads=6 .* mesh.model=4: sizes that fit are 1, 2$"),
        ("model", {"d_ff": 90}, (2, 1, 4), r"model.d_ff=90 .* mesh.model=4: sizes that fit are 1, 2$"),
        ("model", {"vocab_size": 4098}, (2, 1, 4), r"model.vocab_size=4098 .* multiples are 4096 and 4100"),
        ("moe", {"num_experts": 12}, (1, 8, 1), r"moe.num_experts=12 .* mesh.expert=8: sizes that fit are 1, 2, 4$"),
        ("moe", {"num_experts": 4}, (1, 8, 1), r"moe.num_experts=4 .* mesh.expert=8: sizes that fit are 1, 2, 4$"),
        (
            "model",
            {"num_heads": 8, "num_kv_heads": 2},
            (2, 1, 4),
            r"model.num_kv_heads=2 .* mesh.model=4: sizes that fit are 1, 2$",
        ),
        ("moe", {"group_size": 100}, (8, 1, 1), r"moe.group_size=100 neither divides a row of 512 tokens"),
        ("moe", {"group_size": 4096}, (8, 1, 1), r"hold 8 encoder rows, .* the 4 rows of a shard: moe.group_size=2048"),
        ("data", {"batch_size": 24}, (8, 1, 1), r"hold 4 decoder rows, .* the 3 rows of a shard: moe.group_size=128"),
    ],
)
def test_a_size_that_the_mesh_does_not_divide_is_refused_with_ones_that_fit(
    section: str, changes: dict[str, int], shape: tuple[int, int, int], message: str
) -> None:
    config = replace(FITTING, **{section: replace(getattr(FITTING, section), **changes)})
    with pytest.raises(UserError, match=message):
        check_fit(config, make_mesh(MeshConfig(*shape)))


@pytest.mark.parametrize("sharded", ["parameters", "optimizer"])
def test_sharded_matrices_must_divide_over_the_shards_of_the_batch(sharded: str) -> None:
    narrow = replace(FITTING, model=replace(FITTING.model, d_model=60))
    for shape in [(8, 1, 1), (2, 4, 1)]:
        check_fit(narrow, make_mesh(MeshConfig(*shape)))
        config = replace(narrow, mesh=MeshConfig(*shape, sharded=sharded))
        message = rf"d_model=60 .* 8 shards of data x expert, which mesh.sharded={sharded} needs: .* 56 and 64$"
        with pytest.raises(UserError, match=message):
            check_fit(config, make_mesh(config.mesh))


def test_rows_are_counted_by_the_micro_batch() -> None:
    config = replace(FITTING, train=TrainConfig(accumulation_steps=8))
    with pytest.raises(UserError, match="4 rows"):
        check_fit(config, make_mesh(MeshConfig()))


@pytest.mark.parametrize("group_size", [64, 128, 384, 512, 640, 1024, 2048, 4096])
@pytest.mark.parametrize("batch_size", [8, 24, 32, 48])
def test_groups_are_let_through_exactly_if_the_layer_can_divide_them(group_size: int, batch_size: int) -> None:
    config = replace(FITTING, moe=MoEConfig(group_size=group_size), data=replace(FITTING.data, batch_size=batch_size))

    def fits(length: int) -> bool:
        try:
            tokens = MoEConfig(group_size=group_size).tokens_per_group(batch_size, length)
        except UserError:
            return False
        return batch_size * length // tokens % 8 == 0

    try:
        check_fit(config, make_mesh(MeshConfig(2, 4)))
        accepted = True
    except UserError:
        accepted = False
    assert accepted == all(fits(length) for length in (config.data.encoder_length, config.data.decoder_length))


def test_experts_and_groups_do_not_matter_to_a_dense_model() -> None:
    dense = replace(FITTING.model, pattern=("dense",))
    check_fit(replace(FITTING, model=dense, moe=MoEConfig(num_experts=3, group_size=7)), make_mesh(MeshConfig(1, 8)))


def test_groups_do_not_matter_to_peer_and_experts_do() -> None:
    peer = replace(FITTING, model=replace(FITTING.model, pattern=("dense", "peer")))
    config = replace(peer, moe=MoEConfig(num_experts=64, group_size=7), train=TrainConfig(accumulation_steps=2))
    assert config.rows_per_group == 1
    check_fit(config, make_mesh(MeshConfig(1, 8)))
    with pytest.raises(UserError, match=r"moe.num_experts=49 .* mesh.expert=8"):
        check_fit(replace(config, moe=MoEConfig(num_experts=49, group_size=7)), make_mesh(MeshConfig(1, 8)))


def test_emulated_devices_come_too_late_only_where_there_are_fewer() -> None:
    jax.devices()  # JAX has started
    for count in (0, 4, 8):
        emulate_devices(MeshConfig(emulated_devices=count))
    assert jax.device_count() == 8
    with pytest.raises(UserError, match=r"mesh.emulated_devices=64, but JAX has already started with 8 devices"):
        emulate_devices(MeshConfig(emulated_devices=64))


def test_emulated_devices_are_there_when_asked_for_in_time() -> None:
    code = (
        "from switchjax.config import MeshConfig; from switchjax.parallel.mesh import *; import jax;"
        "jax.config.update('jax_platforms', 'cpu'); emulate_devices(MeshConfig(emulated_devices=6));"
        "print(make_mesh(MeshConfig(expert=3)).devices.shape)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "(2, 3, 1)"


def test_emulated_devices_are_divided_over_the_processes_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mesh, "process_count", lambda: 3)
    updates: list[tuple[str, object]] = []
    monkeypatch.setattr(jax.config, "update", lambda *update: updates.append(update))
    emulate_devices(MeshConfig(emulated_devices=12))
    assert updates == [("jax_num_cpu_devices", 4)]
    with pytest.raises(UserError, match="emulated_devices=8 are those of all processes, and do not divide over 3"):
        emulate_devices(MeshConfig(emulated_devices=8))
