"""What a model takes: parameters, FLOPs, memory and communication, from the shapes of its modules.

The model is traced (`switchjax.accounting.traced_model`); nothing is allocated or compiled. `switchjax.planning.plan`
asks the compiler about memory and communication, which are estimates here.
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
"""Adafactor factors what has two dimensions of at least this size (optax's default)."""


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
    """By part; see `TracedWeight.part`."""
    active_parameters: Mapping[str, int]
    """Those that a token meets."""
    forward_flops: int
    """Of a sequence, as the Switch Transformer's paper counts them: without routers, with keys and values of
    cross-attention charged at the decoder's length, and of attention's two products queries by keys alone."""
    computed_flops: Mapping[str, int]
    """Of a sequence in a training forward pass, every matrix product, of empty slots too: by the weight's part, or
    `activations` for those without a weight (attention's scores and values, one-hot dispatch, balancing)."""
    training_flops: float
    """Of the whole run: forward and backward of all matrix products."""
    training_flops_6nd: float
    """Of the whole run, `6 N D` of each stack (Kaplan et al. 2020): N active parameters, D its tokens."""
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
    """Accounts for a config on a mesh of `devices`, of which `mesh.data=-1` takes those that the other axes leave.

    Raises:
        UserError: if the config has no model, or one that cannot take its batches.
    """
    model, mesh = trace_model(config), mesh_axes(config, devices)
    trained = [weight for weight in model.weights if weight.trained]
    computed = _by_part((weight.part, weight.computed_flops) for weight in model.weights if weight.computed_flops)
    computed |= {"activations": model.activation_flops} if model.activation_flops else {}
    lengths = config.stack_lengths
    last = list(lengths.values())[-1]  # what stands before and after the stacks counts with the last of them
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
    """Sizes of the mesh axes."""
    mesh = config.mesh
    data = mesh.data if mesh.data > 0 else max(devices // (mesh.expert * mesh.model), 1)
    return {DATA: data, EXPERT: mesh.expert, MODEL: mesh.model}


def _by_part(values: Iterable[tuple[str, int]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for part, value in values:
        counts[part] += value
    return dict(counts)


def _papers_flops(config: Config, weight: TracedWeight) -> int:
    """FLOPs of a sequence as `Accounting.forward_flops` counts them; attention's scores count with its last weight."""
    if weight.part == "routers" or not weight.computed_flops:
        return 0
    if not weight.stack:
        return weight.computed_flops
    scores = weight.layers * _attention_weights(config, weight) * 2 * weight.axis("head")
    return 2 * config.stack_lengths[weight.stack] * weight.active + scores


def _attention_weights(config: Config, weight: TracedWeight) -> int:
    """Pairs of a query and a key in all heads of a sequence and layer, where `weight` projects what attention mixes."""
    if weight.axes != ("heads", "head", "embed"):
        return 0
    queries = config.stack_lengths[weight.stack]
    keys = config.data.encoder_length if "cross_attention" in weight.name else queries
    return weight.axis("heads") * queries * keys


def _divided(weight: TracedWeight, mesh: Mapping[str, int], sharded: bool = False) -> list[int]:
    """The dimensions of a device's part of a layer's weight; where it is `sharded`, of the part that it keeps."""
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
    """Second moments of a weight: whole, or a row and a column of averages over its two largest dimensions."""
    order = sorted(range(len(shape)), key=lambda axis: shape[axis])
    if len(shape) < 2 or shape[order[-2]] < _FACTORED_FROM:
        return prod(local) + 2  # optax keeps a number in the place of what it does not need
    return prod(local) // local[order[-1]] + prod(local) // local[order[-2]] + 1


def _activation_bytes(config: Config, weights: Sequence[TracedWeight], mesh: Mapping[str, int]) -> int:
    """Inputs of norms and matrix products, attention's weights, hidden layers before and after their activation."""
    recomputed = config.model.remat != "none"
    layers = [weight for weight in weights if weight.stack]
    numbers = sum(_kept(config, weight, mesh) * (1 if recomputed else weight.layers) for weight in layers)
    if recomputed:  # a period keeps its input alone, and one at a time all the rest
        for stack, length in config.stack_lengths.items():
            periods = sum(run.repeats for run in scan_periods(config.layers(stack)))
            numbers += length * config.model.d_model * periods
    return numbers * _local_rows(config, mesh) * _BYTES[config.model.dtype]


def _kept(config: Config, weight: TracedWeight, mesh: Mapping[str, int]) -> int:
    """Numbers that one layer keeps of a sequence because of this weight: what a norm reads and writes; what a matrix
    product reads or writes but for the residual stream, of which the mesh axis `model` divides heads and hidden layers.
    """
    if weight.part == "norms" and weight.name.endswith("/scale"):
        return 2 * config.stack_lengths[weight.stack] * config.model.d_model
    if weight.part == "routers" or not weight.computed_flops:
        return 0
    sizes = zip(weight.axes, _divided(weight, mesh), strict=True)
    hidden = weight.vectors * prod(size for axis, size in sizes if axis not in ("expert", "embed"))
    return hidden + weight.slot_numbers + _attention_weights(config, weight) // mesh[MODEL]


def _local_rows(config: Config, mesh: Mapping[str, int]) -> int:
    """Sequences of a device in a micro-batch."""
    return -(-config.data.batch_size // (config.train.accumulation_steps * mesh[DATA] * mesh[EXPERT]))


def _communication(config: Config, weights: Sequence[TracedWeight], mesh: Mapping[str, int]) -> Communication:
    model, shards = config.model, mesh[DATA] * mesh[EXPERT]
    reduced = exchanged = 0
    for weight in weights:
        if (mesh[DATA] if "expert" in weight.axes else shards) > 1:
            reduced += prod(_divided(weight, mesh)) * weight.layers * weight.dtype.itemsize
    if mesh[EXPERT] > 1:
        exchanged += sum(weight.layers * weight.slot_numbers for weight in weights)
    if shards > 1:  # a BASE layer's tokens are shuffled, and brought back
        for stack, length in config.stack_lengths.items():
            shuffled = sum(layer.kind == "base" for layer in config.layers(stack))
            exchanged += 2 * shuffled * length * model.d_model
    # There and back, in the forward and in the backward pass; once more where that computes the exchange again.
    times = 3 if model.remat in ("full", "dots") else 2
    rows = _local_rows(config, mesh) * config.train.accumulation_steps
    return Communication(times * exchanged * rows * _BYTES[model.dtype], reduced)
