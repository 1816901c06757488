"""What a model takes, in plain arithmetic on its config: parameters, FLOPs, memory, communication.

Nothing is traced or compiled; `switchjax.planning.plan` asks the compiler the same questions.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from switchjax.accounting.training_cost import six_nd
from switchjax.accounting.weights import Weight, layer_weights, list_weights, slots_per_sequence
from switchjax.config import Config, Layer
from switchjax.config.model import GATED, ROUTED
from switchjax.models.scan_periods import scan_periods
from switchjax.parallel.mesh import DATA, EXPERT, MODEL
from switchjax.parallel.sharding import AXIS_RULES, partition_spec, sharded_spec

_BYTES = {"float32": 4, "bfloat16": 2}
_FACTORED_FROM = 128
"""Adafactor factors what has two dimensions of at least this size (optax's default)."""
_NO_ATTENTION = frozenset({"lstm", "dense_only", "moe_only", "base"})


@dataclass(frozen=True)
class DeviceBytes:
    """Memory of one device while it trains, in bytes."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """What layers keep for the backward pass; an estimate, as the compiler decides."""


@dataclass(frozen=True)
class Communication:
    """Bytes that one device puts into collectives in a train step."""

    all_to_all: int
    """Slots on their way to experts and back, forward and backward, and BASE's shuffle."""
    gradient_all_reduce: int
    """Gradients of weights that devices share, whole; where these are sharded, it is a reduce-scatter of as much."""


@dataclass(frozen=True)
class Accounting:
    """What a config's model takes."""

    parameters: Mapping[str, int]
    """By part; see `Weight.part`."""
    active_parameters: Mapping[str, int]
    """Those that a token meets."""
    forward_flops: int
    """Of a sequence, as the Switch Transformer's paper counts them: without routers, with keys and values of
    cross-attention charged at the decoder's length, and of attention's two products queries by keys alone."""
    computed_flops: Mapping[str, int]
    """Of a sequence in a training forward pass by part, every matrix product, of empty slots too."""
    training_flops: float
    """Of the whole run: forward and backward of all matrix products."""
    training_flops_6nd: float
    """Of the whole run, `6 N D` of each stack: N active parameters, D its tokens."""
    memory: DeviceBytes
    communication: Communication

    @property
    def total(self) -> int:
        """Parameters."""
        return sum(self.parameters.values())

    @property
    def active(self) -> int:
        """Parameters that a token meets."""
        return sum(self.active_parameters.values())


def account(config: Config, devices: int = 1) -> Accounting:
    """Accounts for a config on a mesh of `devices`, of which `mesh.data=-1` takes those that the other axes leave."""
    weights = list_weights(config)
    scores = _score_flops(config)
    computed = _by_part((weight.part, weight.computed_flops) for weight in weights)
    computed |= {"scores": scores, "values": scores} if scores else {}
    parameters = _by_part((weight.part, weight.size) for weight in weights)
    active = _by_part((weight.part, weight.active) for weight in weights)
    sequences = config.train.steps * config.data.batch_size
    return Accounting(
        parameters=parameters,
        active_parameters=active,
        forward_flops=sum(weight.flops for weight in weights if weight.part != "routers") + scores,
        computed_flops=computed,
        training_flops=3.0 * sum(computed.values()) * sequences,
        training_flops_6nd=sequences * _six_nd_of_a_sequence(config, sum(active.values())),
        memory=_memory(config, weights, mesh_axes(config, devices)),
        communication=_communication(config, weights, mesh_axes(config, devices)),
    )


def _six_nd_of_a_sequence(config: Config, active: int) -> float:
    """A token meets the layers of its own stack; what stands before and after them counts with the last stack."""
    layers = {
        stack: sum(weight.active for layer in config.layers(stack) for weight in layer_weights(config, stack, layer))
        for stack in config.model.stacks
    }
    ends = six_nd(active - sum(layers.values()), list(config.stack_lengths.values())[-1])
    return ends + sum(six_nd(layers[stack], length) for stack, length in config.stack_lengths.items())


def mesh_axes(config: Config, devices: int) -> dict[str, int]:
    """Sizes of the mesh axes."""
    mesh = config.mesh
    data = mesh.data if mesh.data > 0 else max(devices // (mesh.expert * mesh.model), 1)
    return {DATA: data, EXPERT: mesh.expert, MODEL: mesh.model}


def _by_part(values: Iterable[tuple[str, int]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for part, value in values:
        counts[part] += value
    return dict(counts)


class _Attended(NamedTuple):
    """A layer's attention: `queries` tokens to `keys` tokens."""

    queries: int
    keys: int


def _attentions(config: Config, stack: str, layer: Layer) -> list[_Attended]:
    if layer.kind in _NO_ATTENTION:
        return []
    length = config.stack_lengths[stack]
    cross = stack == "decoder" and config.model.family == "encoder_decoder"
    return [_Attended(length, length), *([_Attended(length, config.data.encoder_length)] if cross else [])]


def _score_flops(config: Config) -> int:
    """FLOPs of a sequence's queries by its keys, every pair of tokens counted; values by weights take as many."""
    width = config.model.num_heads * config.model.d_head
    return sum(
        2 * attended.queries * attended.keys * width
        for stack in config.model.stacks
        for layer in config.layers(stack)
        for attended in _attentions(config, stack, layer)
    )


def _divided(axes: Mapping[str, int], mesh: Mapping[str, int], sharded: bool = False) -> list[int]:
    """The dimensions of a device's part of a weight; where it is `sharded`, of the part that the device keeps."""
    names = [axis if axis in AXIS_RULES else None for axis in axes]
    spec = sharded_spec(*names) if sharded else partition_spec(*names)
    parts = [prod(mesh[axis] for axis in ((used,) if isinstance(used, str) else used or ())) for used in spec]
    return [-(-size // count) for size, count in zip(axes.values(), parts, strict=True)]


def _memory(config: Config, weights: list[Weight], mesh: Mapping[str, int]) -> DeviceBytes:
    adamw = config.optimizer.name == "adamw"
    parameters = optimizer = 0
    for weight in weights:
        kept = _divided(weight.axes, mesh, config.mesh.sharded == "parameters")
        shape = _divided(weight.axes, mesh, config.mesh.sharded != "none")
        width = _BYTES[weight.dtype or config.model.param_dtype]
        parameters += prod(kept) * width
        optimizer += (2 * prod(shape) if adamw else _adafactor_numbers(list(weight.axes.values()), shape)) * width
    return DeviceBytes(parameters, parameters, optimizer, _activation_bytes(config, mesh))


def _adafactor_numbers(shape: list[int], local: list[int]) -> int:
    """Second moments of a weight: whole, or a row and a column of averages over its two largest dimensions."""
    order = sorted(range(len(shape)), key=lambda axis: shape[axis])
    if len(shape) < 2 or shape[order[-2]] < _FACTORED_FROM:
        return prod(local) + 2  # optax keeps a number in the place of what it does not need
    return prod(local) // local[order[-1]] + prod(local) // local[order[-2]] + 1


class _Kept(NamedTuple):
    """Numbers that a layer keeps for the backward pass, a sequence."""

    whole: int = 0
    """Of the residual stream's width."""
    sliced: int = 0
    """Of heads and of the hidden layers of feed-forward networks, which the mesh axis `model` divides."""


def _kept(config: Config, stack: str, layer: Layer) -> _Kept:
    """Inputs of norms and matrix products, attention's weights, hidden layers before and after their activation."""
    model, length = config.model, config.stack_lengths[stack]
    heads, shared = model.num_heads * model.d_head, model.kv_heads * model.d_head
    whole = sliced = 0
    for queries, keys in _attentions(config, stack, layer):
        whole += 2 * queries * model.d_model
        sliced += 2 * queries * heads + 2 * keys * shared + model.num_heads * queries * keys
    if layer.kind == "lstm":
        return _Kept(length * (2 * model.d_model + 6 * model.lstm_cells))
    whole += 2 * length * model.d_model
    hidden = model.d_ff * (3 if model.activation in GATED else 2)
    if layer.kind in ("moe", "moe_dense", "moe_only", "base"):
        slots = slots_per_sequence(config, layer.num_experts, length)
        whole += 2 * slots * model.d_model
        sliced += slots * model.d_ff * (3 if model.experts_activation in GATED else 2)
    if layer.kind in ("dense", "dense_only", "moe_dense", "switch_attention"):
        sliced += length * hidden
    return _Kept(whole, sliced)


def _activation_bytes(config: Config, mesh: Mapping[str, int]) -> int:
    numbers = 0
    for stack, length in config.stack_lengths.items():
        for run in scan_periods(config.layers(stack)):
            kept = [_kept(config, stack, layer) for layer in run.period]
            period = sum(layer.whole + layer.sliced // mesh[MODEL] for layer in kept)
            # Recomputed, a period keeps its input alone, and one at a time all the rest.
            carried = length * config.model.d_model * run.repeats
            numbers += period * run.repeats if config.model.remat == "none" else carried + period
    return numbers * _local_rows(config, mesh) * _BYTES[config.model.dtype]


def _local_rows(config: Config, mesh: Mapping[str, int]) -> int:
    """Sequences of a device in a micro-batch."""
    return -(-config.data.batch_size // (config.train.accumulation_steps * mesh[DATA] * mesh[EXPERT]))


def _communication(config: Config, weights: list[Weight], mesh: Mapping[str, int]) -> Communication:
    shards = mesh[DATA] * mesh[EXPERT]
    reduced = 0
    for weight in weights:
        if (mesh[DATA] if "expert" in weight.axes else shards) > 1:
            reduced += prod(_divided(weight.axes, mesh)) * _BYTES[weight.dtype or config.model.param_dtype]
    layers = [
        (config.stack_lengths[stack], layer)
        for stack in config.model.stacks
        for layer in config.layers(stack)
        if layer.kind in ROUTED and layer.kind != "peer"
    ]
    exchanged = sum(_exchanged(config, layer, length, mesh) for length, layer in layers)
    rows = _local_rows(config, mesh) * config.train.accumulation_steps
    return Communication(exchanged * rows * _BYTES[config.model.dtype], reduced)


def _exchanged(config: Config, layer: Layer, length: int, mesh: Mapping[str, int]) -> int:
    """Numbers of a sequence that a layer sends through all-to-alls in a step, those that stay at home included."""
    model = config.model
    # There and back, in the forward and in the backward pass; once more where that computes the exchange again.
    times = 3 if model.remat in ("full", "dots") else 2
    exchanged = 0
    if mesh[EXPERT] > 1:
        slots, width = slots_per_sequence(config, layer.num_experts, length), model.num_heads * model.d_head
        widths = 2 * model.d_model + 3 * width if layer.kind == "switch_attention" else 2 * model.d_model
        exchanged += times * slots * widths
    if layer.kind == "base" and mesh[DATA] * mesh[EXPERT] > 1:
        exchanged += times * 2 * length * model.d_model
    return exchanged
