"""Runs a router by its name on random tokens."""

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from switchjax.config import MoEConfig
from switchjax.moe.routers import ROUTERS, router_options
from switchjax.moe.routing import RouterSizes, Routing, Tokens

D = 6
VOCAB = 32


def router_config(name: str, **changes: Any) -> MoEConfig:
    """A config that the router accepts: K = 2 if allowed, by default 4 experts."""
    known = ROUTERS[name].selected
    selected = 2 if known is None else known[0]
    return MoEConfig(**({"router": name, "num_experts": 4, "num_selected_experts": selected} | changes))


def random_weights(config: MoEConfig, seed: int = 0) -> dict[str, jax.Array]:
    """The router's weights; trained ones are drawn again at random, so that none is 0."""
    sizes = RouterSizes(D, config.num_experts, VOCAB)
    weights = ROUTERS[config.router].weights(sizes, router_options(config), jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(rng.normal(size=w.value.shape), jnp.float32) if w.trained else w.value
        for name, w in weights.items()
    }


def random_tokens(
    groups: int = 2, tokens: int = 16, capacity: int = 16, padding: float = 0.0, seed: int = 0, training: bool = False
) -> Tokens:
    """Normal tokens with random ids, about `padding` of them padding."""
    rng = np.random.default_rng(seed)
    return Tokens(
        x=jnp.asarray(rng.normal(size=(groups, tokens, D)), jnp.float32),
        mask=jnp.asarray(rng.uniform(size=(groups, tokens)) >= padding),
        capacity=capacity,
        ids=jnp.asarray(rng.integers(1, VOCAB, size=(groups, tokens)), jnp.int32),
        keys=jax.random.split(jax.random.key(seed), groups) if training else None,
    )


@cache
def compiled(config: MoEConfig) -> Any:
    """The router of a config, jitted: `(weights, tokens) -> Routing`."""
    route, options = ROUTERS[config.router].route, router_options(config)
    return jax.jit(lambda weights, tokens: route(weights, tokens, config, options))


def route(config: MoEConfig, tokens: Tokens, weights: dict[str, jax.Array] | None = None) -> Routing:
    """Routes `tokens`, by default with random weights."""
    return compiled(config)(random_weights(config) if weights is None else weights, tokens)


def chosen_experts(routing: Routing) -> np.ndarray:
    """The expert of each choice [G, S, K]; E for a choice without a slot."""
    assert routing.token_slot is not None
    return np.asarray(routing.token_slot) // routing.slot_token.shape[2]


def token_gates(routing: Routing) -> np.ndarray:
    """Each token's weight for each expert [G, S, E]; 0 if the token has no slot there."""
    groups, experts, capacity = routing.slot_token.shape
    gates = np.zeros((groups, routing.num_tokens + 1, experts), np.float32)
    slot_token, slot_gate = np.asarray(routing.slot_token), np.asarray(routing.slot_gate)
    for group in range(groups):
        for expert in range(experts):
            for slot in range(capacity):
                gates[group, slot_token[group, expert, slot], expert] += slot_gate[group, expert, slot]
    return gates[:, :-1]


def logits_of(config: MoEConfig, tokens: Tokens) -> np.ndarray:
    """`x W_r` with the random weights, in float64."""
    return np.asarray(tokens.x, np.float64) @ np.asarray(random_weights(config)["logits"], np.float64)


def softmax(logits: np.ndarray) -> np.ndarray:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def probabilities(config: MoEConfig, tokens: Tokens) -> np.ndarray:
    """`softmax(x W_r)` with the random weights, in float64."""
    return softmax(logits_of(config, tokens))


def best(scores: np.ndarray, selected: int) -> np.ndarray:
    """The experts with the highest scores, best first."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :selected]


def skewed(tokens: Tokens, config: MoEConfig) -> Tokens:
    """The tokens moved until most prefer the same expert."""
    towards = random_weights(config)["logits"][:, 0]
    return dataclasses.replace(tokens, x=tokens.x + towards[None, None])
