"""Compared steps compute the same, and each ratio belongs to the two steps that its row names."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from switchjax.accounting.accounting import account
from switchjax.config import MeshConfig
from switchjax.studies.step_benchmark import DENSE, DEVICES, cases, make_row, random_rows, train_program
from tests.studies.written import check_written
from tests.tiny import changed

SMALL = changed(
    DENSE,
    model={"vocab_size": 64, "d_model": 16, "d_ff": 32, "num_heads": 2, "d_head": 8},
    moe={"group_size": 64},
    data={"vocabulary_size": 40, "num_sentinels": 8, "encoder_length": 16, "decoder_length": 8},
)


def test_switch_transformers_have_the_dense_models_flops_and_the_capacity_that_is_said() -> None:
    dense, *switches = cases(DENSE)
    for case in switches:
        assert case.config.moe.train_capacity_factor == 1.25
        assert account(case.config).forward_flops == account(dense.config).forward_flops
        assert account(case.config).total > account(dense.config).total
    one, many = switches[-2:]
    assert many.beside == one.name
    assert replace(many.config, mesh=one.config.mesh) == one.config


def test_rows_are_named_after_what_their_config_has() -> None:
    config = changed(DENSE, moe={"router": "top_k", "num_selected_experts": 2}, mesh={"data": 2, "expert": 4})
    found = cases(config)
    assert [case.name for case in found[:3]] == ["dense", "top_k, K = 2, 32 experts", "top_k, K = 2, 128 experts"]
    assert [case.devices for case in found] == [1, 1, 1, 1, DEVICES]
    assert all(case.config.mesh == MeshConfig() for case in found[:-1])


def test_rows_are_full() -> None:
    rows = random_rows(SMALL)
    assert all(np.all(array == 1) for name, array in rows.items() if name.endswith("segments"))
    assert rows["encoder_tokens"].shape == (16, 16)
    assert 3 <= rows["encoder_tokens"].min() < rows["encoder_tokens"].max() < 64


@pytest.mark.slow
def test_one_device_and_8_take_the_same_steps() -> None:
    one, many = (train_program(case.config, jax.devices()[: case.devices]) for case in cases(SMALL)[-2:])
    losses = [[float(step()["loss"]) for _ in range(2)] for step in (one, many)]
    assert losses[0][1] < losses[0][0]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)  # float32 sums in another order


def test_rows_compare_what_they_say() -> None:
    compared = cases(SMALL)
    seconds = {case.name: [float(2**i)] * 3 for i, case in enumerate(compared)}
    rows = [make_row(case, seconds, None) for case in compared]
    assert [row.name for row in rows] == [case.name for case in compared]
    assert [(row.milliseconds, row.tokens_per_second) for row in rows[:2]] == [(1000, 384), (2000, 192)]
    assert [row.ratio and row.ratio.median for row in rows] == [None, 0.5, 0.25, None, 0.5]
    assert rows[-1].name == f"the same on {DEVICES} devices"
    (lines,) = check_written(rows, "docs/performance.md")
    assert lines[1].endswith("| 2000 | 192 | dense | 0.50 (0.50 to 0.50) | 0.92 |")


def test_utilization_is_of_all_devices() -> None:
    compared = cases(SMALL)
    seconds = {case.name: [2.0] for case in compared}
    rows = [make_row(case, seconds, peak=1e9) for case in compared]
    flops = 3 * account(compared[-1].config).forward_flops * 16
    assert rows[-1].mfu == pytest.approx(flops / 2 / (8 * 1e9))
    assert rows[-2].mfu == pytest.approx(8 * rows[-1].mfu)
