"""A parameter's layers, against counting the stack's layers by hand."""

import dataclasses

import jax
import pytest

from switchjax.config import Config
from switchjax.interop.places import Place, place_of
from switchjax.models.families import build
from switchjax.parallel.sharding import named_leaves
from tests.models.families import FAMILIES


def deep(pattern: tuple[str, ...], layers: int) -> Config:
    config = FAMILIES["gpt"]
    model = dataclasses.replace(config.model, pattern=pattern, num_decoder_layers=layers)
    return dataclasses.replace(config, model=model)


def test_the_first_axes_count_layers_and_experts() -> None:
    config = deep(("dense", "moe"), 6)
    place = place_of(config, "decoder/runs/0/blocks/1/ff/experts/w_in")
    assert place == Place("decoder/{layer}/ff/experts/w_in", (1, 3, 5), 4)
    assert place.leading == (3, 4)
    assert place.numbers((2, 3)) == {"layer": 5, "expert": 3}
    assert place_of(config, "decoder/runs/0/blocks/0/ff/w_in") == Place("decoder/{layer}/ff/w_in", (0, 2, 4))
    assert place_of(config, "decoder/norm/scale") == Place("decoder/norm/scale")
    assert list(place_of(config, "decoder/norm/scale").indices()) == [()]


@pytest.mark.parametrize(
    ("pattern", "layers"), [(("dense", "moe"), 4), (("moe",), 3), (("dense", "moe", "dense", "dense"), 8)]
)
def test_every_layer_has_each_parameter_once(pattern: tuple[str, ...], layers: int) -> None:
    config = deep(pattern, layers)
    shapes = named_leaves(jax.eval_shape(lambda: build(config, jax.random.key(0))))
    found: dict[str, list[int]] = {}
    for name, leaf in shapes.items():
        place = place_of(config, name)
        assert leaf.shape[: len(place.leading)] == place.leading, name
        found.setdefault(place.name, []).extend(place.layers)
    routed = [layer for layer in range(layers) if pattern[layer % len(pattern)] == "moe"]
    assert sorted(found["decoder/{layer}/self_attention/query"]) == list(range(layers))
    assert sorted(found["decoder/{layer}/ff/experts/w_in"]) == routed


def test_runs_after_the_first_count_on() -> None:
    config = FAMILIES["pyramid"]  # 6 layers of which 1 and 3 have 4 experts, 5 has 8
    place = place_of(config, "decoder/runs/1/blocks/1/ff/routed/experts/w_in")
    assert place == Place("decoder/{layer}/ff/routed/experts/w_in", (5,), 8)
