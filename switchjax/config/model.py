"""The section `model`: the network around the experts."""

from dataclasses import dataclass
from typing import Literal

from switchjax.config.checks import check_choice, check_choices, check_fraction, check_positive, require
from switchjax.config.layers import KINDS, Family, LayerKind

Activation = Literal["relu", "gelu", "gelu_exact", "geglu", "swiglu"]
Dtype = Literal["float32", "bfloat16"]
GATED = frozenset({"geglu", "swiglu"})
"""Activations with a gate, and so with a third matrix."""


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
    """Heads of keys and values, each shared by a group of query heads (grouped-query attention); 0: num_heads."""
    num_encoder_layers: int = 12
    num_decoder_layers: int = 12
    pattern: tuple[str, ...] = ("dense", "moe")
    """The layers of one period, which repeats to fill each stack. Kinds: dense, moe (experts for the feed-forward
    network), moe_dense (a dense feed-forward layer after such a one), switch_attention (experts for queries, keys and
    values), peer (PEER for the feed-forward network), base (a BASE layer alone, between two others); in a vision model
    also soft (soft MoE for the feed-forward network); in a recurrent model lstm, dense_only and moe_only (a
    feed-forward network between two others). See `switchjax.config.layers.KINDS`."""
    activation: Activation = "relu"
    """In feed-forward networks; gelu is the approximation by tanh, gelu_exact by erf; geglu and swiglu have a gate."""
    expert_activation: Literal[Activation, ""] = ""
    """In experts; empty: as `activation`."""
    norm: Literal["rms", "layer", "none"] = "rms"
    """Before each layer; rms subtracts no mean and adds no bias, layer is LayerNorm."""
    norm_epsilon: float = 1e-6
    """Added to the variance, or mean square, that a norm divides by."""
    biases: bool = False
    """Projections and feed-forward networks have biases."""
    positions: Literal["relative", "learned", "sinusoidal", "rotary", "none"] = "relative"
    """relative is T5's bias, shared by a stack's layers; learned and sinusoidal are added to the input."""
    max_length: int = 2048
    """learned: how many positions there are."""
    rotary_base: float = 10_000.0
    relative_buckets: int = 32
    relative_max_distance: int = 128
    sliding_window: int = 0
    """A causal query sees this many tokens, itself included; 0: all."""
    scale_scores: bool = False
    """Attention's scores over sqrt(d_head); T5 folds that into the initialisation of the queries."""
    tie_embeddings: bool = True
    scale_logits: bool = True
    """Tied logits over sqrt(d_model) (T5)."""
    embedding_stddev: float = 1.0
    """Standard deviation of token vectors and learned positions at initialisation."""
    d_lstm: int = 0
    """Cells of an LSTM layer, which a projection brings to d_model where they differ; 0: d_model."""
    image_size: int = 224
    """Pixels of a side."""
    image_channels: int = 3
    patch_size: int = 16
    num_classes: int = 1000
    pre_logits: bool = False
    """A tanh layer of d_model before the classes' logits."""
    dropout: float = 0.0
    scan_layers: bool = True
    """True: one compiled period in a loop. False: the loop unrolled (quickstart, CPU: 4 % faster)."""
    remat: Literal["none", "full", "dots", "exchange"] = "none"
    """What the backward pass computes again: all (full), all but matmuls (dots), all but all-to-alls (exchange)."""
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
        """True if experts have buffers that the tokens of a group share; those of PEER and soft MoE have none."""
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
        """The stacks of the family, each with its number of layers."""
        encoder, decoder = self.num_encoder_layers, self.num_decoder_layers
        if self.family == "encoder_decoder":
            return {"encoder": encoder, "decoder": decoder}
        return {"encoder": encoder} if self.family == "vision" else {"decoder": decoder}

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    def __post_init__(self) -> None:
        check_choices("model", self)
        sizes = ["vocab_size", "d_model", "d_ff", "num_heads", "d_head", "max_length", "rotary_base", "norm_epsilon"]
        sizes += ["embedding_stddev", "image_size", "image_channels", "patch_size", "num_classes"]
        check_positive("model", {name: getattr(self, name) for name in sizes})
        check_positive("model", {f"num_{stack}_layers": layers for stack, layers in self.stacks.items()})
        check_fraction("model", {"dropout": self.dropout})
        for name in ("num_kv_heads", "sliding_window", "d_lstm"):
            require(getattr(self, name) >= 0, f"model.{name} must not be negative, got {getattr(self, name)}")
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
            f"model.pattern={self.pattern}: the section moe can describe the experts of peer or soft layers or those "
            "behind a router, not both",
        )
        for stack, layers in self.stacks.items():
            require(
                layers % len(self.pattern) == 0,
                f"model.num_{stack}_layers={layers} is not a multiple of the {len(self.pattern)} layers of "
                "model.pattern",
            )

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
        # No published encoder-decoder of this family adds positions to its inputs.
        require(
            self.family != "encoder_decoder" or self.positions not in ("learned", "sinusoidal"),
            f"model.positions={self.positions} is for decoder_only and vision models",
        )
        require(
            self.family != "vision" or self.positions in ("learned", "none"),
            f"a vision model has positions learned or none, got model.positions={self.positions}",
        )
