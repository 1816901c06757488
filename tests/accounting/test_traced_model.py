"""The traced weights of models: their parts, and what a sequence computes with each."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from switchjax.accounting.accounting import account
from switchjax.accounting.traced_model import TracedWeight, trace_model
from switchjax.config import Config
from switchjax.models.families import build
from switchjax.models.parameters import count_trained
from switchjax.moe.routers import ROUTERS
from switchjax.parallel.mesh import make_mesh
from tests.tiny import changed


def find(config: Config, ending: str) -> TracedWeight:
    """The decoder's first weight whose name ends with `ending`."""
    return next(w for w in trace_model(config).weights if w.stack == "decoder" and w.name.endswith(ending))


def test_a_router_from_outside_the_package_is_accounted_for_with_all_its_weights(
    tiny: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch, width, numbers = ROUTERS["switch"], tiny.model.d_model, 16 * 16 + 16

    def weights(*arguments: Any) -> Any:
        made = switch.weights(*arguments)
        of = partial(replace, made["logits"])
        hidden, scale = of(value=jnp.ones((width, width))), of(value=jnp.ones(width), axes=("embed",))
        return {**made, "hidden": hidden, "scale": scale, "count": of(value=jnp.ones(3), axes=(None,), trained=False)}

    def route(weights: Any, tokens: Any, *others: Any) -> Any:
        x = jnp.einsum("gsd,de->gse", tokens.x, weights["hidden"] * weights["scale"][None])
        return switch.route({"logits": weights["logits"]}, replace(tokens, x=x), *others)

    monkeypatch.setitem(ROUTERS, "of one's own", replace(switch, weights=weights, route=route))
    config = changed(tiny, moe={"router": "of one's own"})
    before, after = account(tiny), account(config)
    assert after.total == count_trained(jax.eval_shape(partial(build, config), jax.random.key(0)))
    # One MoE layer a stack; the counter is no parameter.
    assert after.total - before.total == after.active - before.active == 2 * numbers
    assert after.parameters["routers"] - before.parameters["routers"] == 2 * numbers
    assert after.memory.parameters - before.memory.parameters == 4 * 2 * numbers
    tokens = sum(config.stack_lengths.values())
    assert after.computed_flops["routers"] - before.computed_flops["routers"] == 2 * tokens * width * width
    assert after.forward_flops == before.forward_flops


@pytest.mark.parametrize(("router", "columns"), [("switch", 4), ("hash", 0), ("sigmoid", 4), ("reinforced", 5)])
def test_routers_have_what_the_gradient_trains(tiny: Config, router: str, columns: int) -> None:
    parameters = account(changed(tiny, moe={"router": router})).parameters
    assert parameters.get("routers", 0) == 2 * tiny.model.d_model * columns  # one MoE layer a stack


def test_parts_are_those_of_the_architecture(tiny: Config) -> None:
    model = {"biases": True, "norm": "layer", "num_kv_heads": 1, "tie_embeddings": False, "pattern": ("moe_dense",)}
    moe = {"num_shared_experts": 1, "shared_mixing": "learned"}
    config = changed(tiny, model=model | {"expert_activation": "swiglu"}, moe=moe)
    attention = 2 * 16 * 2 * 8 + 2 * 16 * 8 + 2 * 8 + 2 * 8 + 16
    gated, dense = 3 * 16 * 32 + 32 + 16, 2 * 16 * 32 + 32 + 16
    assert account(config).parameters == {
        "embeddings": tiny.model.vocab_size * 16,
        "logits": tiny.model.vocab_size * 16,
        "positions": 2 * 2 * 32,
        "attention": 2 * attention + 2 * 2 * attention,
        "norms": 2 * 16 * (2 * 3 + 1 + 2 * 4 + 1),
        "routers": 4 * (16 * 4 + 16 * 2 + 2),
        "experts": 4 * 4 * gated,
        "feed_forward": 4 * (gated + dense),
    }


def test_a_weight_of_unknown_place_is_another_part(tiny: Config) -> None:
    weight = find(tiny, "ff/w_in")
    assert weight.part == "feed_forward"
    assert replace(weight, name="decoder/scans/0/blocks/0/mixer/w").part == "other"


def test_base_layers_have_a_norm_in_each_expert(tiny: Config) -> None:
    config = changed(tiny, model={"pattern": ("dense", "base"), "norm": "layer"}, moe={"router": "base"})
    assert account(config).parameters["experts"] == 2 * 4 * (2 * 16 * 32 + 2 * 16)


def test_experts_of_a_token(tiny: Config) -> None:
    chosen = {"router": "expert_choice", "train_capacity_factor": 2.0, "allow_noncausal_routing": True}
    peer = {"num_experts": 16, "num_selected_experts": 4}
    for model, moe, name, expected in (
        ({}, {"router": "top_k", "num_selected_experts": 2, "dropless": True}, "experts/w_in", 2),
        ({}, chosen, "experts/w_in", 2),
        ({"pattern": ("dense", "peer")}, peer, "ff/down", 4 * 8),
    ):
        weight = find(changed(tiny, model=model, moe=moe), name)
        assert weight.active * weight.axis("expert") == weight.size * expected


def test_slots_of_a_sequence(tiny: Config) -> None:
    # Groups of 32 tokens for 4 experts: 8 slots each at a factor of 1, 10 at 1.25.
    for moe, slots in (
        ({"train_capacity_factor": 1.0}, 32),
        ({"train_capacity_factor": 1.25}, 40),
        ({"dropless": True}, 128),
        ({"dropless": True, "dispatch": "ragged"}, 32),
        ({"router": "base", "num_experts": 3}, 33),  # which takes no heed of the factor
    ):
        config = changed(tiny, moe={"num_experts": 4, "group_size": 32} | moe, data={"decoder_length": 32})
        assert find(config, "experts/w_in").vectors == slots, moe
        assert find(config, "experts/w_in").slot_numbers == slots * tiny.model.d_model, moe


def test_groups_are_those_of_a_micro_batch(tiny: Config) -> None:
    config = changed(tiny, moe={"group_size": 96, "train_capacity_factor": 1.1}, data={"decoder_length": 32})
    assert find(config, "experts/w_in").vectors == 4 * int(1.1 * 96 / 4) // 3
    halved = changed(config, train={"accumulation_steps": 12})
    assert find(halved, "experts/w_in").vectors == 4 * int(1.1 * 64 / 4) // 2


def test_one_hot_dispatch_multiplies_activations(tiny: Config) -> None:
    gather, einsum = (trace_model(changed(tiny, moe={"dispatch": form})) for form in ("gather", "einsum"))
    slots = {weight.stack: weight.vectors for weight in einsum.weights if weight.name.endswith("experts/w_in")}
    rows = {stack: tiny.moe.tokens_per_group(24, length) for stack, length in tiny.stack_lengths.items()}
    moved = sum(2 * 2 * slots[stack] * rows[stack] * tiny.model.d_model for stack in slots)
    assert einsum.activation_flops - gather.activation_flops == moved


def test_the_mesh_and_the_dtype_of_a_run_change_no_flops(tiny: Config) -> None:
    with jax.set_mesh(make_mesh(tiny.mesh)):
        over_mesh = trace_model(changed(tiny, model={"dtype": "bfloat16"}))
    assert over_mesh == trace_model(tiny)
