"""V-MoE: gates are the K highest probabilities under noise of a fixed size, without normalisation."""

import jax
import jax.numpy as jnp

from switchjax.config import MoEConfig
from switchjax.moe.capacity import token_choice
from switchjax.moe.choice import is_chosen, router_logits, select_experts
from switchjax.moe.losses import importance_loss, load_loss
from switchjax.moe.routers.noisy_top_k import IMPORTANCE, add_noise, highest
from switchjax.moe.routing import NoOptions, Router, Routing, Tokens, Weights


def route_v_moe(weights: Weights, tokens: Tokens, config: MoEConfig, options: NoOptions) -> Routing:
    """V-MoE's routing (Riquelme et al. 2021, section 2.1 and appendix A).

    In training, the logits get noise of standard deviation 1 / E. Gates are the K highest of all E probabilities, never
    renormalised. Importance sums the probabilities of all experts without noise. The threshold of the load is the K-th
    highest noisy logit, which may be the expert's own, as in the released code.
    """
    clean, std = router_logits(tokens.x, weights["logits"]), 1 / config.num_experts
    noisy = add_noise(tokens, clean, jnp.full_like(clean, std))
    probs = jax.nn.softmax(noisy, axis=-1)
    expert_index = select_experts(tokens, config, noisy)
    if tokens.training:
        threshold = highest(noisy, config.num_selected_experts)[..., -1:]
        load = jax.scipy.stats.norm.cdf((clean - threshold) / std)
    else:
        load = is_chosen(expert_index, config.num_experts).astype(jnp.float32)
    return token_choice(
        tokens,
        config,
        logits=clean,
        probs=probs,
        gates=probs,
        expert_index=expert_index,
        losses={
            "importance_loss": importance_loss(jax.nn.softmax(clean, axis=-1), tokens.mask),
            "load_loss": load_loss(load, tokens.mask),
        },
    )


V_MOE = Router(route_v_moe, losses=IMPORTANCE)
