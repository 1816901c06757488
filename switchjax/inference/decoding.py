"""Greedy decoding, sampling and beam search with a cache of keys and values; one compiled program for all steps."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from switchjax.config import DecodingConfig, UserError
from switchjax.data.vocabulary import EOS, PAD
from switchjax.inference.beam import beam_search
from switchjax.inference.prefill import prefill
from switchjax.inference.sampling import choose, mask_invalid_ids
from switchjax.models.cache import Cache
from switchjax.models.families import TextModel
from switchjax.models.layers import cast_kernels
from switchjax.models.model import Batch
from switchjax.parallel.mesh import count_shards
from switchjax.parallel.sharding import constrain


def generate(
    model: TextModel,
    batch: Batch,
    decoding: DecodingConfig,
    num_ids: int,
    key: PRNGKeyArray | None = None,
    eos: int = EOS,
) -> Int[Array, "B T"]:
    """Writes up to T tokens after each row's prompt. Compiles once for each shape of `batch` and each `decoding`.

    The MoE layers route as their config says. If the model drops tokens, decoding drops them too, and a row's result
    depends on the other rows (`switchjax.inference.pretrained` loads models that drop none).

    Args:
        model: a decoder, or an encoder and decoder.
        batch: the training inputs without targets: `decoder_inputs`, PAD and then the prompt in each row;
            `decoder_segments`, 1 for these and 0 for the padding after them; the encoder's inputs if there is one. A
            row of padding only stays empty.
        decoding: the method; T is `max_new_tokens`.
        num_ids: number of ids in the vocabulary; the model's embedding table may be larger.
        key: for sampling; default: `jax.random.key(0)`.
        eos: the token that ends a row.

    Returns:
        Token ids up to and including EOS, then PAD.

    Raises:
        UserError: if the mesh does not divide the rows, or prompt and new tokens exceed the model's positions.
    """
    rows, shards = batch["decoder_inputs"].shape[0], count_shards()
    if rows % shards:
        raise UserError(f"{rows} rows do not divide over the {shards} shards of data x expert: add rows of padding")
    return _generate(model, batch, decoding, num_ids, jax.random.key(0) if key is None else key, eos)


@partial(jax.jit, static_argnames=("decoding", "num_ids", "eos"))
def _generate(
    model: TextModel, batch: Batch, decoding: DecodingConfig, num_ids: int, key: PRNGKeyArray, eos: int
) -> Int[Array, "B T"]:
    model = cast_kernels(model, model.config.dtype)
    batch = {name: constrain(rows, "batch", "length") for name, rows in batch.items()}
    if decoding.method == "beam":
        _, texts = beam_search(model, batch, decoding, num_ids, eos)
        return constrain(texts[:, 0], "batch", "length")
    cache, last, empty = prefill(model, batch, decoding.max_new_tokens)
    output = jnp.full((last.shape[0], decoding.max_new_tokens), PAD, jnp.int32)
    Carry = tuple[Array, Array, Array, Array, Cache]

    def is_open(carry: Carry) -> Array:
        step, _, ended, _, _ = carry
        return (step < decoding.max_new_tokens) & ~jnp.all(ended)

    def write_next(carry: Carry) -> Carry:
        step, last, ended, output, cache = carry
        # Rows that have ended are marked as padding, so they take no slot of an expert.
        logits, cache = model.extend(last[:, None], ~ended[:, None], cache)
        chosen = choose(mask_invalid_ids(logits[:, 0], num_ids), decoding, jax.random.fold_in(key, step))
        chosen = jnp.where(ended, PAD, chosen.astype(jnp.int32))
        output = jax.lax.dynamic_update_index_in_dim(output, chosen, step, axis=1)
        return step + 1, chosen, ended | (chosen == eos), constrain(output, "batch", "length"), cache

    return jax.lax.while_loop(is_open, write_next, (jnp.zeros((), jnp.int32), last, empty, output, cache))[3]
