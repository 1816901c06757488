"""Norm, embedding, feed-forward layer, dropout and initialisers."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from switchjax.config import ModelConfig
from switchjax.models.layers import (
    ACTIVATIONS,
    Embedding,
    FeedForward,
    Norm,
    cast_kernels,
    dropout,
    kernel,
    project,
    split_key,
)
from tests.parameters import random_parameters

CONFIG = ModelConfig(vocab_size=96, d_model=16, d_ff=32, num_heads=2, d_head=8)
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("inputs", "outputs", "equation"), [((6,), (3, 4), "bld,dha->blha"), ((2, 3), (5,), "blha,had->bld")]
)
def test_a_projection_and_its_gradients_are_those_of_the_einsum(
    inputs: tuple[int, ...], outputs: tuple[int, ...], equation: str
) -> None:
    x = jax.random.normal(KEY, (2, 7, *inputs))
    weight = jax.random.normal(jax.random.key(1), (*inputs, *outputs))
    back = jax.random.normal(jax.random.key(2), (2, 7, *outputs))
    y, gradients = jax.vjp(lambda x, w: project(x, w, num_inputs=len(inputs)), x, weight)
    expected, expected_gradients = jax.vjp(lambda x, w: jnp.einsum(equation, x, w), x, weight)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)  # float32 sums of 6 terms
    for found, wanted in zip(gradients(back), expected_gradients(back), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_rms_norm_is_x_over_its_root_mean_square() -> None:
    norm = Norm(replace(CONFIG, d_model=4))
    norm.scale[...] = jnp.array([1.0, 2.0, 3.0, -1.0])
    x = np.array([[2.0, -2.0, 2.0, 2.0], [3.0, 0.0, 0.0, 4.0]], np.float32)
    expected = [[1, -2, 3, -1], [3 / 2.5, 0, 0, -4 / 2.5]]  # the second row's root mean square is 2.5
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-6)


def test_rms_norm_computes_in_float32_and_returns_the_inputs_dtype() -> None:
    norm = Norm(replace(CONFIG, d_model=256, param_dtype="bfloat16"))
    x = jnp.asarray(300 + np.arange(256)).astype(jnp.bfloat16)
    y = norm(x)
    wide = np.asarray(x.astype(jnp.float32), np.float64)
    assert y.dtype == jnp.bfloat16
    expected = wide / np.sqrt(np.mean(wide**2))
    # One rounding to 8 bits, at the end: half a unit of 2^-8 relative to the binade.
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=2**-8)


def test_huge_values_do_not_overflow_the_norm_in_bfloat16() -> None:
    y = Norm(replace(CONFIG, d_model=4))(jnp.full((1, 4), 1e15, jnp.bfloat16))
    np.testing.assert_array_equal(y, np.ones((1, 4)))


def test_tied_logits_are_products_with_the_tokens_vectors_over_root_d() -> None:
    embedding = random_parameters(lambda: Embedding(CONFIG, KEY))
    vectors = np.asarray(embedding.vectors[...], np.float64)
    x = np.random.default_rng(0).normal(size=(2, 3, 16)).astype(np.float32)
    # float32 sums of 16 terms.
    np.testing.assert_allclose(embedding.logits(jnp.asarray(x)), x @ vectors.T / 4, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(embedding(jnp.array([[5, 0]])), np.asarray(embedding.vectors[...])[[5, 0]][None])


@pytest.mark.parametrize("activation", ["relu", "geglu"])
def test_feed_forward_is_its_equation(activation: str) -> None:
    layer = random_parameters(lambda: FeedForward(replace(CONFIG, activation=activation), 0.0, KEY))
    x = np.random.default_rng(0).normal(size=(3, 16)).astype(np.float32)
    w_in, w_out = np.asarray(layer.w_in[...]), np.asarray(layer.w_out[...])
    if activation == "relu":
        hidden = np.maximum(x @ w_in, 0)
    else:
        gate = x @ np.asarray(layer.w_gate[...])
        hidden = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) * (x @ w_in)
    np.testing.assert_allclose(layer(jnp.asarray(x), None), hidden @ w_out, rtol=1e-5, atol=1e-5)  # float32


def test_the_gated_form_has_a_third_matrix() -> None:
    sizes = {}
    for activation in ("relu", "geglu"):
        config = replace(CONFIG, activation=activation)
        shapes = jax.eval_shape(lambda config=config: FeedForward(config, 0.0, KEY))
        sizes[activation] = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    assert sizes == {"relu": 2 * 16 * 32, "geglu": 3 * 16 * 32}


def test_dropout_keeps_the_mean_and_is_off_without_a_key() -> None:
    x = jnp.ones((100, 100))
    y = np.asarray(dropout(x, 0.25, KEY))
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.75], rtol=1e-6)
    np.testing.assert_allclose(y.mean(), 1, atol=5 * np.sqrt(0.25 / 0.75) / 100)  # 5 standard errors
    assert dropout(x, 0.25, None) is x
    assert dropout(x, 0.0, KEY) is x
    assert dropout(x.astype(jnp.bfloat16), 0.25, KEY).dtype == jnp.bfloat16


def test_split_key_gives_nones_for_none() -> None:
    assert split_key(None, 3) == [None, None, None]
    assert len({str(jax.random.key_data(key)) for key in split_key(KEY, 3)}) == 3


@pytest.mark.parametrize(
    ("shape", "num_inputs", "fan_in"), [((200, 300), 1, 200), ((100, 4, 150), 1, 100), ((4, 50, 300), 2, 200)]
)
def test_a_kernel_is_truncated_normal_of_variance_scale_over_fan_in(
    shape: tuple[int, ...], num_inputs: int, fan_in: int
) -> None:
    values = np.asarray(kernel(KEY, shape, ("embed",) * len(shape), jnp.float32, num_inputs)[...])
    # 60000 draws: the variance's standard error is about 0.4 %.
    np.testing.assert_allclose(values.var(), 0.1 / fan_in, rtol=0.02)
    np.testing.assert_allclose(values.mean(), 0, atol=5 * values.std() / np.sqrt(values.size))
    # Cut at two standard deviations of the untruncated normal, which is 1 / 0.8796 as wide.
    assert np.abs(values).max() < 2 / 0.87 * np.sqrt(0.1 / fan_in)


def test_layer_norm_has_mean_0_and_deviation_1_before_its_scale_and_shift() -> None:
    norm = Norm(replace(CONFIG, d_model=4, norm="layer"))
    norm.scale[...] = jnp.array([1.0, 2.0, 3.0, -1.0])
    norm.shift[...] = jnp.array([0.0, 1.0, 0.0, 5.0])
    x = np.array([[1.0, 3.0, 1.0, 3.0], [0.0, 0.0, 0.0, 4.0]], np.float32)
    deviation = np.sqrt(3)  # of the second row, whose mean is 1
    expected = [[-1, 2 + 1, -3, -1 + 5], [-1 / deviation, -2 / deviation + 1, -3 / deviation, -3 / deviation + 5]]
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5)


def test_a_norm_divides_by_the_variance_and_epsilon() -> None:
    config = replace(CONFIG, d_model=4, norm_epsilon=2.0)
    x = jnp.asarray([[1.0, 3.0, 1.0, 3.0]])
    root = np.sqrt(5 + 2), np.sqrt(1 + 2)  # of the mean square, and of the variance
    np.testing.assert_allclose(Norm(config)(x), x / root[0], rtol=1e-6)
    np.testing.assert_allclose(Norm(replace(config, norm="layer"))(x), (x - 2) / root[1], rtol=1e-6)


def test_gelu_is_by_tanh_and_gelu_exact_by_erf() -> None:
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    by_erf = x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    by_tanh = x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(ACTIVATIONS["gelu_exact"](x), by_erf, atol=1e-6)
    np.testing.assert_allclose(ACTIVATIONS["gelu"](x), by_tanh, atol=1e-6)
    assert np.abs(by_erf - by_tanh).max() > 1e-4


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_slices_of_a_network_with_biases_add_up_to_it(activation: str) -> None:
    """Slices as on the devices of the axis `model`: each has the whole output bias and adds its share."""
    config = replace(CONFIG, biases=True, activation=activation)
    whole = random_parameters(lambda: FeedForward(config, 0.0, KEY))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, config.d_model)), jnp.float32)
    total = jnp.zeros_like(x)
    for part in (slice(0, 8), slice(8, 32)):
        sliced = random_parameters(lambda: FeedForward(config, 0.0, KEY))
        sliced.w_in, sliced.w_out = nnx.Param(whole.w_in[...][:, part]), nnx.Param(whole.w_out[...][part])
        sliced.b_in = nnx.Param(whole.b_in[...][part])
        if whole.w_gate is not None:
            sliced.w_gate = nnx.Param(whole.w_gate[...][:, part])
        total += sliced(x, None)
    np.testing.assert_allclose(total, whole(x, None), rtol=1e-4, atol=1e-5)  # float32 sums in two parts


def test_tied_logits_are_scaled_as_t5s_or_not_at_all() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, CONFIG.d_model)), jnp.float32)
    scaled, plain = (
        random_parameters(lambda c=c: Embedding(c, KEY)).logits(x)
        for c in (CONFIG, replace(CONFIG, scale_logits=False))
    )
    np.testing.assert_allclose(4 * scaled, plain, rtol=1e-5, atol=1e-5)  # sqrt(16)


def test_kernels_cast_beforehand_give_what_they_give_cast_on_the_way() -> None:
    """Nothing else is cast: norms, biases and token vectors keep their type."""
    network = random_parameters(lambda: FeedForward(replace(CONFIG, biases=True), 0.0, KEY))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, CONFIG.d_model))).astype(jnp.bfloat16)
    cast = cast_kernels(network, "bfloat16")
    assert cast.w_in[...].dtype == cast.w_out[...].dtype == jnp.bfloat16
    assert cast.b_in is not None
    assert cast.b_in[...].dtype == jnp.float32
    assert cast.w_in.get_metadata("axes") == network.w_in.get_metadata("axes")
    np.testing.assert_array_equal(cast(x, None).astype(jnp.float32), network(x, None).astype(jnp.float32))

    def loss(network: FeedForward, before: bool) -> jax.Array:
        network = cast_kernels(network, "bfloat16") if before else network
        return jnp.sum(jnp.square(network(x, None).astype(jnp.float32)))

    gradients = [jax.jit(jax.grad(loss), static_argnums=1)(network, before) for before in (True, False)]
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_array_equal(a, b)
