"""Every weight of a config's model, written down from the architecture: how large, and how often a sequence uses it.

Parameter counts, FLOPs, bytes and communication all follow from this one list
(`switchjax.accounting.accounting`). It is the second opinion on the modules of `switchjax.models`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import isqrt, prod

from switchjax.config import Config, Layer, ModelConfig, from_mapping
from switchjax.config.model import GATED
from switchjax.moe.capacity import capacity_of
from switchjax.moe.peer import PEEROptions
from switchjax.moe.routers import router_options


@dataclass(frozen=True)
class Weight:
    """A weight that the gradient trains."""

    part: str
    """embeddings, positions, patches, attention, feed_forward, experts, routers, lstm, norms or logits."""
    axes: Mapping[str, int]
    """Logical axis -> size, under the names by which `AXIS_RULES` lays it over a mesh."""
    uses: int = 0
    """Vectors of a sequence that are multiplied by it, by one expert's share each; 0 for what is added or looked up."""
    computed: int = field(default=-1)
    """As many as a program multiplies: with the empty slots of experts, and all keys of cross-attention; -1: `uses`."""
    selected: int = 1
    """Experts of a token."""
    dtype: str = ""
    """Where it is not `model.param_dtype`."""

    @property
    def size(self) -> int:
        """Numbers in it."""
        return prod(self.axes.values())

    @property
    def active(self) -> int:
        """Of these, how many a token meets."""
        return self.size * self.selected // self.axes.get("expert", 1)

    @property
    def flops(self) -> int:
        """FLOPs of a sequence, two a multiplication and addition."""
        return 2 * self.uses * self.size // self.axes.get("expert", 1)

    @property
    def computed_flops(self) -> int:
        """FLOPs of a sequence in a program."""
        computed = self.uses if self.computed < 0 else self.computed
        return 2 * computed * self.size // self.axes.get("expert", 1)


def list_weights(config: Config) -> list[Weight]:
    """All weights of the model, layer by layer."""
    return [*_ends(config), *(weight for stack in config.model.stacks for weight in _stack(config, stack))]


def experts_per_token(config: Config) -> int:
    """Experts that a token meets in a layer; where experts choose, on average."""
    if "peer" in config.model.pattern:
        return config.moe.num_selected_experts * from_mapping(PEEROptions, config.moe.options, "moe.options").peer_heads
    if config.moe.router == "expert_choice":
        return round(config.moe.num_selected_experts * config.moe.train_capacity_factor)
    return config.moe.num_selected_experts


def slots_per_sequence(config: Config, num_experts: int, length: int) -> int:
    """Slots of all experts of a layer that belong to a sequence of `length` tokens in training, filled or not."""
    moe = config.moe
    if moe.dispatch == "ragged":
        return length * moe.num_selected_experts
    group = moe.tokens_per_group(config.data.batch_size // config.train.accumulation_steps, length)
    capacity = capacity_of(moe, num_experts, group, training=True)
    if moe.router == "base":  # in training, whatever the capacity
        capacity = -(-group // num_experts)
    return num_experts * capacity * length // group


def _ends(config: Config) -> Iterator[Weight]:
    """What stands before and after the stacks."""
    model, width = config.model, {"embed": config.model.d_model}
    if model.family == "vision":
        pixels = {"pixels": model.patch_size**2 * model.image_channels}
        yield from _linear(model, "patches", pixels, width, model.num_patches)
        yield Weight("positions", width)  # the class token
        if model.positions == "learned":
            yield Weight("positions", {"position": model.num_patches + 1, **width})
        if model.pre_logits:
            yield from _linear(model, "logits", width, {"width": model.d_model}, 1)
        yield from _linear(model, "logits", width, {"classes": model.num_classes}, 1)
        return
    vocabulary, targets = {"vocab": model.vocab_size}, config.data.decoder_length
    yield Weight("embeddings", {**vocabulary, **width}, targets if model.tie_embeddings else 0)
    if not model.tie_embeddings:
        yield Weight("logits", {**width, **vocabulary}, targets)
    if model.positions == "learned":
        yield Weight("positions", {"position": model.max_length, **width})


def _stack(config: Config, stack: str) -> Iterator[Weight]:
    model = config.model
    if model.positions == "relative":
        yield Weight("positions", {"heads": model.num_heads, "bucket": model.relative_buckets})
    for layer in config.layers(stack):
        yield from layer_weights(config, stack, layer)
    yield from _norm(model)


def layer_weights(config: Config, stack: str, layer: Layer) -> Iterator[Weight]:
    """The weights of one layer of a stack."""
    model, length, kind = config.model, config.stack_lengths[stack], layer.kind
    if kind == "base":
        yield from _moe(config, layer, length)
        for _ in range(_NORM_VECTORS[model.norm]):  # each expert has a norm of its own
            axes = {"expert": layer.num_experts, "embed": model.d_model}
            yield Weight("experts", axes, selected=experts_per_token(config))
        return
    yield from _norm(model)
    if kind == "lstm":
        yield from _lstm(model, length)
        return
    if not kind.endswith("_only"):
        yield from _switch_attention(config, layer, length) if kind == "switch_attention" else _attention(model, length)
        if stack == "decoder" and model.family == "encoder_decoder":
            yield from _norm(model)
            yield from _attention(model, length, context=config.data.encoder_length)
        yield from _norm(model)  # of the feed-forward layer; an LSTM model's has the first one to itself
    if kind.startswith("moe"):
        yield from _moe(config, layer, length)
    if kind == "peer":
        yield from _peer(config, layer, length)
    if kind == "moe_dense":
        yield from _norm(model)
    if kind in ("dense", "dense_only", "switch_attention", "moe_dense"):
        yield from _feed_forward(model, "feed_forward", model.activation, model.d_ff, length)


_NORM_VECTORS = {"rms": 1, "layer": 2, "none": 0}
"""Scale and shift of a norm."""


def _norm(model: ModelConfig) -> Iterator[Weight]:
    for _ in range(_NORM_VECTORS[model.norm]):
        yield Weight("norms", {"embed": model.d_model})


def _linear(
    model: ModelConfig,
    part: str,
    inputs: Mapping[str, int],
    outputs: Mapping[str, int],
    uses: int,
    computed: int = -1,
) -> Iterator[Weight]:
    """A matrix, and a bias if the model has them."""
    yield Weight(part, {**inputs, **outputs}, uses, computed)
    if model.biases:
        yield Weight(part, outputs)


def _attention(model: ModelConfig, length: int, context: int = -1) -> Iterator[Weight]:
    """Projections of queries, keys, values and outputs; cross-attention takes keys and values of `context` tokens."""
    width = {"embed": model.d_model}
    heads, shared = ({"heads": count, "head": model.d_head} for count in (model.num_heads, model.kv_heads))
    yield from _linear(model, "attention", width, heads, length)
    for _ in ("keys", "values"):
        yield from _linear(model, "attention", width, shared, length, context)
    yield from _linear(model, "attention", heads, width, length)


def _switch_attention(config: Config, layer: Layer, length: int) -> Iterator[Weight]:
    """Experts for queries, and others for keys and values."""
    model, experts = config.model, layer.num_experts
    heads = {"heads": model.num_heads, "head": model.d_head}
    for outputs in (prod(heads.values()), 2 * prod(heads.values())):
        yield from _router(config, experts, length)
        yield _expert_weight(config, experts, length, {"embed": model.d_model, "outputs": outputs})
    yield Weight("attention", {**heads, "embed": model.d_model}, length)


def _feed_forward(
    model: ModelConfig,
    part: str,
    activation: str,
    d_ff: int,
    uses: int,
    computed: int = -1,
    experts: Mapping[str, int] | None = None,
    selected: int = 1,
) -> Iterator[Weight]:
    stacked, width, hidden = experts or {}, {"embed": model.d_model}, {"mlp": d_ff}
    for matrix in [{**width, **hidden}] * (2 if activation in GATED else 1) + [{**hidden, **width}]:
        yield Weight(part, {**stacked, **matrix}, uses, computed, selected)
    for bias in (hidden, width) if model.biases else ():
        yield Weight(part, {**stacked, **bias}, selected=selected)


def _moe(config: Config, layer: Layer, length: int) -> Iterator[Weight]:
    model, moe, experts = config.model, config.moe, layer.num_experts
    activation, selected = model.experts_activation, experts_per_token(config)
    slots = slots_per_sequence(config, experts, length)
    yield from _router(config, experts, length)
    yield from _feed_forward(
        model, "experts", activation, model.d_ff, length * selected, slots, {"expert": experts}, selected
    )
    if moe.num_shared_experts and layer.kind != "base":
        width = model.d_ff * moe.num_shared_experts
        yield from _feed_forward(model, "feed_forward", activation, width, length)
        if moe.shared_mixing == "learned":
            yield Weight("routers", {"embed": model.d_model, "mixed": 2}, length, dtype="float32")
            yield Weight("routers", {"mixed": 2}, dtype="float32")


def _expert_weight(config: Config, experts: int, length: int, axes: Mapping[str, int]) -> Weight:
    selected, slots = experts_per_token(config), slots_per_sequence(config, experts, length)
    return Weight("experts", {"expert": experts, **axes}, length * selected, slots, selected)


def _router(config: Config, experts: int, length: int) -> Iterator[Weight]:
    """What the router learns; tables of ids and balancing biases are set, not learned."""
    groups = getattr(router_options(config.moe), "num_expert_groups", 1)
    matrices = {
        "noisy_top_k": (experts, experts),
        "hierarchical": (experts, experts, groups, groups),
        "reinforced": (experts, 1),
        "hash": (),
    }
    for columns in matrices.get(config.moe.router, (experts,)):
        yield Weight("routers", {"embed": config.model.d_model, "column": columns}, length, dtype="float32")


def _peer(config: Config, layer: Layer, length: int) -> Iterator[Weight]:
    model, options = config.model, from_mapping(PEEROptions, config.moe.options, "moe.options")
    query = {"peer_heads": options.peer_heads, "halves": 2, "half": options.peer_query // 2}
    yield Weight("routers", {"embed": model.d_model, **query}, length, dtype="float32")
    for _ in ("scale", "bias"):
        yield Weight("routers", query, dtype="float32")
    sub_keys = {"halves": 2, "side": isqrt(layer.num_experts), "half": options.peer_query // 2}
    yield Weight("routers", sub_keys, length * options.peer_heads, dtype="float32")
    selected = experts_per_token(config)
    for _ in ("down", "up"):
        rows = {"expert": layer.num_experts, "embed": model.d_model}
        yield Weight("experts", rows, length * selected, selected=selected)


def _lstm(model: ModelConfig, length: int) -> Iterator[Weight]:
    gates = {"gate": 4, "cell": model.lstm_cells}
    for _ in ("input", "hidden"):
        yield Weight("lstm", {"embed": model.d_model, **gates}, length)
    yield Weight("lstm", gates)
    if model.lstm_cells != model.d_model:
        yield Weight("lstm", {"cell": model.lstm_cells, "embed": model.d_model}, length)
