"""A run's FLOPs are those of the papers, and its devices' peak is None if it is unknown."""

from dataclasses import dataclass

import numpy as np
import pytest
from jax.sharding import Mesh

from switchjax.accounting import utilization
from switchjax.accounting.accounting import account
from switchjax.accounting.hardware import peak_flops
from switchjax.accounting.utilization import model_flops, step_cost
from switchjax.config import Config
from switchjax.parallel.mesh import make_mesh
from tests.tiny import changed


def test_a_step_takes_three_forward_passes_of_its_rows_however_large_the_buffers(tiny: Config) -> None:
    assert model_flops(tiny) == 3 * account(tiny).forward_flops * 24
    assert model_flops(changed(tiny, moe={"train_capacity_factor": 4.0})) == model_flops(tiny)
    assert model_flops(changed(tiny, data={"batch_size": 48})) == 2 * model_flops(tiny)


@pytest.mark.parametrize(
    ("kind", "flops"),
    [("TPU v5 lite", 197e12), ("TPU v5p", 459e12), ("TPU7x", 2307e12 / 2), ("NVIDIA H100 80GB HBM3", 989e12)],
)
def test_the_peak_is_one_devices(kind: str, flops: float) -> None:
    assert peak_flops(kind) == flops


@pytest.mark.parametrize("kind", ["cpu", "TPU v99", "NVIDIA H100 PCIe"])
def test_an_unknown_device_has_no_peak(kind: str) -> None:
    assert peak_flops(kind) is None


@dataclass(frozen=True)
class Chip:
    """Stands in for a device that does not exist."""

    device_kind: str
    id: int
    process_index: int = 0
    platform: str = "tpu"


def test_the_peak_of_a_mesh_is_that_of_all_its_devices_or_unknown(tiny: Config) -> None:
    mesh = make_mesh(tiny.mesh)
    assert step_cost(tiny, mesh) == utilization.StepCost(model_flops(tiny), None)
    chips = np.array([Chip("TPU v4", number) for number in range(8)], object)
    assert step_cost(tiny, Mesh(chips, "data")).peak_flops == 8 * 275e12
    chips[3] = Chip("cpu", 3)
    assert step_cost(tiny, Mesh(chips, "data")).peak_flops is None
