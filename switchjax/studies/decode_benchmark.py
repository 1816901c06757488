"""How many tokens a second a model writes, with its cache and by reading everything again for each token."""

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from switchjax.accounting.matmuls import products, products_alone
from switchjax.config import Config, DecodingConfig, MeshConfig
from switchjax.data.vocabulary import PAD
from switchjax.inference.decoding import generate
from switchjax.inference.pretrained import dropless, load_pretrained
from switchjax.inference.sampling import mask_invalid_ids
from switchjax.models.cache import Cache
from switchjax.models.encoder_decoder import EncoderDecoder
from switchjax.models.families import TextModel, build
from switchjax.models.model import Batch
from switchjax.parallel.mesh import make_mesh
from switchjax.studies.markdown import show_row
from switchjax.studies.timing import Ratio, interleaved_seconds

ROWS = (1, 8, 16)
"""Texts that are written at a time."""
PROMPT_TOKENS = 32
"""Of a decoder's prompt, or of what an encoder reads."""


def time_decoding(model: TextModel, rows: int, new_tokens: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of greedy decoding in each round: `cached`, `uncached`, and of a step's `products` alone, as often.

    No row stops before it has all its tokens.
    """
    num_ids = model.config.vocab_size
    batch = make_prompts(isinstance(model, EncoderDecoder), rows, num_ids)
    decoding = DecodingConfig(max_new_tokens=new_tokens)
    programs = {
        "cached": lambda: generate(model, batch, decoding, num_ids, eos=-1),
        "uncached": lambda: decode_uncached(model, batch, new_tokens, num_ids),
        "products": products_alone(products(partial(_one_token, new_tokens=new_tokens), model, batch), new_tokens),
    }
    return interleaved_seconds(programs, repeats)


def _one_token(model: TextModel, batch: Batch, new_tokens: int) -> tuple[Array, Cache]:
    """A step of decoding, after the prompt, without the products that read it."""
    cache = jax.eval_shape(lambda: model.start(batch, batch["decoder_inputs"].shape[1] + new_tokens))
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cache)
    ones = jnp.ones((batch["decoder_inputs"].shape[0], 1), jnp.int32)
    return model.extend(ones, ones > 0, cache)


def make_prompts(encoded: bool, rows: int, num_ids: int) -> Batch:
    """Random texts of `PROMPT_TOKENS` tokens: for an encoder, or else for a decoder to continue."""
    tokens = jax.random.randint(jax.random.key(0), (rows, PROMPT_TOKENS), 3, num_ids)
    if not encoded:
        return {"decoder_inputs": tokens.at[:, 0].set(PAD), "decoder_segments": jnp.ones_like(tokens)}
    start = jnp.full((rows, 1), PAD)
    ones = jnp.ones_like(tokens)
    return {"encoder_tokens": tokens, "encoder_segments": ones, "decoder_inputs": start, "decoder_segments": start + 1}


@partial(jax.jit, static_argnames=("new_tokens", "num_ids"))
def decode_uncached(model: TextModel, batch: Batch, new_tokens: int, num_ids: int) -> Int[Array, "B T"]:
    """Greedy decoding by a forward pass over the whole row for each token (an encoder runs once)."""
    first = batch["decoder_inputs"].shape[1]
    inputs = jnp.pad(batch["decoder_inputs"], ((0, 0), (0, new_tokens)))
    encoded = (
        model.encode(batch["encoder_tokens"], batch["encoder_segments"], None)[0]
        if isinstance(model, EncoderDecoder)
        else None
    )

    def write_next(position: Array, inputs: Array) -> Array:
        written = jnp.broadcast_to(jnp.arange(inputs.shape[1])[None] < position, inputs.shape).astype(jnp.int32)
        if isinstance(model, EncoderDecoder):
            assert encoded is not None
            logits, _ = model.decode(encoded, batch["encoder_segments"], inputs, written, None)
        else:
            logits, _ = model({"decoder_inputs": inputs, "decoder_segments": written}, None)
        last = jax.lax.dynamic_index_in_dim(logits, position - 1, axis=1, keepdims=False)
        chosen = jnp.argmax(mask_invalid_ids(last, num_ids), axis=-1).astype(inputs.dtype)
        return jax.lax.dynamic_update_index_in_dim(inputs, chosen, position, axis=1)

    return jax.lax.fori_loop(first, first + new_tokens, write_next, inputs)[:, first:]


def benchmark_decoding(
    models: Sequence[tuple[str, Callable[[], TextModel]]],
    new_tokens: int,
    repeats: int,
    report: Callable[[str], None],
) -> str:
    """Times each model and number of rows, and returns the table.

    Args:
        models: names, and what loads or makes each.
        new_tokens: of each row.
        repeats: rounds, whose medians count.
        report: is told of each row of the table as it is finished.
    """
    lines = [
        f"| model | rows | {new_tokens} tokens with the cache, tokens/s | without, tokens/s | ratio "
        "| time over that of its products alone |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, make in models:
        model = make()
        for rows in ROWS:
            seconds = time_decoding(model, rows, new_tokens, repeats)
            speeds = (f"{rows * new_tokens / statistics.median(seconds[way]):.0f}" for way in ("cached", "uncached"))
            faster = Ratio.of(seconds["uncached"], seconds["cached"])
            lines.append(show_row([name, rows, *speeds, faster, Ratio.of(seconds["cached"], seconds["products"])]))
            report(lines[-1])
    return "\n".join(lines)


def fresh(config: Config) -> TextModel:
    """A model of `config` that drops no token, with the weights it would start from."""
    model = jax.jit(lambda: build(dropless(config), jax.random.key(config.train.seed)))()
    assert isinstance(model, TextModel), "dropless refuses the others"
    return model


def trained(workdir: Path) -> TextModel:
    """The model of a workdir's latest checkpoint, on one device."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = load_pretrained(workdir, mesh).model
    return jax.device_put(jax.device_get(model), jax.devices()[0])
