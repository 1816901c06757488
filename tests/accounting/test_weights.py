"""The list of weights against the modules themselves, for the layers and routers that no published config has."""

import pytest
from switchjax.accounting.parameters import count_parameters
from switchjax.accounting.weights import experts_per_token, list_weights, slots_per_sequence

from switchjax.config import Config
from tests.tiny import changed


def assert_counts(config: Config) -> None:
    weights = list_weights(config)
    counted = count_parameters(config)
    assert sum(weight.size for weight in weights) == counted.total
    assert sum(weight.active for weight in weights) == counted.active


@pytest.mark.parametrize(
    "moe",
    [
        {"router": "reinforced"},
        {"router": "sigmoid"},
        {"router": "sinkhorn"},
        {"num_shared_experts": 2},
        {"num_shared_experts": 1, "shared_mixing": "learned"},
    ],
    ids=str,
)
def test_routers_and_shared_experts(tiny: Config, moe: dict) -> None:
    assert_counts(changed(tiny, moe=moe))


@pytest.mark.parametrize(
    "model",
    [
        {"pattern": ("switch_attention",)},
        {"positions": "none", "norm": "none"},
        {"biases": True, "norm": "layer", "positions": "rotary", "num_kv_heads": 1},
        {"expert_activation": "swiglu", "tie_embeddings": False},
    ],
    ids=str,
)
def test_layers(tiny: Config, model: dict) -> None:
    assert_counts(changed(tiny, model=model))


@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
def test_base_layers(tiny: Config, norm: str) -> None:
    assert_counts(changed(tiny, model={"pattern": ("dense", "base"), "norm": norm}, moe={"router": "base"}))


def test_experts_of_a_token(tiny: Config) -> None:
    assert experts_per_token(changed(tiny, moe={"num_selected_experts": 2})) == 2
    chosen = {"router": "expert_choice", "train_capacity_factor": 2.0, "allow_noncausal_routing": True}
    assert experts_per_token(changed(tiny, moe=chosen)) == 2
    peer = {"num_experts": 16, "num_selected_experts": 4, "peer_heads": 3}
    assert experts_per_token(changed(tiny, model={"pattern": ("dense", "peer")}, moe=peer)) == 12


def test_slots_of_a_sequence(tiny: Config) -> None:
    # Groups of 32 tokens for 4 experts: 8 slots each at a factor of 1, 10 at 1.25.
    moe = {"num_experts": 4, "group_size": 32}
    assert slots_per_sequence(changed(tiny, moe={**moe, "train_capacity_factor": 1.0}), 4, 32) == 32
    assert slots_per_sequence(changed(tiny, moe={**moe, "train_capacity_factor": 1.25}), 4, 32) == 40
    assert slots_per_sequence(changed(tiny, moe={**moe, "train_capacity_factor": 1.25}), 4, 64) == 80
    assert slots_per_sequence(changed(tiny, moe={**moe, "dropless": True}), 4, 32) == 128
    assert slots_per_sequence(changed(tiny, moe={**moe, "dropless": True, "dispatch": "ragged"}), 4, 32) == 32
    assert slots_per_sequence(changed(tiny, moe={**moe, "router": "base", "num_experts": 3}), 3, 32) == 33
    dropless = {**moe, "router": "base", "num_experts": 3, "dropless": True}
    assert slots_per_sequence(changed(tiny, moe=dropless), 3, 32) == 33
