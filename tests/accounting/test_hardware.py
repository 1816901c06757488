"""The table of chips, and the names of their slices."""

import pytest

from switchjax.accounting.hardware import CHIPS, Slice, find_chip, parse_slice, slices
from switchjax.config import UserError


@pytest.mark.parametrize("name", CHIPS)
def test_slices_grow_up_to_what_a_job_may_have(name: str) -> None:
    chip = find_chip(name)
    sizes = [one.chips for one in slices(chip)]
    assert sizes == sorted(set(sizes))
    assert all(len(one.shape) == chip.dimensions for one in slices(chip))
    assert sizes[-1] == {"v4": 4096, "v5e": 256, "v5p": 6144, "v6e": 256, "tpu7x": 6144}[name]


@pytest.mark.parametrize("name", CHIPS)
def test_a_chip_computes_hundreds_of_flops_for_a_byte_and_holds_seconds_of_traffic_at_most(name: str) -> None:
    """Would catch a figure that is wrong by a factor of a thousand."""
    chip = find_chip(name)
    assert 100 < chip.flops / chip.memory_bandwidth < 1000
    assert 0.01 < chip.memory * chip.devices / chip.memory_bandwidth < 0.1
    assert 10 < chip.memory_bandwidth / chip.link_bandwidth < 100


def test_bisection_bandwidths_are_the_published_ones() -> None:
    """The links of all lines along the longest dimension join a pod's two halves."""
    for topology, published in (("v4:16x16x16", 24e12), ("v5e:16x16", 1.6e12), ("v6e:16x16", 3.2e12)):
        pod = parse_slice(topology)
        lines = pod.chips // pod.shape[-1]
        assert lines * pod.links(len(pod.shape) - 1) * pod.chip.link_bandwidth == pytest.approx(published, rel=0.1)


def test_a_name_gives_a_slice() -> None:
    one = parse_slice("tpu7x:4x4x8")
    assert (one.chips, one.devices, one.name) == (128, 256, "tpu7x:4x4x8")


def test_rings_close_where_cubes_or_a_whole_pod_do() -> None:
    assert [Slice(find_chip("v5p"), (2, 4, 8)).links(d) for d in range(3)] == [1, 2, 2]
    assert [Slice(find_chip("v5e"), (8, 16)).links(d) for d in range(2)] == [1, 2]


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v5q:8x8x8", "no chip 'v5q' (did you mean 'v5"),
        ("h100:8", "known: v4, v5e, v5p, v6e, tpu7x"),
        ("v5p", "'v5p' names no slice of v5p, such as v5p:16x16x24 (2x2x1, 2x2x2"),
        ("v5p:8x8", "names no slice"),
        ("v5p:0x8x8", "names no slice"),
        ("v5e:8x8x8", "such as v5e:16x16"),
        ("v5e:32x16", "512 chips, the largest slice is v5e:16x16"),
    ],
)
def test_a_bad_name_is_refused_with_those_known(topology: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        parse_slice(topology)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
