"""The whole model on one device: which tokens see each other, and equal forms of the same computation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.examples import DROPLESS, TINY, changed, forward, loss_and_gradients, make_batch, make_model

KEY = jax.random.key(5)


def assert_close(actual: object, expected: object, tolerance: float = 1e-5) -> None:
    """Compares leaf by leaf; float32 sums of some hundred terms in another order differ by 1e-6 of the largest."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, float(np.abs(b).max())))


def test_a_packed_sequence_gives_the_logits_of_the_sequence_alone() -> None:
    config = changed(**DROPLESS)
    model, packed = make_model(config), make_batch(config)
    together = np.asarray(forward(model, packed, None))
    for segment in (1, 2):
        # The same tokens, moved to the front of a row of their own.
        alone = {name: np.zeros_like(values) for name, values in packed.items()}
        for name, values in packed.items():
            side = name.split("_")[0]
            for row, inside in enumerate(packed[f"{side}_segments"] == segment):
                alone[name][row, : inside.sum()] = values[row, inside] if "segments" not in name else 1
        logits = np.asarray(forward(model, alone, None))
        for row, inside in enumerate(packed["decoder_segments"] == segment):
            assert_close(together[row, inside], logits[row, : inside.sum()])


def test_the_future_moves_no_logit() -> None:
    config = changed(**DROPLESS)
    model, batch = make_model(config), make_batch(config)
    cut = 3
    other = batch | {"decoder_inputs": batch["decoder_inputs"].copy()}
    other["decoder_inputs"][:, cut:] = (other["decoder_inputs"][:, cut:] + 7) % config.model.vocab_size
    before, after = np.asarray(forward(model, batch, None)), np.asarray(forward(model, other, None))
    np.testing.assert_array_equal(after[:, :cut], before[:, :cut])
    assert not np.allclose(after[:, cut:], before[:, cut:])


def test_tokens_of_padding_may_be_anything() -> None:
    model, batch = make_model(), make_batch()
    other = {name: values if "segments" in name else np.where(values == 0, 9, values) for name, values in batch.items()}
    loss, gradients = loss_and_gradients(model, batch, None)
    other_loss, other_gradients = loss_and_gradients(model, other, None)
    assert loss == other_loss
    assert_close(other_gradients, gradients)


def test_evaluation_is_deterministic_and_training_follows_its_key() -> None:
    config = changed(dropout=0.3, pattern=("dense",), num_encoder_layers=1, num_decoder_layers=1)
    model, batch = make_model(config), make_batch(config)
    np.testing.assert_array_equal(
        forward(model, batch, None), forward(make_model(changed(config, dropout=0.0)), batch, None)
    )
    trained = forward(model, batch, KEY)
    np.testing.assert_array_equal(forward(model, batch, KEY), trained)
    assert not np.allclose(forward(model, batch, jax.random.key(6)), trained)


@pytest.mark.parametrize(
    "form",
    [
        {"scan_layers": False},
        {"remat": "exchange"},
        pytest.param({"remat": "full"}, marks=pytest.mark.slow),
        pytest.param({"remat": "dots"}, marks=pytest.mark.slow),
        pytest.param({"remat": "full", "scan_layers": False}, marks=pytest.mark.slow),
        pytest.param({"dispatch": "einsum"}, marks=pytest.mark.slow),
    ],
)
def test_loops_remat_and_dispatch_change_neither_loss_nor_gradients(form: dict[str, object]) -> None:
    config = changed(pattern=("moe",))  # two periods a stack
    batch = make_batch(config)
    expected = loss_and_gradients(make_model(config), batch, None)
    assert_close(loss_and_gradients(make_model(changed(config, **form)), batch, None), expected)


@pytest.mark.slow
def test_remat_repeats_the_same_noise() -> None:
    config = changed(pattern=("moe",), dropout=0.1, remat="full")
    batch = make_batch(config)
    expected = loss_and_gradients(make_model(changed(config, remat="none")), batch, KEY)
    assert_close(loss_and_gradients(make_model(config), batch, KEY), expected)


def test_every_parameter_gets_a_gradient() -> None:
    _, gradients = loss_and_gradients(make_model(), make_batch(), None)
    without = [jax.tree_util.keystr(path) for path, leaf in jax.tree.leaves_with_path(gradients) if not np.any(leaf)]
    assert without == []


def test_reports_name_their_layers_and_count_the_tokens_of_their_stack() -> None:
    batch, model = make_batch(), make_model()
    reports = jax.jit(lambda model, batch: model(batch, None)[1])(model, batch)
    assert reports.keys() == {f"{stack}/scans/0/blocks/1/ff" for stack in ("encoder", "decoder")}  # one MoE layer in 2
    for stack, segments in model.segments({name: jnp.asarray(values) for name, values in batch.items()}).items():
        report = reports[f"{stack}/scans/0/blocks/1/ff"]
        assert report.layers == (1,)
        np.testing.assert_array_equal(report.metrics.tokens, [np.sum(segments > 0)])
        assert report.metrics.expert_load.shape == (1, TINY.moe.num_experts)


def test_a_dense_model_reports_nothing() -> None:
    config = changed(pattern=("dense",), num_encoder_layers=1, num_decoder_layers=1)
    _, reports = jax.jit(lambda model, batch: model(batch, None))(make_model(config), make_batch(config))
    assert reports == {}


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_the_decoders_output_times_the_embedding_or_a_matrix_of_their_own(tied: bool) -> None:
    """A doubled output matrix doubles the logits; with tied embeddings, it holds the token vectors."""
    config = changed(tie_embeddings=tied)
    model, batch = make_model(config), make_batch(config)
    logits = np.asarray(forward(model, batch, None))
    if tied:
        assert model.logits is None
        model.embedding.vectors[...] = model.embedding.vectors[...].at[47].multiply(2.0)  # a token that is not there
        batch = {name: np.where(values == 47, 46, values) for name, values in batch.items()}
        logits = np.asarray(forward(make_model(config), batch, None))
        doubled = np.asarray(forward(model, batch, None))
        assert_close(doubled[..., 47], 2 * logits[..., 47])
        assert_close(doubled[..., :47], logits[..., :47])
    else:
        model.logits[...] = 2 * model.logits[...]
        assert_close(forward(model, batch, None), 2 * logits)


def test_a_bfloat16_model_is_close_to_the_float32_one() -> None:
    model, batch = make_model(changed(dtype="bfloat16")), make_batch()
    assert jax.eval_shape(lambda: model(jax.tree.map(jnp.asarray, batch), None)[0]).dtype == jnp.bfloat16
    loss, gradients = loss_and_gradients(model, batch, None)
    assert all(leaf.dtype == jnp.float32 and np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
    # A few roundings of 2^-9 a layer; a token whose two best experts are near each other may change its mind.
    np.testing.assert_allclose(loss, loss_and_gradients(make_model(), batch, None)[0], rtol=0.02)


@pytest.mark.slow
def test_bfloat16_parameters_have_bfloat16_gradients_and_a_float32_router() -> None:
    config = changed(dtype="bfloat16", param_dtype="bfloat16")
    _, gradients = loss_and_gradients(make_model(config), make_batch(config), None)
    for path, leaf in jax.tree.leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        assert leaf.dtype == (jnp.float32 if ".router" in name else jnp.bfloat16), name


def test_a_row_does_not_depend_on_the_rows_of_other_groups() -> None:
    model, batch = make_model(), make_batch()  # groups of one decoder row and half an encoder row
    other = {name: np.concatenate([values[:4], values[:4]]) for name, values in batch.items()}
    np.testing.assert_array_equal(forward(model, other, None)[:4], forward(model, batch, None)[:4])
