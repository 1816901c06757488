"""Gather, einsum and a loop over tokens give the same outputs and all the same gradients."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import MoEConfig
from switchjax.moe.capacity import token_choice
from switchjax.moe.dispatch import DISPATCHERS
from switchjax.moe.losses import RoutingMetrics
from switchjax.moe.routing import Routing, Tokens
from switchjax.planning.hlo import count_operations
from tests.moe.examples import CASES, Case, Choices, fill_one_by_one, random_choices

D = 5


def routing_of(choices: Choices, gate: jax.Array | np.ndarray, capacity: int) -> Routing:
    logits, index, mask = map(jnp.asarray, (choices.logits, choices.expert_index, choices.token_mask))
    tokens = Tokens(jnp.zeros((*mask.shape, 1)), mask, capacity)
    chosen = jax.nn.one_hot(index, logits.shape[-1])
    gates = jnp.sum(chosen * jnp.asarray(gate)[..., None], axis=-2)
    return token_choice(
        tokens, MoEConfig(), logits=logits, probs=jax.nn.softmax(logits), gates=gates, expert_index=index
    )


def moe(x: jax.Array, gate: jax.Array, weights: jax.Array, *, choices: Choices, capacity: int, form: str) -> jax.Array:
    """Dispatches, applies experts `tanh(x W_e)` and combines."""
    routing, dispatcher = routing_of(choices, gate, capacity), DISPATCHERS[form]
    hidden = jnp.tanh(jnp.einsum("egcd,edf->egcf", dispatcher.dispatch(x, routing), weights))
    return dispatcher.combine(hidden, routing)


def moe_one_by_one(
    x: np.ndarray, gate: np.ndarray, weights: np.ndarray, cotangent: np.ndarray, choices: Choices, case: Case
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Outputs and the gradients of x, gate and weights, token by token in float64."""
    x, gate, weights, cotangent = (a.astype(np.float64) for a in (x, gate, weights, cotangent))
    out, dx, dgate, dweights = (np.zeros_like(a) for a in (x, x, gate, weights))
    for (group, token, k), (expert, _) in fill_one_by_one(choices, case).items():
        at = (group, token)
        hidden = np.tanh(x[at] @ weights[expert])
        out[at] += gate[group, token, k] * hidden
        dgate[group, token, k] = cotangent[at] @ hidden
        before_tanh = gate[group, token, k] * cotangent[at] * (1 - hidden**2)
        dx[at] += weights[expert] @ before_tanh
        dweights[expert] += np.outer(x[at], before_tanh)
    return out, (dx, dgate, dweights)


def random_inputs(case: Case) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(case.tokens)
    shapes = [(case.groups, case.tokens, D), (case.experts, D, D), (case.groups, case.tokens, D)]
    x, weights, cotangent = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return x, weights, cotangent


@pytest.mark.parametrize("form", DISPATCHERS)
@pytest.mark.parametrize("name", CASES)
def test_every_form_agrees_with_a_loop_over_tokens(name: str, form: str) -> None:
    case = CASES[name]
    choices = random_choices(case, seed=0)
    x, weights, cotangent = random_inputs(case)

    @jax.jit
    def run(x: jax.Array, gate: jax.Array, weights: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        out, pull = jax.vjp(partial(moe, choices=choices, capacity=case.capacity, form=form), x, gate, weights)
        return out, pull(jnp.asarray(cotangent))

    out, gradients = run(x, choices.gate, weights)
    expected_out, expected_gradients = moe_one_by_one(x, choices.gate, weights, cotangent, choices, case)
    # float32 sums of up to 40 terms of about 1 against float64.
    np.testing.assert_allclose(out, expected_out, rtol=1e-5, atol=1e-5)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_the_cases_above_have_drops_padding_and_empty_experts() -> None:
    dropped = padded = idle = 0
    for case in CASES.values():
        choices = random_choices(case, seed=0)
        placed = fill_one_by_one(choices, case)
        dropped += int(choices.token_mask.sum()) * case.selected - len(placed)
        padded += int((~choices.token_mask).sum())
        idle += case.experts - len({expert for expert, _ in placed.values()})
    assert min(dropped, padded, idle) > 5


def test_a_token_without_a_slot_comes_back_as_zeros_and_gets_no_gradient() -> None:
    case = Case(tokens=3, experts=2, selected=1, capacity=1, groups=1)
    index = np.zeros((1, 3, 1), np.int32)
    gate = np.ones((1, 3, 1), np.float32)
    choices = Choices(np.zeros((1, 3, 2), np.float32), index, gate, np.ones((1, 3), bool))
    weights = np.broadcast_to(np.eye(D, dtype=np.float32), (case.experts, D, D))

    @jax.jit
    def run(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        layer = partial(moe, gate=gate, weights=weights, choices=choices, capacity=1, form="gather")
        out, pull = jax.vjp(layer, x)
        return out, pull(jnp.ones_like(out))[0]

    out, gradient = run(np.ones((1, 3, D), np.float32))
    assert np.all(np.asarray(out)[0, 0] != 0)
    np.testing.assert_array_equal(out[0, 1:], 0)
    np.testing.assert_array_equal(gradient[0, 1:], 0)


def test_empty_slots_hold_zeros_whatever_the_tokens_hold() -> None:
    case = Case(tokens=4, experts=4, selected=1, capacity=4, groups=1)
    index = np.zeros((1, 4, 1), np.int32)
    choices = Choices(np.zeros((1, 4, 4), np.float32), index, np.ones((1, 4, 1), np.float32), np.ones((1, 4), bool))
    x = np.full((1, 4, D), np.finfo(np.float32).max)
    for dispatcher in DISPATCHERS.values():
        slots = jax.jit(lambda x, d=dispatcher: d.dispatch(x, routing_of(choices, choices.gate, case.capacity)))(x)
        np.testing.assert_array_equal(slots[1:], 0)
        np.testing.assert_array_equal(slots[0], x)


def test_the_gather_form_has_no_scatter_in_either_direction() -> None:
    case = CASES["top-2"]
    choices = random_choices(case, seed=0)
    x, weights, _ = random_inputs(case)

    def loss(x: jax.Array, gate: jax.Array, weights: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(moe(x, gate, weights, choices=choices, capacity=case.capacity, form="gather")))

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, choices.gate, weights).compile()
    operations = count_operations(compiled)
    assert operations["gather"] > 0
    assert operations["scatter"] == 0


@pytest.mark.parametrize("name", ["top-2", "fewer tokens than experts", "capacity 1"])
def test_forms_agree_where_a_token_may_have_any_number_of_slots(name: str) -> None:
    case = CASES[name]
    rng = np.random.default_rng(0)
    # Expert choice: each expert some distinct tokens, and some slots empty.
    slot_token = np.stack(
        [[rng.permutation(case.tokens + 1)[: case.capacity] for _ in range(case.experts)] for _ in range(case.groups)]
    )
    gate = np.where(slot_token < case.tokens, rng.uniform(size=slot_token.shape), 0).astype(np.float32)
    x, weights, cotangent = random_inputs(case)

    def layer(x: jax.Array, gate: jax.Array, weights: jax.Array, form: str) -> jax.Array:
        sums, load = jnp.zeros(case.groups), jnp.zeros((case.groups, case.experts))
        nothing = RoutingMetrics(sums, sums, sums, load, sums, sums)
        routing = Routing(jnp.asarray(slot_token), gate, None, case.tokens, {}, nothing)
        hidden = jnp.tanh(jnp.einsum("egcd,edf->egcf", DISPATCHERS[form].dispatch(x, routing), weights))
        return DISPATCHERS[form].combine(hidden, routing)

    @partial(jax.jit, static_argnums=3)
    def run(x: jax.Array, gate: jax.Array, weights: jax.Array, form: str) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        out, pull = jax.vjp(partial(layer, form=form), x, gate, weights)
        return out, pull(jnp.asarray(cotangent))

    gathered, multiplied = (run(x, gate, weights, form) for form in ("gather", "einsum"))
    expected = np.zeros_like(x)
    for group, expert, slot in zip(*np.nonzero(slot_token < case.tokens), strict=True):
        token = slot_token[group, expert, slot]
        expected[group, token] += gate[group, expert, slot] * np.tanh(x[group, token] @ weights[expert])
    np.testing.assert_allclose(gathered[0], expected, rtol=1e-5, atol=1e-5)
    # float32 sums in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), gathered, multiplied)
