"""The FLOPs of a train step, and the devices' peak, for utilisation."""

from dataclasses import dataclass

from jax.sharding import Mesh

from switchjax.accounting.accounting import account
from switchjax.accounting.hardware import peak_flops
from switchjax.config import Config


@dataclass(frozen=True)
class StepCost:
    """A train step's FLOPs, and the FLOP/s of the devices that take it."""

    flops: float
    """The model's FLOPs of one step, on all devices together."""
    peak_flops: float | None
    """Peak FLOP/s of all devices together, or None if it is unknown, as for CPUs."""


def model_flops(config: Config) -> float:
    """Model FLOPs of a train step: three forward passes as papers count them, with full rows, but without recomputation
    and empty slots."""
    return 3.0 * account(config).forward_flops * config.data.batch_size


def step_cost(config: Config, mesh: Mesh) -> StepCost:
    """The cost of a run's train step on a mesh; the peak is None if one device's peak is unknown."""
    peaks = [peak_flops(device.device_kind) for device in mesh.devices.flat]
    known = [peak for peak in peaks if peak is not None]
    return StepCost(model_flops(config), sum(known) if len(known) == len(peaks) else None)
