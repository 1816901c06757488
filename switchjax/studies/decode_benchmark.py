"""Times decoding with a cache of keys and values: beside decoding without, and beside its matrix products alone."""

import statistics
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from switchjax.accounting.matmuls import Matmul, matmuls
from switchjax.config import Config, DecodingConfig, MeshConfig, load_workdir_config
from switchjax.data.vocabulary import PAD
from switchjax.inference.decoding import generate
from switchjax.inference.pretrained import dropless, load_pretrained
from switchjax.inference.sampling import mask_invalid_ids
from switchjax.models.cache import Cache
from switchjax.models.encoder_decoder import EncoderDecoder
from switchjax.models.families import TextModel, build
from switchjax.models.model import Batch
from switchjax.parallel.mesh import make_mesh
from switchjax.studies.flags import LoadConfig, add_repeats
from switchjax.studies.report import Row, number, text
from switchjax.studies.timing import Ratio, interleaved_seconds

ROWS = (1, 8, 16)
"""Batch sizes."""
PROMPT_TOKENS = 32
"""Length of a decoder's prompt, or of an encoder's input."""
_CONFIGS = ["configs/families.py:glam-dense", "configs/families.py:glam", "configs/quickstart.py:switch"]


@dataclass(frozen=True)
class DecodeRow:
    """Median speeds of greedy decoding with one model."""

    model: Annotated[str, text("model")]
    rows: Annotated[int, number("rows")]
    cached_tokens_per_second: Annotated[float, number("{new_tokens} tokens with the cache, tokens/s", "{:.0f}".format)]
    uncached_tokens_per_second: Annotated[float, number("without, tokens/s", "{:.0f}".format)]
    speedup: Annotated[Ratio, number("ratio")]
    time_over_products: Annotated[Ratio, number("time over that of its products alone")]
    new_tokens: int


def add_flags(parser: ArgumentParser) -> None:
    add_repeats(parser, 3)
    parser.add_argument("--config", nargs="+", default=_CONFIGS, metavar="CONFIG", help="configs of untrained models")
    parser.add_argument("--workdir", type=Path, help="time the latest checkpoint of this run instead")
    beside = "time these Hugging Face models instead, beside transformers' generate"
    parser.add_argument("--huggingface", nargs="+", type=Path, metavar="FOLDER", help=beside)
    parser.add_argument("--new_tokens", type=int, default=256, help="tokens to write in each row")


def measure(flags: Namespace, load: LoadConfig) -> Iterator[Row]:
    """Times each model of the flags with each batch size."""
    if flags.huggingface:
        from switchjax.studies.beside_transformers import measure_decoding

        yield from measure_decoding(flags.huggingface, flags.new_tokens, flags.repeats)
        return
    models: dict[str, Callable[[], TextModel]]
    if flags.workdir:
        load_workdir_config(flags.workdir)  # refuses a missing run at once
        models = {str(flags.workdir): partial(trained, flags.workdir)}
    else:
        models = {name: partial(fresh, load(name)) for name in flags.config}
    for name, make in models.items():
        model = make()
        for rows in ROWS:
            yield _time_decoding(name, model, rows, flags.new_tokens, flags.repeats)


def _time_decoding(name: str, model: TextModel, rows: int, new_tokens: int, repeats: int) -> DecodeRow:
    num_ids = model.config.vocab_size
    batch = make_prompts(isinstance(model, EncoderDecoder), rows, num_ids)
    decoding = DecodingConfig(max_new_tokens=new_tokens)
    programs = {
        # No token has the id -1, so every row gets all its tokens.
        "cached": lambda: generate(model, batch, decoding, num_ids, eos=-1),
        "uncached": lambda: decode_uncached(model, batch, new_tokens, num_ids),
        "matmuls": matmuls_alone(matmuls(partial(_one_token, new_tokens=new_tokens), model, batch), new_tokens),
    }
    seconds = interleaved_seconds(programs, repeats)
    cached, uncached = (rows * new_tokens / statistics.median(seconds[way]) for way in ("cached", "uncached"))
    speedup = Ratio.of(seconds["uncached"], seconds["cached"])
    time_over_products = Ratio.of(seconds["cached"], seconds["matmuls"])
    return DecodeRow(name, rows, cached, uncached, speedup, time_over_products, new_tokens)


def _one_token(model: TextModel, batch: Batch, new_tokens: int) -> tuple[Array, Cache]:
    """One decoding step after the prompt; the prompt itself is not read."""
    cache = jax.eval_shape(lambda: model.start(batch, batch["decoder_inputs"].shape[1] + new_tokens))
    cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), cache)
    ones = jnp.ones((batch["decoder_inputs"].shape[0], 1), jnp.int32)
    return model.extend(ones, ones > 0, cache)


def make_prompts(encoded: bool, rows: int, num_ids: int) -> Batch:
    """Random texts of `PROMPT_TOKENS` tokens: input of an encoder if `encoded`, otherwise prompts of a decoder."""
    tokens = jax.random.randint(jax.random.key(0), (rows, PROMPT_TOKENS), 3, num_ids)
    if not encoded:
        return {"decoder_inputs": tokens.at[:, 0].set(PAD), "decoder_segments": jnp.ones_like(tokens)}
    start, ones = jnp.full((rows, 1), PAD), jnp.ones_like(tokens)
    return {"encoder_tokens": tokens, "encoder_segments": ones, "decoder_inputs": start, "decoder_segments": start + 1}


@partial(jax.jit, static_argnames=("new_tokens", "num_ids"))
def decode_uncached(model: TextModel, batch: Batch, new_tokens: int, num_ids: int) -> Int[Array, "B T"]:
    """Decodes greedily with a forward pass over the whole row for each token; an encoder runs once."""
    first = batch["decoder_inputs"].shape[1]
    inputs = jnp.pad(batch["decoder_inputs"], ((0, 0), (0, new_tokens)))
    if isinstance(model, EncoderDecoder):
        encoded, _ = model.encode(batch["encoder_tokens"], batch["encoder_segments"], None)

    def write_next(position: Array, inputs: Array) -> Array:
        written = jnp.broadcast_to(jnp.arange(inputs.shape[1])[None] < position, inputs.shape).astype(jnp.int32)
        if isinstance(model, EncoderDecoder):
            logits, _ = model.decode(encoded, batch["encoder_segments"], inputs, written, None)
        else:
            logits, _ = model({"decoder_inputs": inputs, "decoder_segments": written}, None)
        last = jax.lax.dynamic_index_in_dim(logits, position - 1, axis=1, keepdims=False)
        chosen = jnp.argmax(mask_invalid_ids(last, num_ids), axis=-1).astype(inputs.dtype)
        return jax.lax.dynamic_update_index_in_dim(inputs, chosen, position, axis=1)

    return jax.lax.fori_loop(first, first + new_tokens, write_next, inputs)[:, first:]


def matmuls_alone(found: list[Matmul], repeats: int) -> Callable[[], Float[Array, ""]]:
    """A function that computes all products `repeats` times, on arrays of their shapes.

    A product in a loop has different arrays in each turn, as in the original program.
    """
    operands = [
        tuple(jnp.ones((matmul.times, *side.shape), side.dtype) for side in (matmul.left, matmul.right))
        for matmul in found
    ]

    @jax.jit
    def run(operands: list[tuple[Array, Array]]) -> Float[Array, ""]:
        def once(_: Array, carry: Float[Array, ""]) -> Float[Array, ""]:
            for matmul, sides in zip(found, operands, strict=True):
                carry, _ = jax.lax.scan(partial(_multiply, matmul), carry, sides)
            return carry

        return jax.lax.fori_loop(0, repeats, once, jnp.ones(()))

    return lambda: run(operands)


def _multiply(
    matmul: Matmul, carry: Float[Array, ""], sides: tuple[Array, Array]
) -> tuple[Float[Array, ""], Float[Array, "0"]]:
    left, right = sides
    left = left * carry.astype(left.dtype)  # otherwise XLA computes each product only once
    y = jax.lax.dot_general(left, right, matmul.dimension_numbers, preferred_element_type=matmul.result)
    # One entry, as a sum would take time of its own. The barrier stops XLA from computing only that entry.
    first = jax.lax.optimization_barrier(y)[(0,) * y.ndim]
    return carry + 0 * first.astype(jnp.float32), jnp.zeros(0)


def fresh(config: Config) -> TextModel:
    """A model of `config` that drops no token, with initial weights."""
    model = jax.jit(lambda: build(dropless(config), jax.random.key(config.train.seed)))()
    assert isinstance(model, TextModel), "dropless refuses the others"
    return model


def trained(workdir: Path) -> TextModel:
    """The model of a workdir's latest checkpoint, on one device."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = load_pretrained(workdir, mesh).model
    return jax.device_put(jax.device_get(model), jax.devices()[0])
