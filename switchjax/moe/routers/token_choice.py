"""Routers in which each token chooses the K experts that it scores highest."""

import jax
import jax.numpy as jnp

from switchjax.config import MoEConfig
from switchjax.moe.choice import gates_of, select_experts, token_choice
from switchjax.moe.routing import Routing, Tokens, Weights, project


def route_switch(weights: Weights, tokens: Tokens, config: MoEConfig) -> Routing:
    """Switch Transformer's top-1 routing (section 2.1): `y = p_e(x) E_e(x)`, e the argmax of `p = softmax(x W_r)`.

    The gate multiplies although there is one expert only: through it the router gets the language model's gradient.
    """
    logits = project(tokens.x, weights["logits"])
    probs = jax.nn.softmax(logits, axis=-1)
    expert_index = select_experts(tokens, config, logits)
    return token_choice(tokens, config, logits=logits, probs=probs, gates=probs, expert_index=expert_index)


def route_top_k(weights: Weights, tokens: Tokens, config: MoEConfig) -> Routing:
    """The K most probable experts; gates are their probabilities, over their sum where `moe.normalize_gates`.

    Normalised, this is the softmax over the K chosen logits alone (Mixtral); not, the softmax before the choice.
    A single expert's gate is its probability either way: over its sum it would be 1, and without gradient.
    """
    logits = project(tokens.x, weights["logits"])
    probs = jax.nn.softmax(logits, axis=-1)
    expert_index = select_experts(tokens, config, logits)
    gates = probs
    if config.normalize_gates and config.num_selected_experts > 1:
        gates = probs / jnp.sum(gates_of(probs, expert_index), axis=-1, keepdims=True)
    return token_choice(tokens, config, logits=logits, probs=probs, gates=gates, expert_index=expert_index)


def route_gshard(weights: Weights, tokens: Tokens, config: MoEConfig) -> Routing:
    """GShard's top-2 (Lepikhin et al. 2020, algorithm 1).

    Gates g1 and g2 are the two probabilities over their sum. In training the second expert is kept with probability
    `min(1, 2 g2)`; a choice given up is not counted as dropped, and g1 stays as it is. Load balance counts first
    choices.
    """
    logits = project(tokens.x, weights["logits"])
    probs = jax.nn.softmax(logits, axis=-1)
    expert_index = select_experts(tokens, config, logits)
    gates = probs / jnp.sum(gates_of(probs, expert_index), axis=-1, keepdims=True)
    taken = None
    if tokens.training:
        second = gates_of(gates, expert_index)[..., 1]
        draw = tokens.random("second expert", lambda key: jax.random.uniform(key, second.shape[1:]))
        taken = jnp.stack([jnp.ones_like(draw, bool), draw < 2 * second], axis=-1)
    return token_choice(
        tokens, config, logits=logits, probs=probs, gates=gates, expert_index=expert_index, taken=taken, counted=1
    )


def route_st_moe(weights: Weights, tokens: Tokens, config: MoEConfig) -> Routing:
    """ST-MoE's top-2 (Zoph et al. 2022): GShard's gates, the second expert only if its gate exceeds a threshold.

    The threshold is `moe.second_expert_threshold`, in training and in evaluation; to be trained with the router z-loss.
    """
    logits = project(tokens.x, weights["logits"])
    probs = jax.nn.softmax(logits, axis=-1)
    expert_index = select_experts(tokens, config, logits)
    gates = probs / jnp.sum(gates_of(probs, expert_index), axis=-1, keepdims=True)
    second = gates_of(gates, expert_index)[..., 1]
    taken = jnp.stack([jnp.ones_like(second, bool), second > config.second_expert_threshold], axis=-1)
    return token_choice(
        tokens, config, logits=logits, probs=probs, gates=gates, expert_index=expert_index, taken=taken, counted=1
    )
