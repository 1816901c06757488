"""Decoding with a cache of keys and values: greedy, sampled or by beam search, one compiled program for all steps."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from switchjax.config import DecodingConfig, UserError
from switchjax.data.vocabulary import EOS, PAD
from switchjax.inference.beam import beam_search
from switchjax.inference.prefill import prefill
from switchjax.inference.sampling import choose, writable
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
    """What follows each row's prompt. Compiled once for the shapes of `batch` and each `decoding`.

    The MoE layers route as their config says: of a model that drops tokens, so does its decoding, and a row depends on
    the others (`switchjax.inference.pretrained` loads models that drop none).

    Args:
        model: a decoder, or an encoder and decoder.
        batch: what the model reads in training without the targets: `decoder_inputs`, in each row PAD and then the
            prompt, and `decoder_segments`, 1 for these and 0 for padding after them; with an encoder, its inputs. A row
            of padding alone stays empty.
        decoding: how, and how many tokens at most: T.
        num_ids: ids that the vocabulary has; the model's table may be larger.
        key: for sampling; None: `jax.random.key(0)`.
        eos: the token after which a row has ended.

    Returns:
        Token ids up to and with EOS; PAD after it.

    Raises:
        UserError: if the rows do not divide over the mesh, or prompt and new tokens exceed the model's positions.
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
        # Rows that have ended are padding: they take no slot of an expert.
        logits, cache = model.extend(last[:, None], ~ended[:, None], cache)
        chosen = choose(writable(logits[:, 0], num_ids), decoding, jax.random.fold_in(key, step))
        chosen = jnp.where(ended, PAD, chosen.astype(jnp.int32))
        output = jax.lax.dynamic_update_index_in_dim(output, chosen, step, axis=1)
        return step + 1, chosen, ended | (chosen == eos), constrain(output, "batch", "length"), cache

    return jax.lax.while_loop(is_open, write_next, (jnp.zeros((), jnp.int32), last, empty, output, cache))[3]
