"""T5, v1.0 and v1.1.

v1.0 ties embeddings and scales logits by `d_model^-0.5`; v1.1 does neither. Since version 5, transformers'
`tie_word_embeddings` tells whether logits are scaled, and embeddings are tied unless the file holds an lm_head.
"""

from collections.abc import Mapping, Set
from typing import Any

from switchjax.config import Config, ModelConfig
from switchjax.config.model import GATED
from switchjax.interop.family import (
    ACTIVATIONS,
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
    our_activation,
    their_activation,
)

TOKENS = {"is_encoder_decoder": True, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
KEYS = (
    Key("vocab_size", "model.vocab_size", 32128),
    Key("d_kv", "model.d_head", 64),
    Key("d_ff", "model.d_ff", 2048),
    Key("relative_attention_num_buckets", "model.relative_buckets", 32),
    Key("relative_attention_max_distance", "model.relative_max_distance", 128),
    Key("dropout_rate", "model.dropout", 0.1),
    Key("layer_norm_epsilon", "model.norm_epsilon", 1e-6),
)
OURS = {
    "model.family": "encoder_decoder",
    "model.norm": "rms",
    "model.biases": False,
    "model.positions": "relative",
    "model.scale_scores": False,
    "model.num_kv_heads": 0,
    "model.sliding_window": 0,
}
_ACTIVATIONS = ACTIVATIONS | {"gated-gelu": "geglu", "gated-gelu_new": "geglu", "gated-silu": "swiglu"}


def t5_table(model: ModelConfig) -> Table:
    """The tensors of T5 or, if layers have experts, of Switch Transformers."""
    rules = [
        Rule("embedding/vectors", "shared.weight", VECTORS),
        *_stack(model, "encoder", ff_layer=1),
        *_stack(model, "decoder", ff_layer=2),
        *_attention("decoder/{layer}/cross", "decoder.block.{layer}.layer.1", "EncDecAttention"),
    ]
    copies = {f"{stack}.embed_tokens.weight": "shared.weight" for stack in ("encoder", "decoder")}
    if model.tie_embeddings:
        copies["lm_head.weight"] = "shared.weight"
    else:
        rules.append(Rule("logits", "lm_head.weight", LOGITS))
    # With untied embeddings, transformers' Switch has a table for each stack; T5 shares one in any case.
    written = () if model.tie_embeddings or not model.has_experts else tuple(copies)
    unused = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
    return Table(tuple(rules), copies, written, unused)


def _stack(model: ModelConfig, stack: str, ff_layer: int) -> list[Rule]:
    """The rules of a stack without cross-attention. T5 and Switch Transformers name feed-forward layers differently."""
    ours, theirs = f"{stack}/{{layer}}", f"{stack}.block.{{layer}}.layer"
    ff = f"{theirs}.{ff_layer}.{'mlp' if model.has_experts else 'DenseReluDense'}"
    bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    return [
        Rule(f"{stack}/bias/bias", bias, "h b -> b h"),
        *_attention(f"{ours}/self", f"{theirs}.0", "SelfAttention"),
        Rule(f"{ours}/ff_norm/scale", f"{theirs}.{ff_layer}.layer_norm.weight", SAME),
        *_feed_forward(model, f"{ours}/ff", ff),
        Rule(f"{ours}/ff/router/logits", f"{ff}.router.classifier.weight", MATRIX),
        *_feed_forward(model, f"{ours}/ff/experts", f"{ff}.experts.expert_{{expert}}"),
        Rule(f"{stack}/norm/scale", f"{stack}.final_layer_norm.weight", SAME),
    ]


def _attention(ours: str, theirs: str, name: str) -> list[Rule]:
    norm = Rule(f"{ours}_norm/scale", f"{theirs}.layer_norm.weight", SAME)
    return [norm, *attention_rules(f"{ours}_attention", f"{theirs}.{name}", ("q", "k", "v", "o"))]


def _feed_forward(model: ModelConfig, ours: str, theirs: str) -> list[Rule]:
    gated = model.activation in GATED
    w_in = Rule(f"{ours}/w_in", f"{theirs}.{'wi_1' if gated else 'wi'}.weight", MATRIX)
    gate = [Rule(f"{ours}/w_gate", f"{theirs}.wi_0.weight", MATRIX)] if gated else []
    return [w_in, *gate, Rule(f"{ours}/w_out", f"{theirs}.wo.weight", MATRIX)]


def _read(theirs: Mapping[str, Any], names: Set[str]) -> Values:
    since_5 = "scale_decoder_outputs" in theirs
    tied = theirs.get("tie_word_embeddings") is not False
    scale = theirs["scale_decoder_outputs"] if since_5 else tied
    layers = theirs.get("num_layers", 6)
    return NO_Z_LOSS | {
        "model.num_encoder_layers": layers,
        "model.num_decoder_layers": theirs.get("num_decoder_layers") or layers,
        "model.pattern": ("dense",),
        "model.activation": our_activation(theirs.get("feed_forward_proj", "relu"), _ACTIVATIONS, "feed_forward_proj"),
        "model.scale_logits": scale,
        "model.tie_embeddings": scale or (since_5 and "lm_head.weight" not in names),
    }


def _write(config: Config) -> Values:
    model = config.model
    return TOKENS | {
        "num_layers": model.num_encoder_layers,
        "num_decoder_layers": model.num_decoder_layers,
        "feed_forward_proj": their_activation(model.activation, _ACTIVATIONS),
        "tie_word_embeddings": model.tie_embeddings,
        "scale_decoder_outputs": model.tie_embeddings and model.scale_logits,
    }


T5 = Family(
    architecture="T5ForConditionalGeneration",
    table=t5_table,
    keys=(*KEYS, Key("d_model", "model.d_model", 512), Key("num_heads", "model.num_heads", 8)),
    theirs={},
    ours=OURS | {"model.pattern": ("dense",)},
    read=_read,
    write=_write,
)
