"""Expert choice: each expert takes the tokens with the highest scores for it."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from switchjax.config import MoEConfig, UserError
from switchjax.moe.choice import router_logits
from switchjax.moe.losses import router_z_loss, sum_metrics
from switchjax.moe.routing import NoOptions, Router, Routing, Tokens, Weights


def check_expert_choice(config: MoEConfig, options: NoOptions) -> None:
    """Raises a `UserError` for ragged dispatch, which needs the K experts that each token chose."""
    if config.dispatch == "ragged":
        raise UserError(
            "moe.dispatch=ragged needs a router in which tokens choose: "
            "with moe.router=expert_choice, set moe.dispatch=gather"
        )


def route_expert_choice(weights: Weights, tokens: Tokens, config: MoEConfig, options: NoOptions) -> Routing:
    """`p = softmax(x W_r)` over experts; each expert takes its C most probable tokens (Zhou et al. 2022, section 3).

    C = S c / E, where the capacity factor c (2 in the paper) is the mean number of experts per token. Balance is always
    perfect, so load_balance_loss is 1 and has no gradient. A token counts as dropped if no expert takes it.
    """
    logits = router_logits(tokens.x, weights["logits"])
    probs = jax.nn.softmax(logits, axis=-1)
    num_tokens = probs.shape[1]
    scores = jnp.where(tokens.mask[..., None], probs, -1.0).swapaxes(1, 2)
    value, slot_token = jax.lax.top_k(scores, tokens.capacity)
    filled = value >= 0
    slot_token = jnp.where(filled, slot_token, num_tokens)
    taken = jnp.any(jax.nn.one_hot(slot_token, num_tokens, dtype=bool), axis=(1, 2))
    # Dropped tokens are counted here as if each token made one choice; expert_load counts what experts took.
    metrics = sum_metrics(
        probs, jnp.argmax(probs, axis=-1, keepdims=True), tokens.mask[..., None], jnp.sum(taken, axis=1), tokens.mask
    )
    return Routing(
        slot_token=slot_token,
        slot_gate=jnp.where(filled, value, 0.0),
        token_slot=None,
        num_tokens=num_tokens,
        losses={"load_balance_loss": metrics.tokens, "router_z_loss": router_z_loss(logits, tokens.mask)},
        metrics=replace(metrics, expert_load=jnp.sum(filled, axis=-1, dtype=jnp.float32)),
    )


EXPERT_CHOICE = Router(
    route_expert_choice,
    selected=(1,),
    noncausal="an expert that takes a later token has no room for an earlier one",
    check=check_expert_choice,
)
