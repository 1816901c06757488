"""The device mesh with its three named axes, and the check that a config fits it."""

import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from switchjax.config import Config, MeshConfig, UserError
from switchjax.parallel.processes import process_count

DATA, EXPERT, MODEL = "data", "expert", "model"
AXES = (DATA, EXPERT, MODEL)

Tree = TypeVar("Tree")


def emulate_devices(config: MeshConfig) -> None:
    """Makes the CPUs of all processes look like `config.emulated_devices` devices; call it before JAX is first used.

    Raises:
        UserError: if the devices do not divide over the processes, or JAX has already started with fewer devices.
    """
    if not config.emulated_devices:
        return
    each, rest = divmod(config.emulated_devices, process_count())
    if rest:
        raise UserError(
            f"mesh.emulated_devices={config.emulated_devices} are those of all processes, "
            f"and do not divide over {process_count()}"
        )
    try:
        jax.config.update("jax_num_cpu_devices", each)
    except RuntimeError:  # JAX has started, which is fine if it has enough devices
        if jax.device_count() < config.emulated_devices:
            found = f"JAX has already started with {jax.device_count()} devices"
            raise UserError(f"mesh.emulated_devices={config.emulated_devices}, but {found}") from None


def one_at_a_time(results: Tree) -> Tree:
    """`results`; on emulated devices, waits until they are computed."""
    # Emulated devices share threads, so two programs at a time can deadlock: each holds the threads for which the
    # collectives of the other wait. Real devices run programs in order, and waiting would leave them idle.
    return jax.block_until_ready(results) if jax.default_backend() == "cpu" else results


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh (data, expert, model) over `devices` (default: all).

    Raises:
        UserError: if the axes' sizes do not multiply to the number of devices; names sizes that do.
    """
    devices = jax.devices() if devices is None else devices
    count, others = len(devices), config.expert * config.model
    data = config.data if config.data > 0 else max(count // others, 1)
    if data * others != count:
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        hint = (
            f"mesh.data={count // others} fits"
            if count % others == 0
            else f"mesh.expert * mesh.model must divide {count} (one of {', '.join(map(str, divisors))})"
        )
        raise UserError(
            f"a mesh of data={data} x expert={config.expert} x model={config.model} needs "
            f"{data * others} devices, but there are {count}: {hint}"
        )
    shape = (data, config.expert, config.model)
    # Not jax.make_mesh, which does not let a mesh axis be a part of a torus dimension on every kind of TPU.
    flat = np.asarray(devices).reshape(-1).tolist()
    grid = mesh_utils.create_device_mesh(shape, flat, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def count_shards() -> int:
    """The number of parts into which the mesh in context divides the rows of a batch; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[DATA] * mesh.shape[EXPERT]


def check_fit(config: Config, mesh: Mesh) -> None:
    """Raises a `UserError` for sizes of a config that the mesh does not divide, naming sizes that would fit."""
    moe, data = config.moe, config.data
    rows = data.batch_size // config.train.accumulation_steps
    shards = mesh.shape[DATA] * mesh.shape[EXPERT]
    if rows % shards:
        raise UserError(
            f"{rows} rows (data.batch_size / train.accumulation_steps) do not divide over the {shards} shards of "
            f"data x expert: {_nearest_multiples(rows, shards)}"
        )
    check_parameters(config, mesh)
    if not config.model.routes_groups:
        return
    for key, length in config.stack_lengths.items():
        tokens = moe.tokens_per_group(rows, length)
        if tokens != moe.tokens_per_group(data.batch_size, length):
            raise UserError(
                f"the {key} rows of a micro-batch ({rows}) and of a batch ({data.batch_size}) divide into groups of "
                f"different sizes: moe.group_size={length} fits both"
            )
        if rows * length // tokens % shards:
            shard_rows, group_rows = rows // shards, tokens // length
            raise UserError(
                f"groups of moe.group_size={moe.group_size} tokens hold {group_rows} {key} rows, which do not divide "
                f"the {shard_rows} rows of a shard: moe.group_size={math.gcd(shard_rows, group_rows) * length} would"
            )


def check_parameters(config: Config, mesh: Mesh) -> None:
    """Raises a `UserError` for parameters that the mesh does not divide, naming sizes that would fit."""
    model, moe = config.model, config.moe
    if model.family != "recurrent":
        _check_axis("model.num_heads", model.num_heads, MODEL, mesh)
        _check_axis("model.num_kv_heads", model.kv_heads, MODEL, mesh)
    _check_axis("model.d_ff", model.d_ff, MODEL, mesh)
    if model.family != "vision" and model.vocab_size % mesh.shape[MODEL]:
        raise UserError(
            f"model.vocab_size={model.vocab_size} does not divide over mesh.model={mesh.shape[MODEL]}: "
            f"{_nearest_multiples(model.vocab_size, mesh.shape[MODEL])}"
        )
    shards = mesh.shape[DATA] * mesh.shape[EXPERT]
    if config.mesh.sharded != "none" and model.d_model % shards:
        raise UserError(
            f"model.d_model={model.d_model} does not divide over the {shards} shards of data x expert, which "
            f"mesh.sharded={config.mesh.sharded} needs: {_nearest_multiples(model.d_model, shards)}"
        )
    if not model.has_experts:
        return
    if moe.dispatch == "ragged" and mesh.shape[EXPERT] > 1:
        raise UserError(
            f"moe.dispatch=ragged keeps all experts on each device, but mesh.expert={mesh.shape[EXPERT]}: "
            "set mesh.expert=1 (mesh.data and mesh.model may divide the devices), or moe.dispatch=gather"
        )
    for experts in {layer.num_experts for stack in model.stacks for layer in config.layers(stack)}:
        _check_axis("moe.num_experts", experts, EXPERT, mesh)


def _check_axis(key: str, size: int, axis: str, mesh: Mesh) -> None:
    if size % mesh.shape[axis]:
        fitting = ", ".join(str(n) for n in range(1, mesh.size + 1) if size % n == 0 and mesh.size % n == 0)
        raise UserError(
            f"{key}={size} does not divide over mesh.{axis}={mesh.shape[axis]}: sizes that fit are {fitting}"
        )


def _nearest_multiples(size: int, factor: int) -> str:
    below = size // factor * factor
    return "the nearest multiples are " + " and ".join(str(n) for n in (below, below + factor) if n > 0)
