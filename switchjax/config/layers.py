"""The kinds of layers that `model.pattern` names: one table that everything else uses."""

from typing import Literal, NamedTuple

Family = Literal["encoder_decoder", "decoder_only", "vision", "recurrent"]


class LayerKind(NamedTuple):
    """The parts of a layer; `switchjax.models.blocks` has a class for each block and feed-forward layer."""

    families: tuple[Family, ...]
    """Families of models whose stacks may have this kind."""
    block: str = "transformer"
    """transformer (attention, then a feed-forward layer), lstm, between (a feed-forward layer alone, between two LSTM
    layers) or base (a BASE layer alone)."""
    feed_forward: str = ""
    """dense, moe, peer or soft."""
    routed_attention: bool = False
    """Experts for queries, keys and values."""
    extra_dense: bool = False
    """A second, dense feed-forward layer at the end."""

    @property
    def has_experts(self) -> bool:
        """True if any part has experts."""
        return self.feed_forward in ("moe", "peer", "soft") or self.routed_attention or self.block == "base"

    @property
    def routes_groups(self) -> bool:
        """True if the tokens of a group share the experts' buffers."""
        return self.has_experts and self.feed_forward not in ("peer", "soft")


_TEXT: tuple[Family, ...] = ("encoder_decoder", "decoder_only")

KINDS: dict[str, LayerKind] = {
    "dense": LayerKind((*_TEXT, "vision"), feed_forward="dense"),
    "moe": LayerKind((*_TEXT, "vision"), feed_forward="moe"),
    "moe_dense": LayerKind(_TEXT, feed_forward="moe", extra_dense=True),
    "switch_attention": LayerKind(_TEXT, feed_forward="dense", routed_attention=True),
    "peer": LayerKind(_TEXT, feed_forward="peer"),
    # A slot mixes all tokens of a sequence, so soft MoE is neither for decoders nor for packed texts.
    "soft": LayerKind(("vision",), feed_forward="soft"),
    "base": LayerKind(_TEXT, block="base"),
    "lstm": LayerKind(("recurrent",), block="lstm"),
    "dense_only": LayerKind(("recurrent",), block="between", feed_forward="dense"),
    "moe_only": LayerKind(("recurrent",), block="between", feed_forward="moe"),
}


class Layer(NamedTuple):
    """One layer of a stack: its kind, a name in `KINDS`, and its number of experts (0: none)."""

    kind: str
    num_experts: int
