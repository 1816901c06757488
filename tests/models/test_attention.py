"""Masks, T5's distance buckets, and attention against a loop over heads."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import ModelConfig
from switchjax.models.attention import (
    Attention,
    RelativePositionBias,
    attend,
    attention_mask,
    cached_mask,
    positions_in_segments,
    relative_position_bucket,
    rotate,
    sinusoids,
)
from tests.parameters import random_parameters

CONFIG = ModelConfig(d_model=12, num_heads=3, d_head=4, relative_buckets=8, relative_max_distance=16)
KEY = jax.random.key(0)


def bucket_by_t5s_rule(distance: int, bidirectional: bool, num_buckets: int, max_distance: int) -> int:
    """The bucket of T5, section 2.1, for one distance (key - query), in whole numbers.

    Half of the buckets are exact; of the m others, number j begins where the distance reaches
    exact * (max / exact)^(j / m), that is where distance^m >= exact^(m - j) max^j.
    """
    if bidirectional:
        half = num_buckets // 2
        return (half if distance > 0 else 0) + bucket_by_t5s_rule(-abs(distance), False, half, max_distance)
    past = max(-distance, 0)
    exact = num_buckets // 2
    if past < exact:
        return past
    m = num_buckets - exact
    return exact + max(j for j in range(m) if past**m >= exact ** (m - j) * max_distance**j)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 16), (16, 100), (4, 3)])
def test_buckets_are_t5s(buckets: int, most: int, bidirectional: bool) -> None:
    distances = np.arange(-3 * most, 3 * most + 1)
    actual = relative_position_bucket(jnp.asarray(distances)[None], bidirectional, buckets, most)
    expected = [bucket_by_t5s_rule(int(distance), bidirectional, buckets, most) for distance in distances]
    np.testing.assert_array_equal(actual[0], expected)
    # Bidirectional, a distance of 0 counts as before the query, and the other half's first bucket stays empty.
    assert set(range(buckets)) - set(expected) == ({buckets // 2} if bidirectional else set())


def test_the_bias_of_a_pair_depends_on_its_distance_and_head() -> None:
    bias = random_parameters(lambda: RelativePositionBias(CONFIG, False, KEY))
    scores = np.asarray(bias(jnp.arange(5)[None], 5))
    assert scores.shape == (1, 3, 5, 5)
    np.testing.assert_array_equal(scores[..., 1:, 1:], scores[..., :-1, :-1])
    np.testing.assert_array_equal(scores[0, :, 3, 1], bias.bias[...][:, 2])  # two back, bucket 2
    np.testing.assert_array_equal(scores[0, :, 1, 3], bias.bias[...][:, 0])  # keys after the query count as here
    some = np.asarray(bias(jnp.asarray([[4, 1], [0, 3]]), 5))
    np.testing.assert_array_equal(some, [scores[0][:, [4, 1]], scores[0][:, [0, 3]]])


def test_a_mask_lets_through_the_own_segment_and_the_past() -> None:
    segments = jnp.array([[1, 1, 2, 2, 0]])
    own = np.array([[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]], bool)
    np.testing.assert_array_equal(attention_mask(segments, segments), own[None, None])
    np.testing.assert_array_equal(attention_mask(segments, segments, causal=True), np.tril(own)[None, None])
    np.testing.assert_array_equal(attention_mask(segments[:, :3], segments), own[None, None, :3])


def test_attention_is_its_equation_head_by_head() -> None:
    attention = random_parameters(lambda: Attention(CONFIG, KEY))
    rng = np.random.default_rng(0)
    x, context = (rng.normal(size=(2, length, 12)).astype(np.float32) for length in (3, 5))
    mask = rng.uniform(size=(2, 1, 3, 5)) > 0.4
    mask[..., 0] = True
    bias = rng.normal(size=(1, 3, 3, 5)).astype(np.float32)
    query, key, value, out = (
        np.asarray(weight[...], np.float64)
        for weight in (attention.query, attention.key, attention.value, attention.out)
    )
    expected = np.zeros((2, 3, 12))
    for head in range(3):
        scores = (x @ query[:, head]) @ (context @ key[:, head]).swapaxes(1, 2) + bias[:, head]
        weights = np.where(mask[:, 0], np.exp(scores), 0)
        weights /= weights.sum(axis=-1, keepdims=True)
        expected += weights @ (context @ value[:, head]) @ out[head]
    actual = attention(
        jnp.asarray(x), attention.keys_values(jnp.asarray(context)), jnp.asarray(mask), jnp.asarray(bias), None
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)  # float32 against float64


def test_the_gradient_of_a_bias_that_rows_share_is_the_sum_of_those_of_each_row() -> None:
    rows, heads, length, width = 3, 2, 5, 4
    query, keys, values = jax.random.normal(KEY, (3, rows, length, heads, width))
    shared = jax.random.normal(jax.random.key(1), (1, heads, length, length))
    mask = jnp.ones((rows, 1, length, length), bool)

    def loss(bias: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(attend(query, keys, values, mask, bias, 0.0, None)))

    alike = jnp.repeat(shared, rows, axis=0)
    np.testing.assert_allclose(loss(shared), loss(alike), rtol=1e-6)
    expected = jnp.sum(jax.grad(loss)(alike), axis=0, keepdims=True)
    np.testing.assert_allclose(jax.grad(loss)(shared), expected, rtol=1e-5, atol=1e-6)


def test_weights_are_kept_in_the_models_dtype_and_gradients_are_those_of_jaxs_softmax() -> None:
    shape = (2, 16, 3, 8)
    mask = jnp.tril(jnp.ones((2, 1, 16, 16), bool))

    def gradients(dtype: str, recomputed: bool) -> tuple[list[jax.Array], list[jax.Array]]:
        def attended(*inputs: jax.Array) -> jax.Array:
            return attend(*inputs, mask, None, 0.0, None, recomputed)

        y, backward = jax.vjp(attended, *jax.random.normal(KEY, (3, *shape)).astype(dtype))
        return jax.tree.leaves(backward), list(backward(jnp.ones_like(y) + y))

    def wide(kept: list[jax.Array]) -> int:
        return sum(leaf.shape == (2, 3, 16, 16) and leaf.dtype == jnp.float32 for leaf in kept)

    kept, narrow = gradients("bfloat16", False)
    assert wide(kept) == wide(gradients("bfloat16", True)[0]) - 1
    wanted = gradients("float32", True)[1]
    for found, tolerance in ((gradients("float32", False)[1], 1e-5), (narrow, 0.02)):
        for one, other in zip(found, wanted, strict=True):
            assert np.linalg.norm(one.astype(np.float32) - other) < tolerance * np.linalg.norm(other)


@pytest.mark.parametrize(("kv_heads", "bias_rows"), [(6, 1), (6, 2), (2, None)])
def test_a_kernel_is_asked_for_the_same_attention(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, bias_rows: int | None
) -> None:
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(2, 6, 6, 8)), jnp.bfloat16)
    keys, values = (jnp.asarray(rng.normal(size=(2, 4, kv_heads, 8)), jnp.bfloat16) for _ in range(2))
    bias = None if bias_rows is None else jnp.asarray(rng.normal(size=(bias_rows, 6, 6, 4)), jnp.float32)
    mask = jnp.asarray(rng.random((2, 1, 6, 4)) < 0.7).at[..., 0].set(True)

    def outcome(dtype: str) -> tuple[list[jax.Array], bool]:
        asked = []

        def kernel(*arrays: jax.Array, scale: float, implementation: str) -> jax.Array:
            asked.append(implementation)
            return plain(*arrays, scale=scale, implementation="xla")

        monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)

        def loss(arrays: list[jax.Array | None]) -> jax.Array:
            y = attend(*arrays[:3], mask, arrays[3], 0.1, None)
            return jnp.sum(jnp.square(y.astype(jnp.float32)))

        inputs = [x.astype(dtype) for x in (query, keys, values)]
        with jax.numpy_dtype_promotion("standard"):  # for what stands in for the kernel
            return jax.tree.leaves(jax.value_and_grad(loss)([*inputs, bias])), asked == ["cudnn"]

    plain = jax.nn.dot_product_attention
    wanted, by_kernel = outcome("float32")
    assert not by_kernel
    card = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")
    monkeypatch.setattr(jax, "devices", lambda: [card])
    assert not outcome("float32")[1]
    found, by_kernel = outcome("bfloat16")
    assert by_kernel
    for one, other in zip(found, wanted, strict=True):
        assert np.linalg.norm(one.astype(np.float32) - other) < 0.03 * np.linalg.norm(other)


def test_a_query_with_nothing_to_see_gives_finite_values_and_gradients() -> None:
    attention = random_parameters(lambda: Attention(CONFIG, KEY))
    mask = jnp.zeros((1, 1, 2, 2), bool)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(attention(x, attention.keys_values(x), mask, None, None)))(
        jnp.ones((1, 2, 12))
    )
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_bfloat16_attention_is_close_to_float32() -> None:
    attention = random_parameters(lambda: Attention(replace(CONFIG, num_heads=1, d_head=12), KEY))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 64, 12))).astype(jnp.bfloat16)
    mask = jnp.ones((1, 1, 64, 64), bool)
    low, wide = (
        attention(x, attention.keys_values(x), mask, None, None),
        attention(x.astype(jnp.float32), attention.keys_values(x.astype(jnp.float32)), mask, None, None),
    )
    assert low.dtype == jnp.bfloat16
    # Inputs, products and weights are rounded to 8 bits, a few times each; the outputs are of about 1.
    np.testing.assert_allclose(low.astype(jnp.float32), wide, atol=0.05)


def test_queries_start_smaller_by_root_d_head() -> None:
    attention = Attention(replace(CONFIG, d_model=256, num_heads=8, d_head=64), KEY)
    # 131072 draws each: the variance's standard error is 0.4 %.
    np.testing.assert_allclose(np.var(attention.query[...]), 0.1 / (256 * 64), rtol=0.02)
    np.testing.assert_allclose(np.var(attention.key[...]), 0.1 / 256, rtol=0.02)
    np.testing.assert_allclose(np.var(attention.out[...]), 0.1 / (8 * 64), rtol=0.02)


def test_a_window_hides_all_but_the_last_keys() -> None:
    segments = jnp.asarray([[1, 1, 1, 1, 1, 2, 2, 0]])
    mask = np.asarray(attention_mask(segments, segments, causal=True, window=3))[0, 0]
    for query in range(8):
        for key in range(8):
            same = segments[0, query] == segments[0, key]
            assert mask[query, key] == (same and query - 3 < key <= query)


@pytest.mark.parametrize("window", [0, 3])
def test_the_mask_of_a_cache_is_that_of_the_text_read_so_far(window: int) -> None:
    segments = jnp.ones((1, 8), jnp.int32)
    whole = np.asarray(attention_mask(segments, segments, causal=True, window=window))[0, 0]
    positions = jnp.asarray([[4, 5], [0, 7]])
    np.testing.assert_array_equal(cached_mask(positions, 8, window)[:, 0], whole[np.asarray(positions)])


def test_positions_count_from_0_in_each_packed_sequence() -> None:
    segments = jnp.asarray([[1, 1, 1, 2, 2, 3, 0, 0], [1] * 8])
    np.testing.assert_array_equal(positions_in_segments(segments), [[0, 1, 2, 0, 1, 0, 0, 1], list(range(8))])


def test_sinusoids_are_the_papers() -> None:
    vectors = np.asarray(sinusoids(7, 8))
    for position in range(7):
        angles = [position / 10_000 ** (2 * i / 8) for i in range(4)]
        np.testing.assert_allclose(vectors[position], [*np.sin(angles), *np.cos(angles)], rtol=1e-5, atol=1e-6)


def test_rotation_is_by_the_papers_angles_and_a_score_knows_the_distance_alone() -> None:
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(1, 6, 2, 8)), jnp.float32) for _ in range(2))
    at = jnp.arange(6)[None]
    turned = np.asarray(rotate(query, at, 100.0))
    for position in range(6):
        for pair in range(4):
            angle = position * 100.0 ** (-2 * pair / 8)
            a, b = np.asarray(query)[0, position, :, pair], np.asarray(query)[0, position, :, pair + 4]
            expected = [a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)]
            np.testing.assert_allclose(turned[0, position][:, [pair, pair + 4]].T, expected, rtol=1e-5, atol=1e-6)

    def scores(shift: int) -> np.ndarray:
        return np.einsum("bqha,blha->bhql", rotate(query, at + shift, 100.0), rotate(key, at + shift, 100.0))

    np.testing.assert_allclose(scores(11), scores(0), rtol=1e-4, atol=1e-5)  # float32 sines of larger angles


def test_grouped_heads_are_full_heads_whose_keys_and_values_repeat() -> None:
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(2, 5, 6, 4)), jnp.float32)
    keys, values = (jnp.asarray(rng.normal(size=(2, 7, 2, 4)), jnp.float32) for _ in range(2))
    mask, bias = jnp.ones((2, 1, 5, 7), bool), jnp.asarray(rng.normal(size=(1, 6, 5, 7)), jnp.float32)
    repeated = (jnp.repeat(x, 3, axis=2) for x in (keys, values))
    expected = attend(query, *repeated, mask, bias, 0.0, None)
    np.testing.assert_allclose(attend(query, keys, values, mask, bias, 0.0, None), expected, rtol=1e-5, atol=1e-6)


def test_scores_over_the_root_of_the_heads_dimension_are_those_of_a_smaller_query() -> None:
    config = replace(CONFIG, scale_scores=True)
    scaled = random_parameters(lambda: Attention(config, KEY))
    plain = random_parameters(lambda: Attention(CONFIG, KEY))
    plain.query[...] = scaled.query[...] / 2  # sqrt(4)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 12)), jnp.float32)
    mask = jnp.ones((2, 1, 5, 5), bool)
    actual, expected = (layer(x, layer.keys_values(x), mask, None, None) for layer in (scaled, plain))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)
