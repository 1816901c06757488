"""PEER: product keys against all pairs, the layer against a loop over tokens, and the same on every mesh."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from switchjax.config import MeshConfig, MoEConfig, UserError
from switchjax.moe import peer
from switchjax.moe.peer import PEERLayer, apply_neurons, product_key_top_k
from switchjax.moe.routing import RoutingReport
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import named_leaves, parameter_shardings, with_leaves
from switchjax.planning.hlo_collectives import count_collectives
from tests.moe.layers import D, make_inputs
from tests.parameters import random_parameters

KEY = jax.random.key(7)
SIDE, HEADS, SELECTED, QUERY = 8, 2, 3, 6
AVERAGES = ("norm_mean", "norm_variance")


def config_of(num_experts: int, heads: int = HEADS, selected: int = SELECTED, query: int = QUERY) -> MoEConfig:
    options = {"peer_heads": heads, "peer_query": query}
    return MoEConfig(num_experts=num_experts, num_selected_experts=selected, options=options)


def make_layer(seed: int = 0, side: int = SIDE) -> PEERLayer:
    """A layer, by default with 64 experts, whose sub-keys, scales and variances make gates differ."""
    layer = random_parameters(lambda: PEERLayer(D, config_of(side**2), jax.random.key(0)), seed)
    layer.sub_keys[...] *= 4
    layer.norm_scale[...] += 1
    layer.norm_variance[...] = jnp.square(layer.norm_variance[...]) + 0.5
    return layer


def loss_and_everything(layer: PEERLayer, x: jax.Array, mask: jax.Array, key: jax.Array | None) -> tuple[Any, Any]:
    """A loss with a different gradient for every output, with the outputs and the sums that move the averages."""
    y, sums = output_and_sums(layer, x, mask, key)
    return jnp.sum(jnp.sin(y)), (y, sums)


def output_and_sums(layer: PEERLayer, x: jax.Array, mask: jax.Array, key: jax.Array | None) -> tuple[Any, Any]:
    y, report = layer(x, mask, key)
    assert report == RoutingReport(state_sums=report.state_sums), "nothing else is reported"
    return y, report.state_sums


run = jax.jit(output_and_sums)
run_with_gradients = jax.jit(jax.value_and_grad(loss_and_everything, argnums=(0, 1), has_aux=True))


def gelu(z: float) -> float:
    """GELU in the tanh form of `jax.nn.gelu`."""
    return z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def peer_oracle(
    weights: Mapping[str, np.ndarray], x: np.ndarray, mask: np.ndarray, training: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs [B, L, D] and experts [B, L, H, k] in float64, token by token, over all pairs of sub-keys."""
    query = np.einsum("bld,dhsq->blhsq", x, weights["query"])
    mean, variance = weights["norm_mean"], weights["norm_variance"]
    if training:
        mean, variance = query[mask].mean(axis=0), query[mask].var(axis=0)
    query = (query - mean) / np.sqrt(variance + 1e-5) * weights["norm_scale"] + weights["norm_bias"]
    side = weights["sub_keys"].shape[1]
    y, experts = np.zeros_like(x), np.zeros((*mask.shape, HEADS, SELECTED), int)
    for b, t, h in product(*(range(size) for size in (*mask.shape, HEADS))):
        if not mask[b, t]:
            continue
        first, second = (weights["sub_keys"][s] @ query[b, t, h, s] for s in (0, 1))
        score = {i * side + j: first[i] + second[j] for i, j in product(range(side), repeat=2)}
        experts[b, t, h] = sorted(score, key=lambda e: -score[e])[:SELECTED]
        gates = np.exp([score[e] for e in experts[b, t, h]])
        for gate, e in zip(gates / gates.sum(), experts[b, t, h], strict=True):
            y[b, t] += gate * gelu(weights["down"][e] @ x[b, t]) * weights["up"][e]
    return y, experts


def float64(layer: PEERLayer) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(layer).items()}


@pytest.mark.parametrize(("side", "selected"), [(1, 1), (4, 4), (16, 5), (32, 16)])
def test_product_keys_find_the_best_of_all_pairs(side: int, selected: int) -> None:
    scores = np.random.default_rng(side).normal(size=(20, 2, side)).astype(np.float32)
    sums = (scores[:, 0, :, None] + scores[:, 1, None, :]).reshape(20, -1)
    values, index = jax.jit(product_key_top_k, static_argnums=1)(scores, selected)
    # The same float32 sums: equal to the last bit.
    np.testing.assert_array_equal(values, -np.sort(-sums, axis=1)[:, :selected])
    np.testing.assert_array_equal(index, np.argsort(-sums, axis=1)[:, :selected])


def test_product_keys_with_ties_are_distinct_and_best() -> None:
    scores = np.random.default_rng(0).integers(0, 3, size=(50, 2, 6)).astype(np.float32)
    sums = (scores[:, 0, :, None] + scores[:, 1, None, :]).reshape(50, -1)
    values, index = (np.asarray(a) for a in jax.jit(product_key_top_k, static_argnums=1)(scores, 5))
    np.testing.assert_array_equal(values, -np.sort(-sums, axis=1)[:, :5])
    np.testing.assert_array_equal(np.take_along_axis(sums, index, axis=1), values)
    assert all(len(set(row)) == 5 for row in index)


@pytest.mark.parametrize("key", [None, KEY], ids=["eval", "train"])
def test_the_layer_is_the_loop_over_tokens(key: jax.Array | None) -> None:
    layer, (x, mask) = make_layer(), make_inputs()
    y, _ = run(layer, x, mask, key)
    expected, experts = peer_oracle(float64(layer), x.astype(np.float64), mask, key is not None)
    assert len(np.unique(experts[mask])) > 30, "few experts are in use: the test sees too little"
    # float32 sums of some 10 numbers of about 1.
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", [None, KEY], ids=["eval", "train"])
def test_gradients_are_finite_differences_of_the_loop(key: jax.Array | None) -> None:
    layer, (x, mask) = make_layer(), make_inputs(rows=4)
    _, (gradient, dx) = run_with_gradients(layer, x, mask, key)
    gradients = {**named_leaves(gradient), "x": dx}
    at = {**float64(layer), "x": x.astype(np.float64)}

    def loss(point: Mapping[str, np.ndarray]) -> float:
        return np.sin(peer_oracle(point, point["x"], mask, key is not None)[0]).sum()

    rng = np.random.default_rng(1)
    for name in sorted(at.keys() - set(AVERAGES)):
        direction, step = rng.normal(size=at[name].shape), 1e-6
        ahead, behind = (loss(at | {name: at[name] + sign * step * direction}) for sign in (1, -1))
        # Gradients in float32, sums of up to a thousand terms of about 1.
        actual = np.sum(np.asarray(gradients[name], np.float64) * direction)
        np.testing.assert_allclose(actual, (ahead - behind) / (2 * step), rtol=1e-3, atol=1e-3, err_msg=name)


def statistics_of(layer: PEERLayer, x: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """The mean and variance of a batch's queries, in float64."""
    query = np.einsum("bld,dhsq->blhsq", x.astype(np.float64), float64(layer)["query"])[mask]
    return dict(zip(AVERAGES, (query.mean(axis=0), query.var(axis=0)), strict=True))


def test_running_averages_move_a_tenth_of_the_way_to_the_batchs_statistics() -> None:
    layer, (x, mask) = make_layer(), make_inputs()
    y, sums = run(layer, x, mask, KEY)
    assert sums.keys() == {*AVERAGES, "batches"}
    assert sums["batches"] == 1
    moved = layer.next_state(sums)
    assert moved.keys() == set(AVERAGES)
    for name, batch in statistics_of(layer, x, mask).items():
        average = float64(layer)[name]
        # Float32 means of about 100 numbers.
        np.testing.assert_allclose(sums[name], batch, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(moved[name], 0.9 * average + 0.1 * batch, rtol=1e-4, atol=1e-5)
        assert np.abs(moved[name] - average).max() > 0.01
        assert getattr(layer, name).get_metadata("trained") is False
    # With the averages at the batch's own, evaluation normalises as training did.
    there = with_leaves(layer, named_leaves(layer) | {name: sums[name] for name in AVERAGES})
    np.testing.assert_allclose(run(there, x, mask, None)[0], y, rtol=1e-4, atol=1e-5)
    for name, value in there.next_state(sums).items():  # and they stay
        np.testing.assert_allclose(value, sums[name], rtol=1e-6)


def test_micro_batches_of_a_step_count_alike_and_one_of_padding_not_at_all() -> None:
    layer, (x, mask) = make_layer(), make_inputs()
    # The second is shorter, but the averages move to the mean of both.
    parts = [(x[:12], mask[:12]), (x[12:], mask[12:])]
    empty = (np.full_like(x[:4], 5.0), np.zeros_like(mask[:4]))
    sums = [run(layer, *part, KEY)[1] for part in (*parts, empty)]
    total = jax.tree.map(lambda *values: sum(values), *sums)
    assert total["batches"] == 2
    first, second = (statistics_of(layer, *part) for part in parts)
    moved = layer.next_state(total)
    for name in AVERAGES:
        average = float64(layer)[name]
        expected = average + 0.1 * ((first[name] + second[name]) / 2 - average)
        np.testing.assert_allclose(moved[name], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(first["norm_mean"] - second["norm_mean"]).max() > 0.05


@pytest.mark.parametrize("key", [None, KEY], ids=["eval", "train"])
def test_averages_get_no_gradient_and_the_statistics_give_none(key: jax.Array | None) -> None:
    layer, (x, mask) = make_layer(), make_inputs()
    _, (gradient, _) = run_with_gradients(layer, x, mask, key)
    for name, values in named_leaves(gradient).items():
        assert np.any(values != 0) == (name not in AVERAGES), name

    def total(layer: PEERLayer, x: jax.Array) -> jax.Array:
        sums = output_and_sums(layer, x, jnp.asarray(mask), key)[1]
        return sum((jnp.sum(jnp.sin(value)) for value in sums.values()), jnp.zeros(()))

    for values in jax.tree.leaves(jax.jit(jax.grad(total, argnums=(0, 1)))(layer, x)):
        np.testing.assert_array_equal(values, 0)


def test_evaluation_reports_nothing_and_a_batch_of_padding_leaves_the_averages_alone() -> None:
    layer, (x, mask) = make_layer(), make_inputs()
    y, sums = run(layer, x, mask, None)
    assert sums == {}
    assert np.all(np.isfinite(y))
    (_, (y, sums)), gradients = run_with_gradients(layer, x, np.zeros_like(mask), KEY)
    assert all(np.all(np.isfinite(values)) for values in jax.tree.leaves((y, gradients)))
    for values in sums.values():
        np.testing.assert_array_equal(values, 0)
    for name, values in layer.next_state(sums).items():
        np.testing.assert_array_equal(values, named_leaves(layer)[name])
    # Which padding holds is without effect on what moves them.
    expected = run(layer, x, mask, KEY)[1]
    other = run(layer, np.where(mask[..., None], x, np.float32(3)), mask, KEY)[1]
    jax.tree.map(np.testing.assert_array_equal, other, expected)


def test_padding_takes_part_in_nothing() -> None:
    layer, (x, mask) = make_layer(), make_inputs()
    for key in (None, KEY):  # to the last bit
        expected = run_with_gradients(layer, x, mask, key)
        other = run_with_gradients(layer, np.where(mask[..., None], x, np.float32(np.nan)), mask, key)
        jax.tree.map(np.testing.assert_array_equal, other, expected)
        (_, (y, _)), (_, dx) = expected
        np.testing.assert_array_equal(np.asarray(y)[~mask], 0)
        np.testing.assert_array_equal(np.asarray(dx)[~mask], 0)


def test_in_evaluation_a_token_knows_of_no_other() -> None:
    layer, (x, mask) = make_layer(), make_inputs()
    y, _ = run(layer, x, mask, None)
    other = x.copy()
    other[1:], other[0, 3:] = 1.0, 2.0
    np.testing.assert_array_equal(run(layer, other, mask, None)[0][0, :3], y[0, :3])


def test_only_selected_experts_have_gradients() -> None:
    layer, (x, mask) = make_layer(side=16), make_inputs()
    _, (gradient, _) = run_with_gradients(layer, x, mask, None)
    _, experts = peer_oracle(float64(layer), x.astype(np.float64), mask, training=False)
    used = np.isin(np.arange(16**2), experts[mask])
    assert 0 < used.sum() < 16**2
    for table in (gradient.down[...], gradient.up[...]):
        np.testing.assert_array_equal(np.any(table != 0, axis=1), used)


def test_chunks_of_tokens_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    tokens, selected, experts = 11, 3, 20
    x, down, up = (rng.normal(size=(n, D)).astype(np.float32) for n in (tokens, experts, experts))
    index = rng.integers(0, experts + 1, size=(tokens, selected))  # some are no expert
    gate = rng.uniform(size=(tokens, selected)).astype(np.float32)

    def results(elements: int) -> Any:
        monkeypatch.setattr(peer, "CHUNK_ELEMENTS", elements)

        def loss(x: jax.Array, gate: jax.Array, down: jax.Array, up: jax.Array) -> tuple[jax.Array, jax.Array]:
            y = apply_neurons(x, jnp.asarray(index), gate, down, up)
            return jnp.sum(jnp.sin(y)), y

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(x, gate, down, up)

    whole = results(tokens * selected * D)
    for elements in (4 * selected * D, 1):  # chunks of 4, 4 and 3 tokens; of one
        # float32 sums in another order.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), results(elements), whole)


def test_memory_for_rows_does_not_grow_with_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    width, selected, experts = 64, 16, 32
    monkeypatch.setattr(peer, "CHUNK_ELEMENTS", 8 * selected * width)

    def temporaries(tokens: int) -> int:
        x, gate, table = (jnp.ones(shape) for shape in ((tokens, width), (tokens, selected), (experts, width)))
        index = jnp.zeros((tokens, selected), int)
        program = jax.jit(jax.grad(lambda x, gate, *tables: jnp.sum(apply_neurons(x, index, gate, *tables) ** 2)))
        return program.lower(x, gate, table, table).compile().memory_analysis().temp_size_in_bytes

    rows = 4 * selected * width  # bytes of a token's rows of one table
    assert temporaries(256) - temporaries(128) < 128 * rows / 2
    monkeypatch.setattr(peer, "CHUNK_ELEMENTS", 1024 * selected * width)
    assert temporaries(256) - temporaries(128) > 128 * rows


@pytest.mark.parametrize("key", [None, KEY], ids=["eval", "train"])
@pytest.mark.parametrize("shape", [(2, 4, 1), (1, 8, 1), pytest.param((2, 2, 2), marks=pytest.mark.slow)])
def test_outputs_and_gradients_on_a_mesh_are_those_of_one_device(
    shape: tuple[int, int, int], key: jax.Array | None
) -> None:
    layer, (x, mask) = make_layer(), make_inputs()
    expected = run_with_gradients(layer, x, mask, key)
    mesh = make_mesh(MeshConfig(*shape))
    with jax.set_mesh(mesh):
        placed = jax.device_put(layer, parameter_shardings(layer, mesh))
        inputs = jax.device_put((x, mask), NamedSharding(mesh, peer.partition_spec("batch")))
        program = run_with_gradients.lower(placed, *inputs, key).compile()
        actual = program(placed, *inputs, key)
    # float32 sums over 128 tokens, in the order of another mesh.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)
    counts = count_collectives(program)
    # Out: tokens, indices and gates; in the backward pass the outputs' gradients. The rest are sums over the batch.
    assert counts["all-gather"] == 4
    assert counts["reduce-scatter"] == 3
    assert counts.keys() == {"all-gather", "reduce-scatter", "all-reduce"}


def test_a_bfloat16_model_selects_as_float32_would() -> None:
    layer, (x, mask) = make_layer(), make_inputs()
    low = jnp.asarray(x).astype(jnp.bfloat16)
    for name in ("down", "up"):
        table = getattr(layer, name)
        table[...] = table[...].astype(jnp.bfloat16).astype(jnp.float32)
    exact, _ = run(layer, low.astype(jnp.float32), mask, KEY)
    layer.down, layer.up = (jax.tree.map(lambda t: t.astype(jnp.bfloat16), t) for t in (layer.down, layer.up))
    y, sums = run(layer, low, mask, KEY)
    assert y.dtype == jnp.bfloat16
    assert all(values.dtype == jnp.float32 for values in sums.values())
    assert len(sums) == 3
    # Sums of 6 numbers below 1 in 8 bits; another expert would be off by its whole share.
    np.testing.assert_allclose(y.astype(jnp.float32), exact, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_experts": 60}, r"a square number of experts, got 60: the nearest are 49 and 64"),
        ({"selected": 9}, r"of 64 experts selects at most 8 .*, got 9"),
        ({"query": 7}, r"moe\.options\.peer_query=7 is odd"),
        ({"query": 0}, r"moe\.options\.peer_query must be positive, got 0"),
        ({"heads": 0}, r"moe\.options\.peer_heads must be positive, got 0"),
        ({"heads": "2"}, r"moe\.options\.peer_heads must be of type int, got '2'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PEERLayer(D, config_of(**({"num_experts": 64} | sizes)), KEY)


def test_a_misspelt_option_is_refused_with_the_one_that_was_meant() -> None:
    config = MoEConfig(num_experts=64, options={"peer_head": 2})
    with pytest.raises(UserError, match=r"'moe\.options\.peer_head' \(did you mean 'peer_heads'\?\)"):
        PEERLayer(D, config, KEY)


def test_initial_parameters() -> None:
    layer = jax.jit(lambda key: PEERLayer(64, config_of(32**2, 4, 3, 32), key, jnp.bfloat16))(KEY)
    fan_in = {"query": 64, "sub_keys": 16, "down": 64, "up": 4}
    for name, parameter in named_leaves(layer).items():
        assert parameter.dtype == (jnp.bfloat16 if name in ("down", "up") else jnp.float32), name
        if name in fan_in:
            # Standard deviations of at least a thousand numbers.
            np.testing.assert_allclose(parameter.astype(jnp.float32).std(), (0.1 / fan_in[name]) ** 0.5, rtol=0.1)


@pytest.mark.slow
def test_a_million_experts() -> None:
    heads, selected, d_model, side = 8, 16, 64, 1024
    layer = jax.jit(lambda key: PEERLayer(d_model, config_of(side**2, heads, selected, 128), key))(KEY)
    x = np.random.default_rng(0).normal(size=(2, 128, d_model)).astype(np.float32)
    mask = np.ones((2, 128), bool)
    mask[1, 100:] = False
    program = run_with_gradients.lower(layer, x, mask, KEY).compile()
    memory = program.memory_analysis()
    print(f"temporaries: {memory.temp_size_in_bytes / 2**20:.0f} MiB")
    # Besides the tables and their gradients: a table of zeros that both gradients start from, scores and chunks.
    assert memory.temp_size_in_bytes < 1.25 * 4 * side**2 * d_model
    (_, (y, _)), (gradient, dx) = program(layer, x, mask, KEY)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((y, gradient, dx)))

    weights = {name: np.asarray(leaf) for name, leaf in named_leaves(layer).items()}
    query = np.einsum("bld,dhsq->blhsq", x.astype(np.float64), weights["query"])
    query = (query - query[mask].mean(axis=0)) / np.sqrt(query[mask].var(axis=0) + 1e-5)
    halves = np.einsum("blhsq,snq->blhsn", query, weights["sub_keys"])
    for b, t in ((0, 0), (0, 77), (1, 99)):
        expected = np.zeros(d_model)
        for first, second in halves[b, t]:
            scores = (first[:, None] + second).reshape(-1)
            best = np.argpartition(-scores, selected)[:selected]
            for gate, e in zip(np.exp(scores[best]) / np.exp(scores[best]).sum(), best, strict=True):
                expected += gate * gelu(weights["down"][e] @ x[b, t]) * weights["up"][e]
        # 128 numbers below 0.1 in float32.
        np.testing.assert_allclose(y[b, t], expected, rtol=1e-4, atol=1e-5)

    place = np.argsort(-halves, axis=-1)[..., :selected]
    best = np.take_along_axis(halves, place, axis=-1)
    sums = (best[..., 0, :, None] + best[..., 1, None, :]).reshape(*mask.shape, heads, -1)
    index = (place[..., 0, :, None] * side + place[..., 1, None, :]).reshape(sums.shape)
    experts = np.take_along_axis(index, np.argsort(-sums, axis=-1)[..., :selected], axis=-1)
    used = np.unique(experts[mask])
    for table in (gradient.down[...], gradient.up[...]):
        touched = np.flatnonzero(np.any(np.asarray(table) != 0, axis=1))
        # Float32 may order the last two scores of a head otherwise.
        assert len(np.setxor1d(touched, used)) <= 2
        assert len(used) > 5000
