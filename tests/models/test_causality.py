"""A decoder's output does not depend on later tokens, and routers that would make it so are refused."""

import re
from typing import Any

import jax
import numpy as np
import pytest

from switchjax.config import UserError
from switchjax.models.families import build
from tests.models.examples import changed, forward, make_batch, make_model
from tests.models.families import FAMILIES

REFUSED: list[tuple[dict[str, Any], str, set[str]]] = [
    ({"router": "expert_choice"}, "a later token has no room", set()),
    ({"fill_order": "batch_prioritized"}, "higher gate take a slot", {"fill_order=token_by_token", "dropless=True"}),
    (
        {"router": "top_k", "num_selected_experts": 2},
        "a second choice loses its slot",
        {"fill_order=token_by_token", "dropless=True"},
    ),
    ({"no_token_left_behind": 2}, "sent on to another expert", {"no_token_left_behind=0", "dropless=True"}),
    ({"no_token_left_behind": 2, "fill_order": "batch_prioritized"}, "higher gate take a slot", {"dropless=True"}),
]


@pytest.mark.parametrize(("moe", "reason", "remedies"), REFUSED)
def test_routers_that_see_the_future_are_refused_unless_asked_for(
    moe: dict[str, Any], reason: str, remedies: set[str]
) -> None:
    with pytest.raises(UserError, match=rf"{reason}.* allows it") as refusal:
        jax.eval_shape(lambda: build(changed(**moe), jax.random.key(0)))
    jax.eval_shape(lambda: build(changed(**moe, allow_noncausal_routing=True), jax.random.key(0)))
    jax.eval_shape(lambda: build(changed(**moe, pattern=("dense",)), jax.random.key(0)))
    named = dict(re.findall(r"moe\.(\w+)=(\w+)", str(refusal.value).partition("allows it")[2]))
    assert {f"{key}={value}" for key, value in named.items()} == remedies
    known = {"True": True, "0": 0}
    for key, value in named.items():  # what the message says does help
        jax.eval_shape(lambda k=key, v=value: build(changed(**(moe | {k: known.get(v, v)})), jax.random.key(0)))


@pytest.mark.parametrize("family", ["gpt", "lstm"])
def test_a_router_that_does_not_exist_is_refused_by_name(family: str) -> None:
    with pytest.raises(UserError, match=r"moe.router: unknown value 'swich' \(did you mean 'switch'\?\)"):
        jax.eval_shape(lambda: build(changed(FAMILIES[family], router="swich"), jax.random.key(0)))


@pytest.mark.parametrize(
    "moe",
    [
        {"eval_capacity_factor": 0.5},
        {"router": "top_k", "num_selected_experts": 2, "fill_order": "token_by_token", "eval_capacity_factor": 0.5},
        pytest.param({"router": "top_k", "num_selected_experts": 2, "dropless": True}, marks=pytest.mark.slow),
        pytest.param(
            {"fill_order": "batch_prioritized", "dropless": True, "no_token_left_behind": 1}, marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_a_changed_suffix_moves_no_logit_of_the_prefix(moe: dict[str, Any]) -> None:
    # One row a group: rows after it in the batch cannot crowd a token out either.
    config = changed(group_size=8, min_expert_capacity=1, **moe)
    model, batch = make_model(config), make_batch(config)
    suffix = np.arange(config.data.decoder_length) >= 4
    other = batch | {"decoder_inputs": np.where(suffix, (batch["decoder_inputs"] + 7) % 40, batch["decoder_inputs"])}
    logits, moved = (np.asarray(forward(model, rows, None)) for rows in (batch, other))
    np.testing.assert_array_equal(logits[:, :4], moved[:, :4])
    assert np.any(logits[:, 4:] != moved[:, 4:])
