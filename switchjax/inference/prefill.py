"""Reads the prompt into the cache."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from switchjax.models.cache import Cache
from switchjax.models.families import TextModel
from switchjax.models.model import Batch


def prefill(model: TextModel, batch: Batch, max_new_tokens: int) -> tuple[Cache, Int[Array, "B"], Bool[Array, "B"]]:
    """Reads each row's prompt, except its last token, in one call of the model.

    Returns:
        The cache, with room for the new tokens; the last token of each prompt; which rows have no prompt.
    """
    # The first step of decoding reads the last token: then all steps are alike, and no logits of the prompt are needed.
    tokens, lengths = batch["decoder_inputs"], jnp.sum(batch["decoder_segments"] > 0, axis=1)
    before_last = tokens.shape[1] - 1
    cache = model.start(batch, before_last + max_new_tokens)
    if before_last:
        _, cache = model.extend(tokens[:, :-1], jnp.arange(before_last)[None] < lengths[:, None] - 1, cache)
    last = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
    return cache, last, lengths == 0
