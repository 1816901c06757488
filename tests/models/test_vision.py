"""Patches of images, and the patches that may influence each other."""

import jax.numpy as jnp
import numpy as np

from switchjax.models.vision import patch_vectors
from tests.models.families import FAMILIES, forward, make_batch, make_model
from tests.tiny import changed


def test_patches_are_squares_of_the_image_row_by_row() -> None:
    images = np.random.default_rng(0).integers(0, 256, size=(2, 4, 6, 3)).astype(np.uint8)
    vectors = np.asarray(patch_vectors(jnp.asarray(images), 2))
    assert vectors.shape == (2, 6, 12)
    for image in range(2):
        for row in range(2):
            for column in range(3):
                square = images[image, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                expected = square.astype(np.float32).reshape(-1) / 127.5 - 1
                np.testing.assert_allclose(vectors[image, 3 * row + column], expected, rtol=1e-6, atol=1e-7)
    assert vectors.min() >= -1
    assert vectors.max() <= 1


def test_an_image_does_not_depend_on_those_of_other_groups_but_on_all_of_its_own_patches() -> None:
    config = FAMILIES["v_moe"]  # a group is one image
    model, batch = make_model(config), make_batch(config)
    other = batch | {"images": np.concatenate([batch["images"][:4], 255 - batch["images"][4:]])}
    before, after = (np.asarray(forward(model, b, None)) for b in (batch, other))
    np.testing.assert_array_equal(after[:4], before[:4])
    assert not np.allclose(after[4:7], before[4:7])


def test_batch_prioritised_routing_at_a_capacity_below_one_keeps_the_tokens_of_the_highest_gates() -> None:
    """V-MoE, section 4: with fewer slots than tokens, logits are still finite, but differ from full capacity."""
    moe = {"fill_order": "batch_prioritized", "min_expert_capacity": 1, "group_size": 20}
    config = changed(FAMILIES["v_moe"], moe=moe | {"eval_capacity_factor": 0.4})
    full = changed(FAMILIES["v_moe"], moe=moe | {"eval_capacity_factor": 8.0})
    batch = make_batch(config)
    few, all_ = (np.asarray(forward(make_model(c), batch, None)) for c in (config, full))
    assert np.all(np.isfinite(few))
    assert not np.allclose(few[:7], all_[:7])
