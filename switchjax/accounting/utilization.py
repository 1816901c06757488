"""What a train step asks of the devices, beside what they could do."""

from dataclasses import dataclass

from jax.sharding import Mesh

from switchjax.accounting.accounting import account
from switchjax.accounting.hardware import peak_flops
from switchjax.config import Config


@dataclass(frozen=True)
class StepCost:
    """What a train step takes."""

    flops: float
    """The model's, of one step on all devices together."""
    peak_flops: float | None
    """FLOP/s of all devices at their best; None where that is not known, as of CPUs."""


def model_flops(config: Config) -> float:
    """FLOPs of a train step, the model's own: three forward passes as papers count them, with neither recomputation nor
    empty slots, and every row as full as it can be."""
    return 3.0 * account(config).forward_flops * config.data.batch_size


def step_cost(config: Config, mesh: Mesh) -> StepCost:
    """What the metrics of a run measure its speed by; a kind of device whose peak is not known leaves the peak open."""
    peaks = [peak_flops(device.device_kind) for device in mesh.devices.flat]
    known = [peak for peak in peaks if peak is not None]
    return StepCost(model_flops(config), sum(known) if len(known) == len(peaks) else None)
