"""Upcycled models compute the same as their dense model at first; pruning keeps the most used experts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import Config, MoEConfig, UserError
from switchjax.interop.upcycle import expert_usage, prune, pruned_config, upcycle
from switchjax.models.families import build
from switchjax.moe.routers import ROUTERS
from switchjax.parallel.sharding import named_leaves
from tests.models import examples, families

KEY = jax.random.key(0)
TOP_2 = {"router": "top_k", "num_selected_experts": 2, "fill_order": "token_by_token", "dropless": True}
DECODER = dataclasses.replace(
    families.FAMILIES["mixtral"], moe=dataclasses.replace(families.FAMILIES["mixtral"].moe, **TOP_2)
)
T5 = examples.changed(num_encoder_layers=4, **TOP_2)


def dense(config: Config, pattern: tuple[str, ...] = ("dense",)) -> Config:
    return dataclasses.replace(config, model=dataclasses.replace(config.model, pattern=pattern))


@pytest.mark.parametrize("name", ["decoder", "t5"])
def test_an_upcycled_model_computes_what_the_dense_model_does(name: str) -> None:
    config, module = (DECODER, families) if name == "decoder" else (T5, examples)
    model, batch = module.make_model(dense(config)), module.make_batch(config)
    sparse = upcycle(model, dense(config), config, KEY)
    wanted, actual = module.forward(model, batch, None), module.forward(sparse, batch, None)
    segments = np.asarray(batch["decoder_segments"]) > 0
    # The gates sum to 1 but for rounding.
    np.testing.assert_allclose(np.asarray(actual)[segments], np.asarray(wanted)[segments], atol=2e-5, rtol=1e-5)


def test_experts_are_copies_of_their_own_layers_network_and_routers_are_new() -> None:
    model = examples.make_model(dense(T5))
    old, new = named_leaves(model), named_leaves(upcycle(model, dense(T5), T5, KEY))
    experts = new["encoder/scans/0/blocks/1/ff/experts/w_in"]
    for i, layer in enumerate((1, 3)):
        for expert in range(4):
            np.testing.assert_array_equal(experts[i, expert], old["encoder/scans/0/blocks/0/ff/w_in"][layer])
    router = np.asarray(new["encoder/scans/0/blocks/1/ff/router/logits"])
    fresh = named_leaves(build(T5, KEY))["encoder/scans/0/blocks/1/ff/router/logits"]
    np.testing.assert_allclose(router, fresh, rtol=1e-6)
    np.testing.assert_array_equal(new["embedding/vectors"], old["embedding/vectors"])


def test_noise_tells_experts_apart() -> None:
    model = examples.make_model(dense(T5))
    exact, noisy = (named_leaves(upcycle(model, dense(T5), T5, KEY, noise)) for noise in (0.0, 0.01))
    for name, leaf in exact.items():
        difference = np.asarray(noisy[name]) - np.asarray(leaf)
        if "experts" not in name:
            assert not difference.any(), name
            continue
        # 5 standard errors of a standard deviation from the fewest draws, 4 x 512.
        np.testing.assert_allclose(np.std(difference), 0.01 * np.std(leaf), rtol=0.1)
        assert len({expert.tobytes() for expert in np.asarray(noisy[name]).reshape(-1, *leaf.shape[2:])}) == 8 // (
            2 if "decoder" in name else 1
        )


def test_a_dense_model_that_does_not_fit_is_refused() -> None:
    model, config = examples.make_model(dense(T5)), dense(T5)
    with pytest.raises(UserError, match=r"/ff/w_in is \(16, 32\) in the dense model and \(16, 64\) here"):
        upcycle(model, config, examples.changed(T5, d_ff=64), KEY)
    with pytest.raises(UserError, match=r"the dense model has no logits"):
        upcycle(model, config, examples.changed(T5, tie_embeddings=False), KEY)
    for noise in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=rf"noise must be a number of at least 0, got {noise}"):
            upcycle(model, config, T5, KEY, noise)
    with pytest.raises(UserError, match=r"experts of activation gelu cannot be copies"):
        upcycle(model, config, examples.changed(T5, expert_activation="gelu"), KEY)


def test_pruning_keeps_the_most_used_experts() -> None:
    model, batch = families.make_model(DECODER), jax.tree.map(jnp.asarray, families.make_batch(DECODER))
    usage = expert_usage(model, DECODER, [batch, batch])
    _, reports = model(batch, None)
    metrics = reports["decoder/scans/0/blocks/0/ff"].metrics
    assert metrics is not None
    np.testing.assert_allclose(usage["decoder"], 2 * np.asarray(metrics.expert_load))
    small = prune(model, DECODER, usage, 3)
    old, new = named_leaves(model), named_leaves(small)
    for layer, counts in enumerate(usage["decoder"]):
        kept = [expert for expert in range(4) if expert != np.argmin(counts)]
        for name in ("w_in", "w_gate", "w_out"):
            path = f"decoder/scans/0/blocks/0/ff/experts/{name}"
            np.testing.assert_array_equal(new[path][layer], old[path][layer][np.array(kept)])
        path = "decoder/scans/0/blocks/0/ff/router/logits"
        np.testing.assert_array_equal(new[path][layer], old[path][layer][:, np.array(kept)])
    assert families.forward(small, batch, None).shape == families.forward(model, batch, None).shape


def test_pruning_to_all_experts_changes_nothing() -> None:
    model, batch = families.make_model(DECODER), jax.tree.map(jnp.asarray, families.make_batch(DECODER))
    same = prune(model, DECODER, expert_usage(model, DECODER, [batch]), 4)
    for name, leaf in named_leaves(same).items():
        np.testing.assert_array_equal(leaf, named_leaves(model)[name])


def test_pruning_to_more_or_too_few_is_refused() -> None:
    assert pruned_config(DECODER, 4) == DECODER
    with pytest.raises(UserError, match=r"cannot keep 5 of the experts of every layer: there are 4"):
        pruned_config(DECODER, 5)
    with pytest.raises(UserError, match=r"num_selected_experts=2 exceeds moe.num_experts=1"):
        pruned_config(DECODER, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dense(T5), r"model.pattern names no layer with experts"),
        (dense(T5, ("dense", "peer")), r"model.pattern=peer does not count which experts are used"),
        (dense(T5, ("switch_attention",)), r"model.pattern=switch_attention has two routers in each layer"),
        (dataclasses.replace(T5, moe=MoEConfig(router="hash")), r"moe.router=hash identifies experts by their numbers"),
        (
            dataclasses.replace(T5, moe=MoEConfig(router="expert_choice")),
            r"moe.router=expert_choice gives all experts equally many tokens",
        ),
    ],
)
def test_what_has_no_most_used_experts_is_refused(config: Config, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pruned_config(config, 2)


@pytest.mark.parametrize("router", sorted(set(ROUTERS) - {"hash", "hierarchical", "expert_choice"}))
def test_of_every_router_what_belongs_to_kept_experts_is_kept(router: str) -> None:
    selected = (ROUTERS[router].selected or (2,))[0]
    config = examples.changed(router=router, num_selected_experts=selected, dropless=True, allow_noncausal_routing=True)
    model, kept = examples.make_model(config), np.array([1, 3])
    usage = {stack: np.array([[0.0, 2.0, 1.0, 2.0]], np.float32) for stack in ("encoder", "decoder")}
    old, small = named_leaves(model), prune(model, config, usage, 2)
    for name, leaf in named_leaves(build(pruned_config(config, 2), KEY)).items():
        axes = [axis for axis, size in enumerate(leaf.shape) if size != old[name].shape[axis]]
        wanted = np.asarray(old[name]).take(kept, axes[0]) if axes else old[name]
        np.testing.assert_array_equal(named_leaves(small)[name], wanted, err_msg=name)
