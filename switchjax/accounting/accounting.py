"""Counts a model's parameters, FLOPs, memory and communication from the shapes of its modules.

It traces the model (`switchjax.accounting.traced_model`) and allocates or compiles nothing. Memory and communication
are estimates here; `switchjax.planning.plan` asks the compiler about them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from switchjax.accounting.traced_model import TracedWeight, trace_model
from switchjax.config import Config
from switchjax.models.scan_periods import scan_periods
from switchjax.parallel.mesh import DATA, EXPERT, MODEL
from switchjax.parallel.sharding import partition_spec, sharded_spec

_BYTES = {"float32": 4, "bfloat16": 2}
_FACTORED_FROM = 128
"""Adafactor factors weights with two dimensions of at least this size (optax's default)."""


@dataclass(frozen=True)
class DeviceBytes:
    """Memory of one device while it trains, in bytes."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """Arrays that layers keep for the backward pass; an estimate, as the compiler decides."""


@dataclass(frozen=True)
class Communication:
    """Bytes that one device sends through collectives in a train step."""

    all_to_all: int
    """Slots on their way to experts and back, in forward and backward pass, and BASE's shuffle."""
    gradient_all_reduce: int
    """Whole gradients of weights that devices share; with sharded parameters, a reduce-scatter of as many bytes."""


@dataclass(frozen=True)
class Accounting:
    """The costs of a config's model."""

    parameters: Mapping[str, int]
    """Part (`TracedWeight.part`) -> number of parameters."""
    active_parameters: Mapping[str, int]
    """Part -> number of parameters that a token uses."""
    forward_flops: int
    """FLOPs of a sequence as the Switch Transformer's paper counts them: without routers, with cross-attention's keys
    and values at the decoder's length, and with queries by keys as the only one of attention's two products."""
    computed_flops: Mapping[str, int]
    """Part of the weight -> FLOPs of a sequence in all matrix products of a training forward pass, including empty
    slots; `activations` are products without a weight (attention's scores and values, one-hot dispatch, balancing)."""
    training_flops: float
    """FLOPs of the whole run: forward and backward pass of all matrix products."""
    training_flops_6nd: float
    """FLOPs of the whole run as `6 N D` of each stack (Kaplan et al. 2020): N active parameters, D tokens."""
    memory: DeviceBytes
    communication: Communication

    @property
    def total(self) -> int:
        """Number of parameters."""
        return sum(self.parameters.values())

    @property
    def active(self) -> int:
        """Number of parameters that a token uses."""
        return sum(self.active_parameters.values())


def account(config: Config, devices: int = 1) -> Accounting:
    """Counts the costs of a config on a mesh of `devices`; `mesh.data=-1` takes those that the other axes leave.

    Raises:
        UserError: if the config has no model, or its model cannot take its batches.
    """
    model, mesh = trace_model(config), mesh_axes(config, devices)
    trained = [weight for weight in model.weights if weight.trained]
    computed = _by_part((weight.part, weight.computed_flops) for weight in model.weights if weight.computed_flops)
    computed |= {"activations": model.activation_flops} if model.activation_flops else {}
    lengths = config.stack_lengths
    last = list(lengths.values())[-1]  # weights outside of the stacks count with the last stack
    sequences = config.train.steps * config.data.batch_size
    return Accounting(
        parameters=_by_part((weight.part, weight.size) for weight in trained),
        active_parameters=_by_part((weight.part, weight.active) for weight in trained),
        forward_flops=sum(_papers_flops(config, weight) for weight in trained),
        computed_flops=computed,
        training_flops=3.0 * sum(computed.values()) * sequences,
        training_flops_6nd=6 * sequences * sum(w.active * lengths.get(w.stack, last) for w in trained),
        memory=_memory(config, trained, mesh),
        communication=_communication(config, trained, mesh),
    )


def mesh_axes(config: Config, devices: int) -> dict[str, int]:
    """Mesh axis -> its size."""
    mesh = config.mesh
    data = mesh.data if mesh.data > 0 else max(devices // (mesh.expert * mesh.model), 1)
    return {DATA: data, EXPERT: mesh.expert, MODEL: mesh.model}


def _by_part(values: Iterable[tuple[str, int]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for part, value in values:
        counts[part] += value
    return dict(counts)


def _papers_flops(config: Config, weight: TracedWeight) -> int:
    """FLOPs of a sequence for `Accounting.forward_flops`; attention's scores count with its output weight."""
    if weight.part == "routers" or not weight.computed_flops:
        return 0
    if not weight.stack:
        return weight.computed_flops
    scores = weight.layers * _attention_weights(config, weight) * 2 * weight.axis("head")
    return 2 * config.stack_lengths[weight.stack] * weight.active + scores


def _attention_weights(config: Config, weight: TracedWeight) -> int:
    """Query-key pairs in all heads of a sequence and layer if `weight` is attention's output weight, otherwise 0."""
    if weight.axes != ("heads", "head", "embed"):
        return 0
    queries = config.stack_lengths[weight.stack]
    keys = config.data.encoder_length if "cross_attention" in weight.name else queries
    return weight.axis("heads") * queries * keys


def _divided(weight: TracedWeight, mesh: Mapping[str, int], sharded: bool = False) -> list[int]:
    """The shape of a device's part of a layer's weight: the part in use, or if `sharded` the part that it stores."""
    spec = (sharded_spec if sharded else partition_spec)(*weight.axes)
    parts = [prod(mesh[axis] for axis in ((used,) if isinstance(used, str) else used or ())) for used in spec]
    return [-(-size // count) for size, count in zip(weight.shape, parts, strict=True)]


def _memory(config: Config, weights: Sequence[TracedWeight], mesh: Mapping[str, int]) -> DeviceBytes:
    parameters = optimizer = 0
    for weight in weights:
        width = weight.dtype.itemsize * weight.layers
        parameters += prod(_divided(weight, mesh, config.mesh.sharded == "parameters")) * width
        local = _divided(weight, mesh, config.mesh.sharded != "none")
        moments = 2 * prod(local) if config.optimizer.name == "adamw" else _adafactor_numbers(weight.shape, local)
        optimizer += moments * width
    return DeviceBytes(parameters, parameters, optimizer, _activation_bytes(config, weights, mesh))


def _adafactor_numbers(shape: Sequence[int], local: list[int]) -> int:
    """Numbers in a weight's second moments: all, or averages over each of its two largest dimensions."""
    order = sorted(range(len(shape)), key=lambda axis: shape[axis])
    if len(shape) < 2 or shape[order[-2]] < _FACTORED_FROM:
        return prod(local) + 2  # optax keeps one number in place of each unused average
    return prod(local) // local[order[-1]] + prod(local) // local[order[-2]] + 1


def _activation_bytes(config: Config, weights: Sequence[TracedWeight], mesh: Mapping[str, int]) -> int:
    """Bytes of inputs of norms and matrix products, attention weights, and hidden layers around their activation."""
    recomputed = config.model.remat != "none"
    layers = [weight for weight in weights if weight.stack]
    numbers = sum(_kept(config, weight, mesh) * (1 if recomputed else weight.layers) for weight in layers)
    if recomputed:  # a period keeps only its input; one period at a time keeps all the rest
        for stack, length in config.stack_lengths.items():
            periods = sum(run.repeats for run in scan_periods(config.layers(stack)))
            numbers += length * config.model.d_model * periods
    return numbers * _local_rows(config, mesh) * _BYTES[config.model.dtype]


def _kept(config: Config, weight: TracedWeight, mesh: Mapping[str, int]) -> int:
    """Numbers of a sequence that one layer keeps because of this weight: a norm's input and output, or a matrix
    product's input or output unless it is the residual stream. The mesh axis `model` divides heads and hidden layers.
    """
    if weight.part == "norms" and weight.name.endswith("/scale"):
        return 2 * config.stack_lengths[weight.stack] * config.model.d_model
    if weight.part == "routers" or not weight.computed_flops:
        return 0
    sizes = zip(weight.axes, _divided(weight, mesh), strict=True)
    hidden = weight.vectors * prod(size for axis, size in sizes if axis not in ("expert", "embed"))
    return hidden + weight.slot_numbers + _attention_weights(config, weight) // mesh[MODEL]


def _local_rows(config: Config, mesh: Mapping[str, int]) -> int:
    """Sequences on a device in a micro-batch."""
    return -(-config.data.batch_size // (config.train.accumulation_steps * mesh[DATA] * mesh[EXPERT]))


def _communication(config: Config, weights: Sequence[TracedWeight], mesh: Mapping[str, int]) -> Communication:
    model, shards = config.model, mesh[DATA] * mesh[EXPERT]
    reduced = exchanged = 0
    for weight in weights:
        if (mesh[DATA] if "expert" in weight.axes else shards) > 1:
            reduced += prod(_divided(weight, mesh)) * weight.layers * weight.dtype.itemsize
    if mesh[EXPERT] > 1:
        exchanged += sum(weight.layers * weight.slot_numbers for weight in weights)
    if shards > 1:  # a BASE layer shuffles its tokens, and brings them back
        for stack, length in config.stack_lengths.items():
            shuffled = sum(layer.kind == "base" for layer in config.layers(stack))
            exchanged += 2 * shuffled * length * model.d_model
    # Forward and backward pass, and once more if the backward pass recomputes the exchange.
    times = 3 if model.remat in ("full", "dots") else 2
    rows = _local_rows(config, mesh) * config.train.accumulation_steps
    return Communication(times * exchanged * rows * _BYTES[model.dtype], reduced)
