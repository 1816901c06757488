"""Mixtral.

transformers 5.24 differs from switchjax as follows:

- The router multiplies in the model's dtype, here in float32; a float32 model has no difference.
- The load-balance loss covers all layers and rows together and is K at balance. Ours is computed for each layer and row
  and is 1 at balance, so its weight is K times `router_aux_loss_coef`. With one layer and one row they are equal.
- With K = 1, a token's gate would be 1, here its probability; such a model is refused.
- Files with fused experts (`save_pretrained(save_original_format=False)`) are not supported.
"""

from collections.abc import Mapping, Set
from typing import Any

from switchjax.config import Config, ModelConfig, UserError
from switchjax.interop.family import (
    LOGITS,
    MATRIX,
    NO_Z_LOSS,
    SAME,
    VECTORS,
    Family,
    Key,
    Rule,
    Table,
    Values,
    attention_rules,
)
from switchjax.moe.routers import loss_weights

_CONTEXT = 1024
"""Row length in the config of an imported model, unless the model allows fewer positions."""


def mixtral_table(model: ModelConfig) -> Table:
    """The tensors of Mixtral."""
    ours, theirs = "decoder/{layer}", "model.layers.{layer}"
    experts = f"{theirs}.block_sparse_moe.experts.{{expert}}"
    rules = (
        Rule("embedding/vectors", "model.embed_tokens.weight", VECTORS),
        Rule(f"{ours}/self_norm/scale", f"{theirs}.input_layernorm.weight", SAME),
        *attention_rules(f"{ours}/self_attention", f"{theirs}.self_attn", ("q_proj", "k_proj", "v_proj", "o_proj")),
        Rule(f"{ours}/ff_norm/scale", f"{theirs}.post_attention_layernorm.weight", SAME),
        Rule(f"{ours}/ff/router/logits", f"{theirs}.block_sparse_moe.gate.weight", MATRIX),
        Rule(f"{ours}/ff/experts/w_gate", f"{experts}.w1.weight", MATRIX),
        Rule(f"{ours}/ff/experts/w_out", f"{experts}.w2.weight", MATRIX),
        Rule(f"{ours}/ff/experts/w_in", f"{experts}.w3.weight", MATRIX),
        Rule("decoder/norm/scale", "model.norm.weight", SAME),
    )
    if model.tie_embeddings:
        return Table(rules, {"lm_head.weight": "model.embed_tokens.weight"})
    return Table((*rules, Rule("logits", "lm_head.weight", LOGITS)))


def _read(theirs: Mapping[str, Any], names: Set[str]) -> Values:
    del names
    heads, selected = theirs.get("num_attention_heads", 32), theirs.get("num_experts_per_tok", 2)
    if selected == 1:
        raise UserError("config.json: num_experts_per_tok=1 is not supported: transformers would set every gate to 1")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"config.json: rope_type={kind!r} is not supported, only 'default'")
    return NO_Z_LOSS | {
        "model.d_head": theirs.get("head_dim") or theirs.get("hidden_size", 4096) // heads,
        "model.num_kv_heads": theirs.get("num_key_value_heads", 8) or heads,
        "model.rotary_base": rope.get("rope_theta", theirs.get("rope_theta", 1e6)),
        "model.sliding_window": theirs.get("sliding_window") or 0,
        "model.scale_logits": False,
        "moe.num_selected_experts": selected,
        "moe.group_size": 0,
        "moe.loss_weights.load_balance_loss": selected * theirs.get("router_aux_loss_coef", 0.001),
        "data.objective": "causal",
        "data.num_sentinels": 0,
        "data.decoder_length": min(theirs.get("max_position_embeddings", 131_072), _CONTEXT),
    }


def _write(config: Config) -> Values:
    model, moe = config.model, config.moe
    if moe.num_selected_experts == 1:
        raise UserError("MixtralForCausalLM does not support moe.num_selected_experts=1: it would set every gate to 1")
    if model.tie_embeddings and model.scale_logits:
        raise UserError("MixtralForCausalLM does not scale the logits of tied embeddings: set model.scale_logits=False")
    return {
        "head_dim": model.d_head,
        "num_key_value_heads": model.kv_heads,
        "rope_theta": model.rotary_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "sliding_window": model.sliding_window or None,
        "num_experts_per_tok": moe.num_selected_experts,
        "max_position_embeddings": config.data.decoder_length,
        "router_aux_loss_coef": loss_weights(moe)["load_balance_loss"] / moe.num_selected_experts,
    }


MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    table=mixtral_table,
    keys=(
        Key("vocab_size", "model.vocab_size", 32000),
        Key("hidden_size", "model.d_model", 4096),
        Key("intermediate_size", "model.d_ff", 14336),
        Key("num_hidden_layers", "model.num_decoder_layers", 32),
        Key("num_attention_heads", "model.num_heads", 32),
        Key("rms_norm_eps", "model.norm_epsilon", 1e-5),
        Key("tie_word_embeddings", "model.tie_embeddings", False),
        Key("num_local_experts", "moe.num_experts", 8),
        Key("router_jitter_noise", "moe.jitter_noise", 0.0),
    ),
    theirs={"hidden_act": "silu", "attention_dropout": 0.0},
    ours={
        "model.family": "decoder_only",
        "model.pattern": ("moe",),
        "model.norm": "rms",
        "model.biases": False,
        "model.activation": "swiglu",
        "model.expert_activation": "",
        "model.positions": "rotary",
        "model.scale_scores": True,
        "model.dropout": 0.0,
        "moe.router": "top_k",
        "moe.options.normalize_gates": True,
        "moe.dropless": True,
        "moe.experts_per_layer": (),
        "moe.num_shared_experts": 0,
    },
    read=_read,
    write=_write,
)
