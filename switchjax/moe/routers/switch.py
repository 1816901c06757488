"""Switch: each token goes to the one expert with the highest probability."""

import jax

from switchjax.config import MoEConfig
from switchjax.moe.capacity import token_choice
from switchjax.moe.choice import router_logits, select_experts
from switchjax.moe.routing import NoOptions, Router, Routing, Tokens, Weights


def route_switch(weights: Weights, tokens: Tokens, config: MoEConfig, options: NoOptions) -> Routing:
    """Switch Transformer's top-1 routing (section 2.1): `y = p_e(x) E_e(x)`, e the argmax of `p = softmax(x W_r)`.

    Through the gate, the router receives the gradient of the language model's loss.
    """
    logits = router_logits(tokens.x, weights["logits"])
    probs = jax.nn.softmax(logits, axis=-1)
    expert_index = select_experts(tokens, config, logits)
    return token_choice(tokens, config, logits=logits, probs=probs, gates=probs, expert_index=expert_index)


SWITCH = Router(route_switch, selected=(1,))
