"""Sizes are as published, weights as prescribed, and each device creates only its own part."""

import math
from collections.abc import Callable

import jax
import numpy as np
import pytest

from switchjax.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig
from switchjax.models.encoder_decoder import EncoderDecoder
from switchjax.models.families import build
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import named_leaves, parameter_shardings
from tests.models.examples import changed

BASE = {"num_encoder_layers": 12, "num_decoder_layers": 12}
LARGE = {"d_model": 1024, "d_ff": 4096, "num_heads": 16, "num_encoder_layers": 24, "num_decoder_layers": 24}
XXL = LARGE | {"d_model": 4096, "d_ff": 10240, "activation": "geglu", "num_heads": 64, "tie_embeddings": False}
C = {"d_model": 2080, "d_ff": 6144, "num_heads": 30, "num_encoder_layers": 15, "num_decoder_layers": 15}
DENSE, SPARSE = {"pattern": ("dense",)}, {"pattern": ("moe",)}


@pytest.mark.parametrize(
    ("model", "experts", "parameters"),
    [
        pytest.param(BASE | DENSE, 1, 222_903_552, id="T5-Base: 222.90M"),
        pytest.param(LARGE | DENSE, 1, 737_668_096, id="T5-Large: 737.67M"),
        pytest.param(XXL | DENSE, 1, 11_135_332_352, id="T5-XXL: 11.1B"),
        pytest.param(BASE, 8, 619_339_008, id="Switch-Base-8"),
        pytest.param(BASE, 128, 7_415_217_408, id="Switch-Base-128"),
        pytest.param(LARGE, 128, 26_309_291_008, id="Switch-Large: 26.3B"),
        pytest.param(XXL, 128, 394_675_073_024, id="Switch-XXL: 395B"),
        pytest.param(C | SPARSE | {"tie_embeddings": False}, 2048, 1_571_327_875_360, id="Switch-C: 1571B"),
    ],
)
def test_the_published_models_have_their_published_sizes(model: dict, experts: int, parameters: int) -> None:
    config = Config(ModelConfig(**model), MoEConfig(num_experts=experts), data=DataConfig(vocabulary="t5"))
    shapes = jax.eval_shape(lambda: build(config, jax.random.key(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == parameters


# One period a stack, and few kinds of weights: the initialisers take seconds to compile.
CONFIG = changed(d_model=64, d_ff=128, num_experts=8, tie_embeddings=False)


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(2, 2, 2))


@pytest.fixture(scope="module")
def created(mesh: jax.sharding.Mesh) -> EncoderDecoder:
    def make() -> EncoderDecoder:
        return build(CONFIG, jax.random.key(0))

    return jax.jit(make, out_shardings=parameter_shardings(jax.eval_shape(make), mesh))()


def test_a_device_creates_only_its_part_of_each_parameter(created: EncoderDecoder, mesh: jax.sharding.Mesh) -> None:
    shardings = named_leaves(parameter_shardings(created, mesh))
    divided = 0
    for name, leaf in named_leaves(created).items():
        parts = math.prod(mesh.shape[axis] for axis in shardings[name].spec if axis is not None)
        assert {math.prod(shard.data.shape) * parts for shard in leaf.addressable_shards} == {leaf.size}, name
        divided += parts > 1
        if "experts" in name:
            assert parts == 4, name  # over expert and model
    assert divided > 10


# Standard deviation of each weight: sqrt(0.1 / fan_in), fan_in never counting layers or experts.
STANDARD_DEVIATIONS: dict[str, Callable[[ModelConfig], float]] = {
    "attention/query": lambda c: math.sqrt(0.1 / (c.d_model * c.d_head)),
    "attention/key": lambda c: math.sqrt(0.1 / c.d_model),
    "attention/value": lambda c: math.sqrt(0.1 / c.d_model),
    "attention/out": lambda c: math.sqrt(0.1 / (c.num_heads * c.d_head)),
    "w_in": lambda c: math.sqrt(0.1 / c.d_model),
    "w_out": lambda c: math.sqrt(0.1 / c.d_ff),
    "router/logits": lambda _: 0.02 * 0.8796,  # of a normal cut at two standard deviations
    "embedding/vectors": lambda _: 1.0,
    "logits": lambda c: math.sqrt(1 / c.d_model),
    "bias/bias": lambda c: math.sqrt(1 / c.d_model),
}


def test_each_weight_starts_with_its_standard_deviation(created: EncoderDecoder) -> None:
    seen = set()
    for name, leaf in named_leaves(created).items():
        if name.endswith("scale"):
            np.testing.assert_array_equal(leaf, 1)
            continue
        kind = next(kind for kind in STANDARD_DEVIATIONS if name.endswith(kind))
        seen.add(kind)
        expected = STANDARD_DEVIATIONS[kind](CONFIG.model)
        # 5 standard errors of a standard deviation from so many draws.
        np.testing.assert_allclose(np.std(leaf), expected, rtol=5 / math.sqrt(2 * leaf.size), err_msg=name)
    assert seen == set(STANDARD_DEVIATIONS)


def test_no_two_layers_or_experts_start_the_same(created: EncoderDecoder) -> None:
    experts = np.asarray(named_leaves(created)["encoder/scans/0/blocks/1/ff/experts/w_in"])
    flat = experts.reshape(-1, *experts.shape[-2:])
    assert len({values.tobytes() for values in flat}) == len(flat) == 8
