"""The BASE layer: a residual layer that starts as the identity, with tokens from the whole batch in each group."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from switchjax.config import MeshConfig, ModelConfig, MoEConfig, UserError
from switchjax.models.blocks import NormedExpert
from switchjax.moe.base_layer import BaseLayer, shuffle, unshuffle
from switchjax.parallel.mesh import make_mesh
from switchjax.parallel.sharding import named_leaves, parameter_shardings, partition_spec
from switchjax.planning.hlo_collectives import count_collectives
from tests.moe.layers import LENGTH, ROWS, D, TinyExpert, make_inputs, output_and_sums
from tests.parameters import random_parameters

KEY = jax.random.key(7)
MESH = (2, 4, 1)
SHARDS = 8


def build(norm: str = "rms", **changes: Any) -> BaseLayer:
    """A new layer; groups of 2 rows, one for each shard of the mesh."""
    settings = {"router": "base", "num_experts": 4, "group_size": 2 * LENGTH, "jitter_noise": 0.0} | changes
    make_expert = partial(NormedExpert, partial(TinyExpert, 0.0), ModelConfig(d_model=D, norm=norm, norm_epsilon=1e-2))
    return BaseLayer(make_expert, D, MoEConfig(**settings), jax.random.key(0))


def make_layer(norm: str = "rms", **changes: Any) -> BaseLayer:
    return random_parameters(partial(build, norm, **changes))


@contextmanager
def on_mesh(*trees: Any, shape: tuple[int, int, int] = MESH) -> Iterator[list[Any]]:
    """Layers and inputs, divided over the mesh in context."""
    mesh = make_mesh(MeshConfig(*shape))
    batch = NamedSharding(mesh, partition_spec("batch"))
    with jax.set_mesh(mesh):
        yield [
            jax.device_put(tree, parameter_shardings(tree, mesh) if isinstance(tree, BaseLayer) else batch)
            for tree in trees
        ]


run = jax.jit(output_and_sums)
_shuffle, _unshuffle = jax.jit(shuffle), jax.jit(unshuffle)


@jax.jit
def run_with_gradients(layer: BaseLayer, x: jax.Array, mask: jax.Array, key: jax.Array | None) -> Any:
    def loss(layer: BaseLayer, x: jax.Array) -> tuple[jax.Array, Any]:
        y, sums = output_and_sums(layer, x, mask, key)
        return jnp.sum(jnp.sin(y)), (y, sums)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(layer, x)


def by_hand(layer: BaseLayer, x: np.ndarray, norm: str = "rms") -> np.ndarray:
    """`x + sigmoid(x . w_e) f_e(x)` with each token's best expert, in float64."""
    wide = x.astype(np.float64)
    scores = wide @ np.asarray(layer.moe.router["logits"][...], np.float64)
    experts = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(layer.moe.experts).items()}
    centred = wide - np.mean(wide, axis=-1, keepdims=True) if norm == "layer" else wide
    normed = wide if norm == "none" else centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + 1e-2)
    scale, shift = experts.get("scale", np.ones((4, D))), experts.get("shift", np.zeros((4, D)))
    w_in, w_out = experts["expert/w_in"], experts["expert/w_out"]
    y = np.empty_like(wide)
    for place in np.ndindex(x.shape[:2]):
        e = scores[place].argmax()
        gate = 1 / (1 + np.exp(-scores[place][e]))
        y[place] = wide[place] + gate * np.tanh((normed[place] * scale[e] + shift[e]) @ w_in[e]) @ w_out[e]
    return y


@pytest.mark.parametrize("key", [None, KEY], ids=["eval", "train"])
def test_it_starts_as_the_identity(key: jax.Array | None) -> None:
    layer, (x, mask) = build(), make_inputs()
    assert np.all(layer.moe.experts.expert.w_in[...] != 0)
    np.testing.assert_array_equal(run(layer, x, mask, key)[0], x)


@pytest.mark.parametrize("key", [None, KEY], ids=["eval", "train"])
def test_from_there_the_last_matrices_learn(key: jax.Array | None) -> None:
    layer, (x, mask) = build(), make_inputs()
    _, (gradient, _) = run_with_gradients(layer, x, mask, key)
    assert np.all(np.any(gradient.moe.experts.expert.w_out[...] != 0, axis=(1, 2)))


@pytest.mark.parametrize("norm", ["rms", "layer", "none"])
def test_it_adds_the_best_experts_output_times_the_sigmoid_of_its_score(norm: str) -> None:
    layer, (x, mask) = make_layer(norm, eval_capacity_factor=4.0), make_inputs()
    y, _ = run(layer, x, mask, None)
    expected = np.where(mask[..., None], by_hand(layer, x, norm), x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)  # float32 sums of up to 16 terms


def test_in_training_every_group_gives_each_expert_its_share() -> None:
    layer, (x, _) = make_layer(), make_inputs()
    everyone = np.ones(x.shape[:2], bool)
    same = np.broadcast_to(x[:1, :1], x.shape) + 0.01 * x  # all prefer the same expert
    _, sums = run(layer, same, everyone, KEY)
    np.testing.assert_array_equal(sums["expert_load"], x.shape[0] * x.shape[1] / 4)
    assert sums["dispatched"] == sums["tokens"]
    assert np.count_nonzero(run(layer, same, everyone, None)[1]["expert_load"]) == 1


def test_the_gradient_to_the_embeddings_is_through_the_sigmoid_only() -> None:
    """`dL/dw_e = sum g (1 - g) (dL/dy . f_e) x` over the tokens of e, where the layer adds g f_e."""
    layer, (x, mask) = make_layer(eval_capacity_factor=4.0), make_inputs()
    (_, (y, _)), (gradient, _) = run_with_gradients(layer, x, mask, None)
    wide, added = x.astype(np.float64), np.asarray(y, np.float64) - x
    scores = wide @ np.asarray(layer.moe.router["logits"][...], np.float64)
    gate = 1 / (1 + np.exp(-scores.max(axis=-1)))
    slope = (1 - gate) * np.sum(np.cos(np.asarray(y, np.float64)) * added, axis=-1) * mask
    chosen = scores.argmax(axis=-1)[..., None] == np.arange(4)
    expected = np.einsum("bl,ble,bld->de", slope, chosen, wide)
    np.testing.assert_allclose(gradient.moe.router["logits"][...], expected, rtol=1e-4, atol=1e-4)  # 128 tokens


@pytest.mark.parametrize("key", [None, KEY], ids=["eval", "train"])
def test_padding_comes_back_as_it_is_and_may_hold_anything(key: jax.Array | None) -> None:
    layer, (x, mask) = make_layer(), make_inputs()
    y, sums = run(layer, x, mask, key)
    np.testing.assert_array_equal(np.asarray(y)[~mask], x[~mask])
    other, other_sums = run(layer, np.where(mask[..., None], x, np.float32(-7)), mask, key)
    np.testing.assert_array_equal(np.asarray(other)[mask], np.asarray(y)[mask])
    jax.tree.map(np.testing.assert_array_equal, other_sums, sums)


def test_in_evaluation_a_mesh_changes_nothing() -> None:
    layer, (x, mask) = make_layer(num_experts=8), make_inputs()
    expected = run_with_gradients(layer, x, mask, None)
    with on_mesh(layer, x, mask) as placed:
        actual = run_with_gradients(*placed, None)
    # float32 sums over 128 tokens, in the order of another mesh.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), actual, expected)


def test_in_training_on_a_mesh_each_token_gets_its_own_output_back() -> None:
    """All experts and their embeddings are equal, so it does not matter which expert a token gets."""
    layer, (x, mask) = make_layer(num_experts=8, eval_capacity_factor=8.0), make_inputs()
    layer.moe.experts = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf[:1], leaf.shape), layer.moe.experts)
    logits = layer.moe.router["logits"]
    logits[...] = jnp.broadcast_to(jnp.linspace(-1.0, 1.0, D)[:, None], logits.shape)
    expected = run_with_gradients(layer, x, mask, None)
    for shape in (MESH, (2, 2, 2)):
        with on_mesh(layer, x, mask, shape=shape) as placed:
            actual = run_with_gradients(*placed, KEY)
        (_, (y, sums)), (gradient, dx) = actual
        np.testing.assert_allclose(y, expected[0][1][0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(dx, expected[1][1], rtol=1e-4, atol=1e-5)
        total, expected_total = (np.sum(g.moe.experts.expert.w_in[...], axis=0) for g in (gradient, expected[1][0]))
        np.testing.assert_allclose(total, expected_total, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(sums["dispatched"], mask.sum())


def test_the_shuffle_costs_an_all_to_all_each_way() -> None:
    layer, (x, mask) = make_layer(num_experts=8), make_inputs()
    with on_mesh(layer, x, mask) as placed:
        training, evaluation = (count_collectives(run.lower(*placed, key).compile()) for key in (KEY, None))
    assert evaluation.pop("all-to-all") == 2
    assert training.pop("all-to-all") == 2 + 3  # of tokens, of their mask, and of what comes back
    assert training.keys() | evaluation.keys() <= {"all-reduce"}


def numbered(*more: int) -> np.ndarray:
    """[ROWS, LENGTH, *more], a different number for each token."""
    numbers = np.arange(ROWS * LENGTH, dtype=np.float32).reshape(ROWS, LENGTH, *[1] * len(more))
    return np.broadcast_to(numbers, (ROWS, LENGTH, *more))


class TestShuffle:
    @pytest.mark.parametrize("mesh", [None, MESH, (2, 2, 2), (8, 1, 1)])
    def test_its_inverse_undoes_it_and_what_shares_a_key_stays_together(self, mesh: Any) -> None:
        x, numbers = numbered(3), numbered()
        if mesh is None:
            moved, moved_numbers = _shuffle(x, KEY), _shuffle(numbers, KEY)
            back = _unshuffle(moved, KEY)
        else:
            with on_mesh(x, numbers, shape=mesh) as placed:
                moved, moved_numbers = (_shuffle(tree, KEY) for tree in placed)
                back = _unshuffle(moved, KEY)
        np.testing.assert_array_equal(back, x)
        np.testing.assert_array_equal(moved[..., 0], moved_numbers)
        assert sorted(np.ravel(moved_numbers)) == list(range(ROWS * LENGTH))
        assert np.mean(np.ravel(moved_numbers) == np.ravel(numbers)) < 0.1

    def test_over_a_mesh_tokens_in_a_row_are_of_all_shards(self) -> None:
        with on_mesh(numbered()) as (numbers,):
            origin = np.ravel(_shuffle(numbers, KEY)) // (ROWS * LENGTH // SHARDS)
        np.testing.assert_array_equal(
            np.sort(origin.reshape(-1, SHARDS), axis=1), np.arange(SHARDS)[None].repeat(16, 0)
        )

    def test_each_key_and_each_shard_has_its_own_order(self) -> None:
        with on_mesh(numbered()) as (numbers,):
            first, second = (np.ravel(_shuffle(numbers, key)) for key in (KEY, jax.random.key(8)))
        assert np.mean(first == second) < 0.2
        # What each shard sent to shard 0, as places within the sender.
        sent = first.reshape(SHARDS, -1, SHARDS)[0] % (ROWS * LENGTH // SHARDS)
        assert len({tuple(column) for column in sent.T}) > 1

    def test_its_derivative_is_its_inverse(self) -> None:
        rng = np.random.default_rng(0)
        weights = rng.normal(size=(ROWS, LENGTH)).astype(np.float32)

        def total(x: jax.Array, weights: jax.Array) -> jax.Array:
            return jnp.sum(shuffle(x, KEY) * weights)

        with on_mesh(numbered(), weights) as (x, weights):
            gradient = jax.jit(jax.grad(total))(x, weights)
            expected = _unshuffle(weights, KEY)
        np.testing.assert_array_equal(gradient, expected)

    def test_tokens_that_cannot_be_shared_out_evenly_are_refused(self) -> None:
        with (
            on_mesh(np.zeros((8, 4), np.float32)) as (x,),
            pytest.raises(UserError, match=r"8 x 4 tokens .* must be a multiple of 64"),
        ):
            _shuffle(x, KEY)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"router": "switch"}, "moe.router=switch"), ({"dispatch": "ragged", "dropless": True}, "moe.dispatch=ragged")],
)
def test_what_it_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**changes)


def test_it_has_no_state_that_moves() -> None:
    assert build().next_state({}) == {}
