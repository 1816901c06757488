"""Time is divided by activity; speed counts only the steps."""

import time
from types import SimpleNamespace

import jax
import pytest

from switchjax.training.clock import Clock, StepCost, device_memory


class Time:
    """A stand-in for `time.perf_counter` that tests advance."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def passing(monkeypatch: pytest.MonkeyPatch) -> Time:
    passing = Time()
    monkeypatch.setattr(time, "perf_counter", passing)
    return passing


def spend(clock: Clock, passing: Time, part: str, seconds: float) -> None:
    with clock.measure(part):
        passing.now += seconds


def test_parts_are_fractions_of_all_time_and_speed_is_of_the_steps(passing: Time) -> None:
    clock = Clock(StepCost(flops=40.0, peak_flops=80.0))
    for part, seconds in {"data_wait": 1, "step": 2, "evaluation": 4, "checkpoint": 2}.items():
        spend(clock, passing, part, seconds)
    spend(clock, passing, "step", 4)
    clock.count_step(tokens=30)
    clock.count_step(tokens=50)
    passing.now += 3  # outside of any measured part
    metrics = clock.lap()
    assert metrics == pytest.approx(
        {
            "tokens_per_second": 80 / 10,
            "model_flops_per_second": 2 * 40 / 10,
            "mfu": 8 / 80,
            "data_wait_fraction": 1 / 16,
            "step_fraction": 6 / 16,
            "logging_fraction": 0,
            "evaluation_fraction": 4 / 16,
            "checkpoint_fraction": 2 / 16,
        }
    )
    spend(clock, passing, "logging", 5)
    assert clock.lap()["logging_fraction"] == 1


def test_without_a_peak_there_is_no_mfu_and_without_a_cost_no_flops(passing: Time) -> None:
    for cost, expected in ((StepCost(1.0, None), {"model_flops_per_second"}), (None, set())):
        clock = Clock(cost)
        passing.now += 1
        assert {name for name in clock.lap() if "flops" in name or name == "mfu"} == expected


def test_time_counts_though_a_part_fails(passing: Time) -> None:
    clock = Clock()

    def fail() -> None:
        with clock.measure("step"):
            passing.now += 2
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()
    assert clock.lap()["step_fraction"] == 1


def test_the_memory_of_the_fullest_device_is_told_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def pretend(*stats: dict[str, int] | None) -> None:
        devices = [SimpleNamespace(memory_stats=lambda found=found: found) for found in stats]
        monkeypatch.setattr(jax, "local_devices", lambda: devices)

    pretend({"peak_bytes_in_use": 5}, {"peak_bytes_in_use": 7, "bytes_in_use": 9})
    assert device_memory() == {"device_peak_bytes": 7.0}
    pretend(None, {"bytes_in_use": 9})
    assert device_memory() == {}
