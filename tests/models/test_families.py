"""Every family: packed, padded and later tokens change nothing, all weights learn, and a mesh equals one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from switchjax.config import Config, MeshConfig, ModelConfig, UserError
from switchjax.models.families import FAMILIES as CLASSES
from switchjax.parallel.mesh import check_fit, make_mesh
from switchjax.parallel.sharding import named_leaves, parameter_shardings, partition_spec
from switchjax.training.step import routing_metrics
from tests.models.families import FAMILIES, TEXT, forward, loss_and_gradients, make_batch, make_model
from tests.tiny import changed

# Routers whose choice of a token's experts depends on its group only through full buffers: with buffers that are never
# full, what else is in a row makes no difference.
ROOMY = {"train_capacity_factor": 100.0, "eval_capacity_factor": 100.0}


def roomy(config: Config) -> Config:
    return changed(config, moe=ROOMY)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_batch_has_the_shapes_that_the_family_announces(name: str) -> None:
    config = FAMILIES[name]
    batch = make_batch(config)
    announced = CLASSES[config.model.family].batch_shapes(config)
    assert {n: (a.shape, a.dtype) for n, a in batch.items()} == {n: (a.shape, a.dtype) for n, a in announced.items()}
    model = make_model(config)
    arrays = {n: jnp.asarray(values) for n, values in batch.items()}
    lengths = {stack: segments.shape[1] for stack, segments in model.segments(arrays).items()}
    assert lengths == config.stack_lengths


@pytest.mark.parametrize("name", TEXT)
def test_a_packed_sequence_gives_the_logits_of_the_sequence_alone(name: str) -> None:
    config = roomy(FAMILIES[name])
    model, packed = make_model(config), make_batch(config)
    together = np.asarray(forward(model, packed, None))
    segments = packed["decoder_segments"]
    for segment in (1, 2):
        alone = {n: np.zeros_like(values) for n, values in packed.items()}
        for row, inside in enumerate(segments == segment):
            for n, values in packed.items():
                alone[n][row, : inside.sum()] = values[row, inside] if "segments" not in n else 1
        logits = np.asarray(forward(model, alone, None))
        for row, inside in enumerate(segments == segment):
            # float32 sums in another order, over a few layers of weights that are large for a network.
            np.testing.assert_allclose(together[row, inside], logits[row, : inside.sum()], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TEXT)
def test_the_future_moves_no_logit(name: str) -> None:
    config = roomy(FAMILIES[name])
    model, batch = make_model(config), make_batch(config)
    cut = 3
    inputs = batch["decoder_inputs"].copy()
    inputs[:, cut:] = (inputs[:, cut:] + 7) % config.model.vocab_size
    before, after = (np.asarray(forward(model, b, None)) for b in (batch, batch | {"decoder_inputs": inputs}))
    np.testing.assert_array_equal(after[:, :cut], before[:, :cut])
    assert not np.allclose(after[:, cut:], before[:, cut:])


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_may_be_anything_and_every_weight_gets_a_gradient(name: str) -> None:
    config = FAMILIES[name]
    model, batch = make_model(config), make_batch(config)
    if config.model.family == "vision":
        other = batch | {
            "images": np.where(batch["labels"][:, None, None, None] < 0, 255 - batch["images"], batch["images"])
        }
    else:
        other = {n: v if "segments" in n else np.where(batch["decoder_segments"] == 0, 9, v) for n, v in batch.items()}
    loss, gradients = loss_and_gradients(model, batch, None)
    assert loss_and_gradients(model, other, None)[0] == loss
    idle = [n for n, leaf in named_leaves(gradients).items() if not np.any(leaf)]
    # Running averages get theirs in training only.
    assert [n for n in idle if "norm_mean" not in n and "norm_variance" not in n] == []


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gpt", (2, 2, 2)),
        ("v_moe", (2, 4, 1)),
        pytest.param("gpt", (2, 4, 1), marks=SLOW),
        pytest.param("mixtral", (2, 2, 2), marks=SLOW),
        pytest.param("glam", (1, 4, 2), marks=SLOW),
        pytest.param("pyramid", (2, 2, 2), marks=SLOW),
        pytest.param("peer", (2, 4, 1), marks=SLOW),
        pytest.param("lstm", (2, 2, 2), marks=SLOW),
        pytest.param("v_moe", (2, 2, 2), marks=SLOW),
        pytest.param("base", (2, 2, 2), marks=SLOW),
    ],
)
def test_loss_and_gradients_on_a_mesh_are_those_of_one_device(name: str, shape: tuple[int, int, int]) -> None:
    config = FAMILIES[name]
    model, batch = make_model(config), make_batch(config)
    expected_loss, expected = loss_and_gradients(model, batch, None)
    mesh = make_mesh(MeshConfig(*shape))
    check_fit(config, mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(batch, NamedSharding(mesh, partition_spec("batch")))
        loss, gradients = loss_and_gradients(jax.device_put(model, parameter_shardings(model, mesh)), placed, None)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    for (leaf, a), b in zip(named_leaves(gradients).items(), jax.tree.leaves(expected), strict=True):
        # float32 sums in the order of another mesh: a fraction of the parameter's largest gradient.
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * max(1.0, float(np.abs(b).max())), err_msg=leaf)


def test_a_pyramid_reports_the_load_of_every_layer_and_none_of_experts_that_are_not_there() -> None:
    config = FAMILIES["pyramid"]
    model, batch = make_model(config), make_batch(config)
    reports = jax.jit(lambda model, batch: model(batch, None)[1])(model, batch)
    assert [(report.layers, report.metrics.expert_load.shape) for report in reports.values()] == [
        ((1, 3), (2, 4)),
        ((5,), (1, 8)),
    ]
    metrics = routing_metrics(reports)
    load = np.asarray(metrics["expert_load"])
    np.testing.assert_allclose(load.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(load[:2, 4:], 0)
    least = [row[:experts].min() for row, experts in zip(load, (4, 4, 8), strict=True)]
    np.testing.assert_allclose(metrics["expert_load_bottom_by_layer"], least, rtol=1e-6)
    np.testing.assert_allclose(metrics["expert_load_bottom"], np.mean(least), rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pattern": ("lstm",)}, "model.pattern: unknown value 'lstm'"),
        ({"family": "recurrent"}, "model.pattern: unknown value 'dense'"),
        ({"family": "vision", "pattern": ("switch_attention",)}, "model.pattern: unknown value 'switch_attention'"),
        ({"pattern": ("peer", "moe")}, "the experts of peer or soft layers or experts with a router, not both"),
        ({"num_kv_heads": 5}, "model.num_heads=12 is not a multiple of model.num_kv_heads=5"),
        ({"positions": "learned"}, "positions=learned is for decoder_only and vision"),
        ({"family": "vision", "patch_size": 15, "positions": "learned"}, "image_size=224 is not a multiple"),
        ({"family": "vision"}, "a vision model has positions learned or none"),
        ({"positions": "rotary", "d_head": 7}, "must be even"),
        ({"pattern": ("switch_attention",), "biases": True}, "switch_attention is T5's attention"),
        ({"pattern": ("switch_attention",), "scale_scores": True}, "switch_attention .* no scale_scores"),
    ],
)
def test_a_model_that_cannot_be_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig(**fields)


def test_a_family_asks_for_its_objective_and_a_pyramid_for_all_its_counts() -> None:
    with pytest.raises(UserError, match=r"model.family=decoder_only needs data.objective=causal, got span_corruption"):
        changed(FAMILIES["gpt"], data={"objective": "span_corruption"})
    with pytest.raises(UserError, match="experts_per_layer has 2 counts for the 3 routed layers of the decoder"):
        changed(FAMILIES["pyramid"], moe={"experts_per_layer": (4, 8)})
    with pytest.raises(UserError, match=r"decoder_length=12 exceeds the model.max_length=8 learned positions"):
        changed(FAMILIES["gpt"], model={"max_length": 8})
    with pytest.raises(UserError, match="grouped products and no biases"):
        changed(FAMILIES["gpt"], moe={"dispatch": "ragged", "dropless": True})
