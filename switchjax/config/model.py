"""The section `model`: the network around the experts."""

from dataclasses import dataclass
from typing import Literal

from switchjax.config.checks import (
    check_choice,
    check_choices,
    check_fraction,
    check_not_negative,
    check_positive,
    require,
)
from switchjax.config.layers import KINDS, Family, LayerKind

Activation = Literal["relu", "gelu", "gelu_exact", "geglu", "swiglu"]
Dtype = Literal["float32", "bfloat16"]
GATED = frozenset({"geglu", "swiglu"})
"""Activations with a gate, which is a third matrix."""


@dataclass(frozen=True)
class ModelConfig:
    """The network around the experts. `switchjax/__init__.py` has the legend of its sizes."""

    family: Family = "encoder_decoder"
    """vision is an encoder of image patches, recurrent a decoder of LSTM layers."""
    vocab_size: int = 32128
    d_model: int = 768
    d_ff: int = 3072
    num_heads: int = 12
    d_head: int = 64
    num_kv_heads: int = 0
    """Heads of keys and values; a group of query heads shares each (grouped-query attention). 0: num_heads."""
    num_encoder_layers: int = 12
    num_decoder_layers: int = 12
    pattern: tuple[str, ...] = ("dense", "moe")
    """The layers of one period, which repeats to fill each stack. Kinds: dense; moe (experts as the feed-forward
    network); moe_dense (moe, then a dense feed-forward layer); switch_attention (experts for queries, keys and values);
    peer (PEER as the feed-forward network); base (only a BASE layer, between two others). In a vision model also soft
    (soft MoE as the feed-forward network); in a recurrent model lstm, and dense_only and moe_only (only a feed-forward
    network). See `switchjax.config.layers.KINDS`."""
    activation: Activation = "relu"
    """In feed-forward networks; gelu is the tanh approximation, gelu_exact uses erf; geglu and swiglu have a gate."""
    expert_activation: Literal[Activation, ""] = ""
    """In experts; empty: the same as `activation`."""
    norm: Literal["rms", "layer", "none"] = "rms"
    """Before each layer; rms subtracts no mean and adds no bias, layer is LayerNorm."""
    norm_epsilon: float = 1e-6
    """Added to the variance or mean square in a norm's denominator."""
    biases: bool = False
    """If true, projections and feed-forward networks have biases."""
    positions: Literal["relative", "learned", "sinusoidal", "rotary", "none"] = "relative"
    """relative is T5's bias, shared by a stack's layers; learned and sinusoidal are added to the input."""
    max_length: int = 2048
    """learned: number of positions."""
    rotary_base: float = 10_000.0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    sliding_window: int = 0
    """Number of tokens that a causal query sees, itself included; 0: all."""
    scale_scores: bool = False
    """If true, divide attention scores by sqrt(d_head); T5 scales the queries' initial weights instead."""
    tie_embeddings: bool = True
    scale_logits: bool = True
    """If true, divide tied logits by sqrt(d_model) (T5)."""
    embedding_stddev: float = 1.0
    """Standard deviation of token vectors and learned positions at initialisation."""
    d_lstm: int = 0
    """Cells of an LSTM layer; if they are not d_model, a projection follows. 0: d_model."""
    image_size: int = 224
    """Height and width in pixels."""
    image_channels: int = 3
    patch_size: int = 16
    num_classes: int = 1000
    pre_logits: bool = False
    """If true, a tanh layer of width d_model comes before the logits of the classes."""
    dropout: float = 0.0
    scan_layers: bool = True
    """True: compile one period and loop over it. False: unroll the loop (quickstart, CPU: 4 % faster)."""
    remat: Literal["none", "full", "dots", "exchange"] = "none"
    """The backward pass recomputes everything (full), all but matmuls (dots) or all but all-to-alls (exchange)."""
    dtype: Dtype = "float32"
    param_dtype: Dtype = "float32"

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The layers of one period."""
        return tuple(KINDS[kind] for kind in self.pattern)

    @property
    def has_experts(self) -> bool:
        """True if any layer has experts."""
        return any(kind.has_experts for kind in self.kinds)

    @property
    def routes_groups(self) -> bool:
        """True if the tokens of a group share buffers of experts, unlike in PEER and soft MoE."""
        return any(kind.routes_groups for kind in self.kinds)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.num_kv_heads or self.num_heads

    @property
    def lstm_cells(self) -> int:
        """Cells of an LSTM layer."""
        return self.d_lstm or self.d_model

    @property
    def experts_activation(self) -> Activation:
        """Activation inside an expert."""
        return self.expert_activation or self.activation

    @property
    def stacks(self) -> dict[str, int]:
        """The stacks of the family -> number of layers."""
        encoder, decoder = self.num_encoder_layers, self.num_decoder_layers
        if self.family == "encoder_decoder":
            return {"encoder": encoder, "decoder": decoder}
        return {"encoder": encoder} if self.family == "vision" else {"decoder": decoder}

    @property
    def num_patches(self) -> int:
        """Number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    def __post_init__(self) -> None:
        check_choices("model", self)
        sizes = ["vocab_size", "d_model", "d_ff", "num_heads", "d_head", "max_length", "rotary_base", "norm_epsilon"]
        sizes += ["embedding_stddev", "image_size", "image_channels", "patch_size", "num_classes"]
        check_positive("model", {name: getattr(self, name) for name in sizes})
        check_positive("model", {f"num_{stack}_layers": layers for stack, layers in self.stacks.items()})
        check_fraction("model", {"dropout": self.dropout})
        check_not_negative(
            "model", {name: getattr(self, name) for name in ("num_kv_heads", "sliding_window", "d_lstm")}
        )
        self._check_layers()
        self._check_positions()
        require(
            self.num_heads % self.kv_heads == 0,
            f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}",
        )
        require(
            self.image_size % self.patch_size == 0,
            f"model.image_size={self.image_size} is not a multiple of model.patch_size={self.patch_size}",
        )

    def _check_layers(self) -> None:
        require(len(self.pattern) > 0, "model.pattern must name at least one layer")
        known = [name for name, kind in KINDS.items() if self.family in kind.families]
        for name in self.pattern:
            check_choice("model.pattern", name, known)
        parts = {kind.feed_forward for kind in self.kinds if kind.has_experts}
        require(
            len(parts) < 2 or parts.isdisjoint({"peer", "soft"}),
            f"model.pattern={self.pattern}: the section moe describes either the experts of peer or soft layers or "
            "experts with a router, not both",
        )
        period = len(self.pattern)
        for stack, layers in self.stacks.items():
            message = f"model.num_{stack}_layers={layers} is not a multiple of the {period} layers of model.pattern"
            require(layers % period == 0, message)

    def _check_positions(self) -> None:
        require(
            self.relative_buckets >= 4 and self.relative_buckets % 2 == 0,
            f"model.relative_buckets must be even and at least 4, got {self.relative_buckets}",
        )
        require(
            self.relative_max_distance > self.relative_buckets // 2,
            f"model.relative_max_distance={self.relative_max_distance} must exceed half of model.relative_buckets",
        )
        require(
            self.positions != "rotary" or self.d_head % 2 == 0,
            f"model.positions=rotary turns pairs of numbers: model.d_head={self.d_head} must be even",
        )
        plain = self.positions in ("relative", "none") and self.kv_heads == self.num_heads
        require(
            "switch_attention" not in self.pattern or (plain and not self.biases and not self.scale_scores),
            "model.pattern: switch_attention is T5's attention: positions relative or none, no biases, "
            "no shared heads, no scale_scores",
        )
        # No published encoder-decoder of this kind adds positions to its inputs.
        require(
            self.family != "encoder_decoder" or self.positions not in ("learned", "sinusoidal"),
            f"model.positions={self.positions} is for decoder_only and vision models",
        )
        require(
            self.family != "vision" or self.positions in ("learned", "none"),
            f"a vision model has positions learned or none, got model.positions={self.positions}",
        )
