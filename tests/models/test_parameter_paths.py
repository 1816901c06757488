"""The layers of a parameter equal those counted by hand."""

import dataclasses

import jax
import pytest

from switchjax.config import Config
from switchjax.models.families import build
from switchjax.models.parameter_paths import ParameterPath, names_by_layer, parameter_paths
from switchjax.parallel.sharding import named_leaves
from tests.models.families import FAMILIES


def deep(pattern: tuple[str, ...], layers: int) -> Config:
    config = FAMILIES["gpt"]
    model = dataclasses.replace(config.model, pattern=pattern, num_decoder_layers=layers)
    return dataclasses.replace(config, model=model)


def path_of(config: Config, name: str) -> ParameterPath:
    return parameter_paths(config, [name])[name]


def test_the_first_axis_counts_layers() -> None:
    config = deep(("dense", "moe"), 6)
    path = path_of(config, "decoder/scans/0/blocks/1/ff/experts/w_in")
    assert path == ParameterPath("decoder/{layer}/ff/experts/w_in", (1, 3, 5), 4)
    assert path.of_experts
    assert path.by_layer == tuple(f"decoder/{layer}/ff/experts/w_in" for layer in (1, 3, 5))
    router = path_of(config, "decoder/scans/0/blocks/1/ff/router/logits")
    assert router.num_experts == 4
    assert not router.of_experts
    assert path_of(config, "decoder/scans/0/blocks/0/ff/w_in") == ParameterPath("decoder/{layer}/ff/w_in", (0, 2, 4))
    assert path_of(config, "decoder/norm/scale") == ParameterPath("decoder/norm/scale")
    assert path_of(config, "decoder/norm/scale").by_layer == ("decoder/norm/scale",)


def test_what_belongs_to_a_parameter_is_named_after_it() -> None:
    config = deep(("dense", "moe"), 4)
    names = ["step", "opt_state/0/mu/decoder/scans/0/blocks/0/ff/w_in", "opt_state/0/mu/embedding/vectors"]
    assert names_by_layer(config, names) == [
        "step",
        "opt_state/0/mu/decoder/0/ff/w_in",
        "opt_state/0/mu/decoder/2/ff/w_in",
        "opt_state/0/mu/embedding/vectors",
    ]


@pytest.mark.parametrize(
    ("pattern", "layers"), [(("dense", "moe"), 4), (("moe",), 3), (("dense", "moe", "dense", "dense"), 8)]
)
def test_every_layer_has_each_parameter_once(pattern: tuple[str, ...], layers: int) -> None:
    config = deep(pattern, layers)
    shapes = named_leaves(jax.eval_shape(lambda: build(config, jax.random.key(0))))
    for name, path in parameter_paths(config, shapes).items():
        sizes = [*([len(path.layers)] if path.layers else []), *([path.num_experts] if path.of_experts else [])]
        assert list(shapes[name].shape[: len(sizes)]) == sizes, name
    names = names_by_layer(config, shapes)
    assert len(names) == len(set(names))
    routed = {layer for layer in range(layers) if pattern[layer % len(pattern)] == "moe"}
    assert {f"decoder/{layer}/self_attention/query" for layer in range(layers)} <= set(names)
    assert {name for name in names if name.endswith("experts/w_in")} == {
        f"decoder/{layer}/ff/experts/w_in" for layer in routed
    }


def test_scans_after_the_first_count_on() -> None:
    config = FAMILIES["pyramid"]  # 6 layers of which 1 and 3 have 4 experts, 5 has 8
    path = path_of(config, "decoder/scans/1/blocks/1/ff/routed/experts/w_in")
    assert path == ParameterPath("decoder/{layer}/ff/routed/experts/w_in", (5,), 8)
