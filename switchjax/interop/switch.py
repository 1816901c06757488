"""Switch Transformers.

transformers 5.24 differs from its names, or from switchjax, as follows:

- `expert_capacity` is the number of slots for each row, whatever the row's length, in training and evaluation. It
  equals `moe.expert_capacity` with `moe.group_size=0`. transformers has no capacity factor: `to-hf` writes the slots of
  an encoder's row in evaluation, with a warning.
- The layer's output for a dropped token is 0, as here. Before version 4.51 it was the input times the gate; from 5.0 to
  the repair of the router in 2026, no token was dropped.
- Padding is routed like other tokens and counts in the router's losses, whatever `router_ignore_padding_tokens` is.
  Padding on the right of a row takes no slot from the row's tokens.
- `router_aux_loss_coef` and `router_z_loss_coef` weight the sum of the encoder's and the decoder's losses. Our weights
  are for the mean over layers, hence twice as large. transformers' load-balance loss covers all layers of a stack
  together, which equals ours if a stack has one sparse layer. A stack with experts in every layer adds none. Both
  losses count only with `output_router_logits`.
- `encoder_sparse_step` decides which layers have experts; without it, layers / `num_sparse_encoder_layers` does.
- The router computes in `router_dtype`, float32 as here, but selects the expert by probabilities rounded to the model's
  dtype. In a float32 model, its jitter also changes the experts' input.
- With `tie_word_embeddings=False`, each stack has its own embeddings, which must be equal for `from-hf`.
- Decoding with a cache routes one token at a time and therefore drops none.
"""

import logging
from collections.abc import Mapping, Set
from typing import Any

from switchjax.config import Config, UserError
from switchjax.interop.family import ACTIVATIONS, NO_Z_LOSS, Family, Key, Values, our_activation, their_activation
from switchjax.interop.patterns import find_pattern, sparse_kinds, sparse_step
from switchjax.interop.t5 import KEYS, OURS, TOKENS, t5_table
from switchjax.moe.capacity import capacity_of
from switchjax.moe.routers import loss_weights

_log = logging.getLogger(__name__)


def _read(theirs: Mapping[str, Any], names: Set[str]) -> Values:
    del names
    layers = theirs.get("num_layers", 12)
    depths = {"encoder": layers, "decoder": theirs.get("num_decoder_layers") or layers}
    steps = {stack: _step(theirs, stack, n) for stack, n in depths.items()}
    pattern = find_pattern([sparse_kinds(n, steps[stack]) for stack, n in depths.items()])
    if "moe" not in pattern:
        raise UserError("config.json: no layer has experts: use model_type=t5")
    tied = theirs.get("tie_word_embeddings", True)
    return NO_Z_LOSS | {
        "model.num_encoder_layers": depths["encoder"],
        "model.num_decoder_layers": depths["decoder"],
        "model.pattern": pattern,
        "model.activation": our_activation(theirs.get("dense_act_fn", "relu"), ACTIVATIONS, "dense_act_fn"),
        "model.tie_embeddings": tied,
        "model.scale_logits": tied,
        "moe.expert_dropout": theirs.get("dropout_rate", 0.1),
        "moe.group_size": 0,
        "moe.expert_capacity": theirs.get("expert_capacity", 64),
        "moe.loss_weights.load_balance_loss": 2 * theirs.get("router_aux_loss_coef", 0.001),
        "moe.loss_weights.router_z_loss": 2 * theirs.get("router_z_loss_coef", 0.001),
    }


def _step(theirs: Mapping[str, Any], stack: str, num_layers: int) -> int:
    num_sparse = theirs.get(f"num_sparse_{stack}_layers", 3)
    return theirs.get(f"{stack}_sparse_step", num_layers // num_sparse if num_sparse > 0 else num_layers)


def _write(config: Config) -> Values:
    model, moe = config.model, config.moe
    if model.tie_embeddings and not model.scale_logits:
        raise UserError(
            "Hugging Face's Switch Transformers scale the logits of tied embeddings: set model.scale_logits=True"
        )
    stacks = {stack: tuple(layer.kind for layer in config.layers(stack)) for stack in model.stacks}
    steps = {stack: sparse_step(kinds) for stack, kinds in stacks.items()}
    return TOKENS | {
        "num_layers": model.num_encoder_layers,
        "num_decoder_layers": model.num_decoder_layers,
        **{f"{stack}_sparse_step": step for stack, step in steps.items()},
        **{f"num_sparse_{stack}_layers": kinds.count("moe") for stack, kinds in stacks.items()},
        "dense_act_fn": their_activation(model.activation, ACTIVATIONS),
        "tie_word_embeddings": model.tie_embeddings,
        "expert_capacity": _expert_capacity(config),
        "router_aux_loss_coef": loss_weights(moe)["load_balance_loss"] / 2,
        "router_z_loss_coef": loss_weights(moe)["router_z_loss"] / 2,
    }


def _expert_capacity(config: Config) -> int:
    """The number of slots per expert for a row."""
    moe, length = config.moe, config.data.encoder_length
    if moe.expert_capacity and moe.group_size == 0 and not moe.dropless:
        return moe.expert_capacity
    capacity = capacity_of(moe, moe.num_experts, length, training=False)
    _log.warning("expert_capacity=%d, the slots of an encoder row of %d tokens, is fixed there", capacity, length)
    return capacity


SWITCH = Family(
    architecture="SwitchTransformersForConditionalGeneration",
    table=t5_table,
    keys=(
        *KEYS,
        Key("d_model", "model.d_model", 768),
        Key("num_heads", "model.num_heads", 12),
        Key("num_experts", "moe.num_experts", 8),
        Key("router_jitter_noise", "moe.jitter_noise", 0.01),
    ),
    theirs={
        "router_bias": False,
        "router_dtype": "float32",
        "router_type": "tokens_masked",
        "batch_prioritized_routing": False,
        "num_selected_experts": 1,
    },
    ours=OURS
    | {
        "model.expert_activation": "",
        "moe.router": "switch",
        "moe.num_selected_experts": 1,
        "moe.experts_per_layer": (),
        "moe.fill_order": "first_come",
        "moe.no_token_left_behind": 0,
        "moe.num_shared_experts": 0,
    },
    read=_read,
    write=_write,
)
