"""What an accelerator computes is what the CPU computes: JAX_PLATFORMS=cuda,cpu pytest tests/test_accelerators.py"""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import Config, DataConfig, ModelConfig, MoEConfig
from switchjax.models.attention import attend, attention_mask
from switchjax.models.layers import FeedForward
from switchjax.moe.layer import MoELayer
from switchjax.studies.step_benchmark import train_program

_PLATFORM, _, _REFERENCE = os.environ.get("JAX_PLATFORMS", "cpu").partition(",")
pytestmark = pytest.mark.skipif(_REFERENCE != "cpu", reason="no accelerator was asked for")

MODEL = ModelConfig(
    vocab_size=512, d_model=64, d_ff=128, num_heads=4, d_head=16, num_encoder_layers=2, num_decoder_layers=2
)


@pytest.fixture(autouse=True)
def optimizations() -> Iterator[None]:
    """As in training, where conftest.py leaves them out."""
    jax.config.update("jax_disable_most_optimizations", False)
    with jax.default_matmul_precision("highest"):
        yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_selected", [1, 2])
@pytest.mark.parametrize("dispatch", ["gather", "einsum", "ragged"])
def test_moe_layer_has_the_cpus_outputs_and_gradients(dispatch: str, num_selected: int, dtype: str) -> None:
    config = MoEConfig(
        router="top_k",
        num_experts=8,
        num_selected_experts=num_selected,
        group_size=256,
        dispatch=dispatch,
        dropless=dispatch == "ragged",
    )
    model = ModelConfig(d_model=64, d_ff=128, dtype=dtype, param_dtype=dtype)
    layer = MoELayer(partial(FeedForward, model, 0.0), model.d_model, config, jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (4, 256, model.d_model), dtype)

    def loss(layer: MoELayer, x: jax.Array) -> tuple[jax.Array, Any]:
        y, sums = layer(x, jnp.ones(x.shape[:2], bool), None)
        return jnp.sum(jnp.square(y.astype(jnp.float32))), (y, sums)

    compute = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    found, wanted = (
        jax.tree.leaves(jax.device_get(compute(*jax.device_put((layer, x), jax.devices(platform)[0]))))
        for platform in (_PLATFORM, "cpu")
    )
    assert len(found) == len(wanted) > 10
    for one, other in zip(found, wanted, strict=True):
        error = np.linalg.norm(np.float64(one) - np.float64(other))
        assert error <= (1e-5 if dtype == "float32" else 2e-2) * np.linalg.norm(np.float64(other))


@pytest.mark.parametrize("dispatch", ["gather", "einsum", "ragged"])
def test_train_steps_have_the_cpus_losses(dispatch: str) -> None:
    config = Config(
        model=MODEL,
        moe=MoEConfig(num_experts=8, group_size=64, dispatch=dispatch, dropless=dispatch == "ragged"),
        data=DataConfig(batch_size=8, encoder_length=64, decoder_length=32, vocabulary_size=400, num_sentinels=32),
    )
    found, wanted = (
        [float(step()["loss"]) for _ in range(10)]
        for step in (train_program(config, jax.devices(platform)[:1]) for platform in (_PLATFORM, "cpu"))
    )
    assert wanted[-1] < wanted[0]
    np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize(
    ("keys", "kv_heads", "biased", "causal"), [(64, 4, True, False), (48, 4, False, False), (64, 2, False, True)]
)
def test_attention_in_bfloat16_is_the_cpus_in_float32(keys: int, kv_heads: int, biased: bool, causal: bool) -> None:
    rows, queries, heads, width = 3, 64, 4, 32
    rng = np.random.default_rng(0)
    shapes = [(rows, queries, heads, width), (rows, keys, kv_heads, width), (rows, keys, kv_heads, width)]
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    bias = jnp.asarray(rng.normal(size=(1, heads, queries, keys)), jnp.float32) if biased else None
    segments = np.sort(rng.integers(1, 4, (rows, queries)), axis=1)
    mask = attention_mask(jnp.asarray(segments), jnp.asarray(segments[:, :keys]), causal)
    mask = mask.at[..., 0].set(True)  # a query that sees nothing is of no account

    def loss(inputs: Any, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = attend(*inputs[:3], mask, inputs[3], 0.0, None)
        return jnp.sum(jnp.square(y.astype(jnp.float32))), y

    compute = jax.jit(jax.value_and_grad(loss, has_aux=True))
    wide = [array.astype(jnp.float32) for array in arrays]
    here = jax.device_put(([*arrays, bias], mask), jax.devices(_PLATFORM)[0])
    found = jax.tree.leaves(jax.device_get(compute(*here)))
    wanted = jax.tree.leaves(jax.device_get(compute(*jax.device_put(([*wide, bias], mask), jax.devices("cpu")[0]))))
    assert len(found) == len(wanted) == (6 if biased else 5)
    for one, other in zip(found, wanted, strict=True):
        error = np.linalg.norm(np.float64(one) - np.float64(other))
        assert error <= 2e-2 * np.linalg.norm(np.float64(other))
    if _PLATFORM == "cuda":
        assert "fmha" in compute.lower(*here).compile().as_text()
