"""The bounds of a step against arithmetic by hand."""

import itertools

import pytest

from switchjax.accounting.hardware import Slice, parse_slice
from switchjax.planning.hlo_collectives import Collective
from switchjax.planning.roofline import network_seconds, roofline


def chips(slice_: Slice) -> list[tuple[int, ...]]:
    """Coordinates of chips with one device each; the last dimension changes first."""
    return list(itertools.product(*(range(size) for size in slice_.shape)))


def test_an_all_to_all_is_bound_by_its_longest_dimension() -> None:
    pod = parse_slice("v5p:4x4x8")
    everyone = Collective("all-to-all", 10**9, 1, (), "")
    # Rings of 8 chips: each chip's GB crosses the middle in half of all cases, half of that either way, over 2 links.
    assert network_seconds(everyone, pod, chips(pod)) == pytest.approx(8 * 1e9 / (4 * 2 * 100e9))


def test_part_of_a_ring_is_a_line() -> None:
    pod = parse_slice("v5p:4x4x8")
    half = Collective("all-to-all", 10**9, 1, tuple(range(4)), "")
    assert network_seconds(half, pod, chips(pod)) == pytest.approx(4 * 1e9 / (4 * 1 * 100e9))


def test_an_all_reduce_is_two_passes_over_all_links() -> None:
    pod = parse_slice("v5e:16x16")
    for kind, passes in (("all-reduce", 2), ("all-gather", 1), ("reduce-scatter", 1)):
        one = Collective(kind, 10**9, 1, (), "")
        assert network_seconds(one, pod, chips(pod)) == pytest.approx(passes * 1e9 * 255 / 256 / (4 * 50e9))


def test_a_permutation_takes_one_link() -> None:
    pod = parse_slice("v5e:4x4")
    assert network_seconds(Collective("collective-permute", 10**9, 1, (0, 1), ""), pod, chips(pod)) == 1e9 / 50e9


def test_within_a_chip_no_time_passes() -> None:
    pod = parse_slice("tpu7x:2x2x1")
    devices = [chip for chip in chips(pod) for _ in range(2)]
    assert network_seconds(Collective("all-reduce", 10**9, 1, (0, 1), ""), pod, devices) == 0
    # Two devices a chip share its links.
    assert network_seconds(Collective("collective-permute", 10**9, 1, (0, 2), ""), pod, devices) == 2e9 / 100e9


def test_bounds_count_what_each_device_does_and_every_turn_of_a_loop() -> None:
    pod = parse_slice("v5e:2x2")
    once = Collective("all-to-all", 10**6, 1, (), "")
    bounds = roofline(197e12, 819e9 / 2, [once, once._replace(times=9)], pod, chips(pod))
    assert bounds.compute_seconds == 1
    assert bounds.hbm_seconds == 0.5
    assert bounds.network_seconds == pytest.approx(10 * network_seconds(once, pod, chips(pod)))
    assert bounds.bound == "compute"
