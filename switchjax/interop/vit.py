"""The Vision Transformer with its classifier.

transformers computes GELU with erf and reads images that an image processor has scaled. Here models read bytes and
scale them to [-1, 1], like a processor with mean and standard deviation 0.5.
"""

from collections.abc import Mapping, Set
from typing import Any

from switchjax.config import Config, ModelConfig, UserError
from switchjax.interop.family import (
    ACTIVATIONS,
    MATRIX,
    NO_Z_LOSS,
    SAME,
    Family,
    Key,
    Rule,
    Table,
    Values,
    attention_rules,
    our_activation,
    their_activation,
)

_ATTENTION = ("attention.attention.query", "attention.attention.key", "attention.attention.value")
_NAMES = (*_ATTENTION, "attention.output.dense")


def vit_table(model: ModelConfig) -> Table:
    """The tensors of ViTForImageClassification."""
    del model
    ours, theirs = "encoder/{layer}", "vit.encoder.layer.{layer}"
    biases = zip(("query_bias", "key_bias", "value_bias"), _ATTENTION, strict=True)
    return Table(
        (
            Rule("class_token", "vit.embeddings.cls_token", "d -> 1 1 d"),
            Rule("positions", "vit.embeddings.position_embeddings", "n d -> 1 n d"),
            Rule("patches", "vit.embeddings.patch_embeddings.projection.weight", "(p q c) d -> d c p q"),
            Rule("patches_bias", "vit.embeddings.patch_embeddings.projection.bias", SAME),
            *_norm(f"{ours}/self_norm", f"{theirs}.layernorm_before"),
            *attention_rules(f"{ours}/self_attention", theirs, _NAMES),
            *(Rule(f"{ours}/self_attention/{o}", f"{theirs}.{t}.bias", "h a -> (h a)") for o, t in biases),
            Rule(f"{ours}/self_attention/out_bias", f"{theirs}.attention.output.dense.bias", SAME),
            *_norm(f"{ours}/ff_norm", f"{theirs}.layernorm_after"),
            Rule(f"{ours}/ff/w_in", f"{theirs}.intermediate.dense.weight", MATRIX),
            Rule(f"{ours}/ff/b_in", f"{theirs}.intermediate.dense.bias", SAME),
            Rule(f"{ours}/ff/w_out", f"{theirs}.output.dense.weight", MATRIX),
            Rule(f"{ours}/ff/b_out", f"{theirs}.output.dense.bias", SAME),
            *_norm("encoder/norm", "vit.layernorm"),
            Rule("head", "classifier.weight", MATRIX),
            Rule("head_bias", "classifier.bias", SAME),
        )
    )


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [Rule(f"{ours}/scale", f"{theirs}.weight", SAME), Rule(f"{ours}/shift", f"{theirs}.bias", SAME)]


def _read(theirs: Mapping[str, Any], names: Set[str]) -> Values:
    del names
    dropout = theirs.get("hidden_dropout_prob", 0.0)
    if theirs.get("attention_probs_dropout_prob", 0.0) != dropout:
        raise UserError("config.json: attention_probs_dropout_prob must equal hidden_dropout_prob")
    labels = theirs.get("id2label")
    return NO_Z_LOSS | {
        "model.dropout": dropout,
        "model.d_head": theirs.get("hidden_size", 768) // theirs.get("num_attention_heads", 12),
        "model.activation": our_activation(theirs.get("hidden_act", "gelu"), ACTIVATIONS, "hidden_act"),
        "model.num_classes": theirs.get("num_labels", 2) if labels is None else len(labels),
        "data.objective": "classification",
        "data.corpora": ("imagenet2012",),
    }


def _write(config: Config) -> Values:
    model = config.model
    if model.num_heads * model.d_head != model.d_model:
        raise UserError("ViTForImageClassification needs model.num_heads * model.d_head = model.d_model")
    labels = {str(i): f"LABEL_{i}" for i in range(model.num_classes)}
    return {
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.dropout,
        "hidden_act": their_activation(model.activation, ACTIVATIONS),
        "id2label": labels,
        "label2id": {label: int(i) for i, label in labels.items()},
    }


VIT = Family(
    architecture="ViTForImageClassification",
    table=vit_table,
    keys=(
        Key("hidden_size", "model.d_model", 768),
        Key("intermediate_size", "model.d_ff", 3072),
        Key("num_hidden_layers", "model.num_encoder_layers", 12),
        Key("num_attention_heads", "model.num_heads", 12),
        Key("layer_norm_eps", "model.norm_epsilon", 1e-12),
        Key("image_size", "model.image_size", 224),
        Key("patch_size", "model.patch_size", 16),
        Key("num_channels", "model.image_channels", 3),
    ),
    theirs={"qkv_bias": True},
    ours={
        "model.family": "vision",
        "model.pattern": ("dense",),
        "model.norm": "layer",
        "model.biases": True,
        "model.positions": "learned",
        "model.scale_scores": True,
        "model.num_kv_heads": 0,
        "model.sliding_window": 0,
        "model.pre_logits": False,
    },
    read=_read,
    write=_write,
)
