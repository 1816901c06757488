"""GShard: two experts per token, the second one at random."""

import jax
import jax.numpy as jnp

from switchjax.config import MoEConfig
from switchjax.moe.capacity import token_choice
from switchjax.moe.choice import normalize_over_chosen, router_logits, select_experts, values_of_chosen
from switchjax.moe.routing import NoOptions, Router, Routing, Tokens, Weights


def route_gshard(weights: Weights, tokens: Tokens, config: MoEConfig, options: NoOptions) -> Routing:
    """GShard's top-2 (Lepikhin et al. 2020, algorithm 1).

    The gates g1 and g2 are the two probabilities divided by their sum. In training, the second expert is kept with
    probability `min(1, 2 g2)`; otherwise g1 does not change, and the choice does not count as dropped. The load-balance
    loss counts first choices only.
    """
    logits = router_logits(tokens.x, weights["logits"])
    probs = jax.nn.softmax(logits, axis=-1)
    expert_index = select_experts(tokens, config, logits)
    gates = normalize_over_chosen(probs, expert_index)
    taken = None
    if tokens.training:
        second = values_of_chosen(gates, expert_index)[..., 1]
        draw = tokens.random("second expert", lambda key: jax.random.uniform(key, second.shape[1:]))
        taken = jnp.stack([jnp.ones_like(draw, bool), draw < 2 * second], axis=-1)
    return token_choice(
        tokens, config, logits=logits, probs=probs, gates=gates, expert_index=expert_index, taken=taken, counted=1
    )


GSHARD = Router(route_gshard, selected=(2,))
