"""Times decoding of Hugging Face models here, beside transformers' own `generate`."""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
from jaxtyping import Int

from switchjax.config import DecodingConfig, MeshConfig
from switchjax.data.vocabulary import PAD
from switchjax.inference.decoding import generate
from switchjax.inference.pretrained import dropless
from switchjax.interop.check import import_transformers, load_transformers
from switchjax.interop.convert import config_of, load_huggingface
from switchjax.models.families import TextModel
from switchjax.models.model import Batch
from switchjax.parallel.mesh import make_mesh
from switchjax.studies.decode_benchmark import ROWS, make_prompts
from switchjax.studies.report import number, percent, text
from switchjax.studies.timing import Ratio, interleaved_seconds


@dataclass(frozen=True)
class TransformersDecodeRow:
    """Median speeds of greedy decoding of one model, here and by transformers."""

    model: Annotated[str, text("model")]
    rows: Annotated[int, number("rows")]
    tokens_per_second: Annotated[float, number("{new_tokens} tokens here, tokens/s", "{:.0f}".format)]
    transformers_tokens_per_second: Annotated[float, number("by transformers, tokens/s", "{:.0f}".format)]
    speedup: Annotated[Ratio, number("ratio")]
    fraction_alike: Annotated[float, number("tokens alike", partial(percent, digits=0))]
    new_tokens: int


def measure_beside_transformers(
    folders: Sequence[Path], new_tokens: int, repeats: int
) -> Iterator[TransformersDecodeRow]:
    """Times greedy decoding of each model both ways, in turn. No token ends a text.

    Args:
        folders: with config.json and safetensors.
        new_tokens: of each row.
        repeats: rounds, whose medians count.

    Raises:
        UserError: if torch or transformers is not installed, or a folder holds no text model that can be read.
    """
    module, mesh = import_transformers(), make_mesh(MeshConfig(), jax.devices()[:1])
    for folder in folders:
        model = load_huggingface(folder, dropless(config_of(folder)), mesh)
        assert isinstance(model, TextModel), "dropless refuses the others"
        theirs = load_transformers(folder, module, {})
        for rows in ROWS:
            yield _measure(str(folder), model, theirs, rows, new_tokens, repeats)


def _measure(
    name: str, model: TextModel, theirs: Any, rows: int, new_tokens: int, repeats: int
) -> TransformersDecodeRow:
    num_ids = model.config.vocab_size
    batch = make_prompts(model.config.family == "encoder_decoder", rows, num_ids)
    decoding = DecodingConfig(max_new_tokens=new_tokens)
    programs = {
        "here": lambda: generate(model, batch, decoding, num_ids, eos=-1),
        "there": lambda: generate_by_transformers(theirs, batch, new_tokens),
    }
    seconds = interleaved_seconds(programs, repeats)
    return TransformersDecodeRow(
        model=name,
        rows=rows,
        tokens_per_second=rows * new_tokens / statistics.median(seconds["here"]),
        transformers_tokens_per_second=rows * new_tokens / statistics.median(seconds["there"]),
        speedup=Ratio.of(seconds["there"], seconds["here"]),
        fraction_alike=float(np.mean(np.asarray(programs["here"]()) == programs["there"]())),
        new_tokens=new_tokens,
    )


def generate_by_transformers(model: Any, batch: Batch, new_tokens: int) -> Int[np.ndarray, "B T"]:
    """Returns what transformers' model writes after the same prompts, with its cache.

    Args:
        model: transformers'.
        batch: as `make_prompts` makes it.
        new_tokens: T; as here, none of them is PAD.
    """
    import torch

    encoded = "encoder_tokens" in batch
    ids = torch.from_numpy(np.array(batch["encoder_tokens" if encoded else "decoder_inputs"])).long()
    model.generation_config.eos_token_id = None  # nothing ends
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            suppress_tokens=[PAD],
            pad_token_id=PAD,
        )
    return output.numpy()[:, 1 if encoded else ids.shape[1] :]
