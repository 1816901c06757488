"""The section `model`: the network around the experts."""

from dataclasses import dataclass
from typing import Literal

from switchjax.config.checks import check_choice, check_choices, check_fraction, check_positive, require

Activation = Literal["relu", "gelu", "gelu_exact", "geglu", "swiglu"]
Dtype = Literal["float32", "bfloat16"]
GATED = frozenset({"geglu", "swiglu"})
"""Activations with a gate, and so with a third matrix."""

_ATTENTION = ("dense", "moe", "moe_dense", "switch_attention", "base", "peer")

KINDS: dict[str, tuple[str, ...]] = {
    "encoder_decoder": _ATTENTION,
    "decoder_only": _ATTENTION,
    "vision": ("dense", "moe"),
    "recurrent": ("lstm", "dense_only", "moe_only"),
}
"""Family -> the kinds of layers that `model.pattern` may name."""
ROUTED = frozenset({"moe", "moe_dense", "moe_only", "switch_attention", "base", "peer"})
"""Kinds with experts."""


@dataclass(frozen=True)
class ModelConfig:
    """The network around the experts. `switchjax/__init__.py` has the legend of its sizes."""

    family: Literal["encoder_decoder", "decoder_only", "vision", "recurrent"] = "encoder_decoder"
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
    values), peer (PEER for the feed-forward network), base (a BASE layer alone, between two others); of a recurrent
    model: lstm, dense_only and moe_only (a feed-forward network between two others)."""
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
    def has_experts(self) -> bool:
        """Whether any layer is routed."""
        return any(kind in ROUTED for kind in self.pattern)

    @property
    def routes_groups(self) -> bool:
        """Whether experts have buffers that the tokens of a group share; PEER's have none."""
        return self.has_experts and "peer" not in self.pattern

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
        for kind in self.pattern:
            check_choice("model.pattern", kind, KINDS[self.family])
        require(
            len({kind == "peer" for kind in self.pattern if kind in ROUTED}) < 2,
            "model.pattern names peer and other layers with experts: moe.num_experts can be that of one of them only",
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
