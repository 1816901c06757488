"""Top-K: each token goes to the K experts with the highest probability."""

from dataclasses import dataclass

import jax

from switchjax.config import MoEConfig
from switchjax.moe.capacity import token_choice
from switchjax.moe.choice import normalize_over_chosen, router_logits, select_experts
from switchjax.moe.routing import Router, Routing, Tokens, Weights


@dataclass(frozen=True)
class TopKOptions:
    """Options of router top_k."""

    normalize_gates: bool = True
    """Gates of a token's K > 1 experts sum to 1."""


def route_top_k(weights: Weights, tokens: Tokens, config: MoEConfig, options: TopKOptions) -> Routing:
    """Selects the K most probable experts; gates are their probabilities, divided by their sum if `normalize_gates`.

    Normalised gates equal the softmax over the K chosen logits (Mixtral). For K = 1 the gate is never normalised: it
    would be 1 and have no gradient.
    """
    logits = router_logits(tokens.x, weights["logits"])
    gates = probs = jax.nn.softmax(logits, axis=-1)
    expert_index = select_experts(tokens, config, logits)
    if options.normalize_gates and config.num_selected_experts > 1:
        gates = normalize_over_chosen(probs, expert_index)
    return token_choice(tokens, config, logits=logits, probs=probs, gates=gates, expert_index=expert_index)


TOP_K = Router(route_top_k, options=TopKOptions)
