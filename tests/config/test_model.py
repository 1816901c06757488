"""Fields of the section `model` change what the network computes or draws."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest

from switchjax.config import Config, ModelConfig
from switchjax.models.attention import Attention, RelativePositionBias, attend, relative_position_bucket, rotate
from switchjax.models.layers import Embedding, learned_positions, project
from tests.models import examples, families
from tests.models.families import FAMILIES
from tests.parameters import random_parameters
from tests.tiny import changed

KEY = jax.random.key(0)
SMALL = ModelConfig(d_model=12, num_heads=3, d_head=4, relative_buckets=8, relative_max_distance=16)
Shape = tuple[int, ...]


def random_draws(jaxpr: jex.core.Jaxpr) -> Iterator[Shape]:
    """The shapes of the random numbers that a program draws; the body of a loop counts once."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "random_bits":
            yield equation.params["shape"]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=is_program):
            if is_program(inner):
                yield from random_draws(getattr(inner, "jaxpr", inner))


def is_program(value: object) -> bool:
    return isinstance(value, jex.core.Jaxpr | jex.core.ClosedJaxpr)


def draws_of(config: Config) -> Counter[Shape]:
    """The shapes of the random numbers of a training pass, without noise in routers."""
    config = changed(config, moe={"jitter_noise": 0.0})
    source = examples if config.model.family == "encoder_decoder" else families
    program = jax.make_jaxpr(lambda model, batch: model(batch, KEY)[0])
    return Counter(random_draws(program(source.make_model(config), source.make_batch(config)).jaxpr))


ROWS, LENGTH, MEMORY = 8, 8, 16
"""Sizes of the encoder-decoder's batch: rows, and the tokens of decoder and encoder."""
D, F, H = 16, 32, 4


def test_dropout_is_where_t5_has_it() -> None:
    """Dropout follows embedding and final norm of each stack, attention weights, hidden units and each branch."""
    config = changed(examples.TINY, model={"dropout": 0.1, "pattern": ("dense",)}, moe={"expert_dropout": 0.0})
    encoder = {(ROWS, MEMORY, D): 2 + 2, (ROWS, H, MEMORY, MEMORY): 1, (ROWS, MEMORY, F): 1}
    decoder = {
        (ROWS, LENGTH, D): 2 + 3,
        (ROWS, H, LENGTH, LENGTH): 1,
        (ROWS, H, LENGTH, MEMORY): 1,
        (ROWS, LENGTH, F): 1,
    }
    assert draws_of(config) == Counter(encoder) + Counter(decoder)
    assert not draws_of(changed(config, model={"dropout": 0.0}))


LONG = 12
"""Number of tokens in a row of a language model."""
RESIDUAL, WEIGHTS, HIDDEN = (ROWS, LONG, D), (ROWS, H, LONG, LONG), (ROWS, LONG, F)


@pytest.mark.parametrize(
    ("model", "moe", "expected"),
    [
        # Embedding and final norm, and the layer's two branches; an expert's hidden units are expert_dropout's.
        ({"pattern": ("moe",)}, {}, {RESIDUAL: 4, WEIGHTS: 1}),
        # The dense network after the experts has its hidden units and its branch.
        ({"pattern": ("moe_dense",)}, {}, {RESIDUAL: 5, WEIGHTS: 1, HIDDEN: 1}),
        # A shared expert is a dense network.
        ({"pattern": ("moe",)}, {"num_shared_experts": 1}, {RESIDUAL: 4, WEIGHTS: 1, HIDDEN: 1}),
    ],
    ids=["moe", "moe_dense", "shared"],
)
def test_dropout_of_layers_with_experts(
    model: dict[str, object], moe: dict[str, object], expected: dict[Shape, int]
) -> None:
    config = changed(FAMILIES["gpt"], model=model | {"dropout": 0.1}, moe=moe)
    assert draws_of(config) == Counter(expected)


def test_dropout_of_routed_attention() -> None:
    config = changed(
        FAMILIES["gpt"],
        model={"pattern": ("switch_attention",), "positions": "none", "biases": False, "scale_scores": False}
        | {"dropout": 0.1},
    )
    assert draws_of(config) == Counter({RESIDUAL: 4, WEIGHTS: 1, HIDDEN: 1})


def test_dropout_of_a_recurrent_model() -> None:
    """Dropout follows the embedding, the end, and the branches of both LSTM layers and of the experts between them."""
    config = changed(FAMILIES["lstm"], model={"dropout": 0.1})
    assert draws_of(config) == Counter({RESIDUAL: 2 + 3})


def test_expert_dropout_is_on_the_hidden_units_of_each_expert() -> None:
    config = changed(FAMILIES["gpt"], model={"pattern": ("moe",)}, moe={"expert_dropout": 0.1, "group_size": LONG})
    assert [shape[-1] for shape in draws_of(config).elements()] == [F]


def test_attention_drops_its_weights_and_scales_up_the_others() -> None:
    """With equal scores and one-hot values, the output is the weights."""
    queries, keys, rate = 50, 8, 0.25
    query, ones = jnp.zeros((2, queries, 1, keys)), jnp.ones((2, keys, 1, keys))
    values = jnp.broadcast_to(jnp.eye(keys)[None, :, None], ones.shape)
    mask = jnp.ones((2, 1, queries, keys), bool)
    weights = np.asarray(attend(query, ones, values, mask, None, rate, KEY))
    np.testing.assert_allclose(np.unique(weights), [0, 1 / keys / (1 - rate)], rtol=1e-6)
    kept = np.mean(weights > 0)
    np.testing.assert_allclose(kept, 1 - rate, atol=5 * np.sqrt(rate * (1 - rate) / weights.size))  # 5 standard errors


def test_keys_and_queries_turn_by_the_rotary_base() -> None:
    attention = random_parameters(lambda: Attention(replace(SMALL, positions="rotary", rotary_base=100.0), KEY))
    x, at = jax.random.normal(KEY, (2, 5, 12)), jnp.broadcast_to(jnp.arange(5) * 3, (2, 5))
    mask = jnp.ones((2, 1, 5, 5), bool)
    query, keys, values = (project(x, w[...]) for w in (attention.query, attention.key, attention.value))
    mixed = attend(rotate(query, at, 100.0), rotate(keys, at, 100.0), values, mask, None, 0.0, None)
    actual = attention(x, attention.keys_values(x, at), mask, None, None, at)
    np.testing.assert_allclose(actual, project(mixed, attention.out[...], 2), rtol=1e-5, atol=1e-6)


def test_the_bias_has_the_configs_buckets_up_to_its_largest_distance() -> None:
    bias = random_parameters(lambda: RelativePositionBias(SMALL, True, KEY))
    distance = jnp.arange(40) - 20
    buckets = relative_position_bucket(distance[None], True, 8, 16)[0]
    assert buckets.max() == 7
    np.testing.assert_array_equal(bias(jnp.array([[20]]), 40)[0, :, 0], bias.bias[...][:, buckets])


def test_vectors_start_with_the_configs_deviation() -> None:
    config = replace(SMALL, vocab_size=3000, embedding_stddev=0.02, family="decoder_only", positions="learned")
    positions = learned_positions(config, 3000, KEY)
    assert positions is not None
    for vectors in (Embedding(config, KEY).vectors, positions):
        np.testing.assert_allclose(np.std(vectors[...]), 0.02, rtol=0.02)  # 36000 draws: 5 standard errors


def test_scores_over_root_d_head_let_queries_start_as_large_as_keys() -> None:
    attention = Attention(replace(SMALL, d_model=256, num_heads=8, d_head=64, scale_scores=True), KEY)
    np.testing.assert_allclose(np.var(attention.query[...]), 0.1 / 256, rtol=0.02)  # 131072 draws: 5 standard errors


def test_pre_logits_go_through_tanh() -> None:
    """However large the weights before the tanh are, no logit exceeds the sum of the head's weights."""
    config = FAMILIES["v_moe"]
    model, batch = families.make_model(config), families.make_batch(config)
    model.pre_logits[...] *= 1e4
    most = jnp.sum(jnp.abs(model.head[...]), axis=0) + jnp.abs(model.head_bias[...])
    logits = families.forward(model, batch, None)
    assert np.all(np.abs(logits) <= most[None, None] * (1 + 1e-6))
    assert np.any(np.abs(logits) > 0.5 * most[None, None])
