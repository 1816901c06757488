"""How many tokens a second a model of Hugging Face's writes here, and how many by transformers' own `generate`."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
from switchjax.studies.markdown import show_row
from switchjax.studies.timing import Ratio, interleaved_seconds


def benchmark_beside_transformers(
    folders: Sequence[Path], new_tokens: int, repeats: int, report: Callable[[str], None]
) -> str:
    """Times greedy decoding of each model both ways, in turn, and returns the table. No token ends a text.

    Args:
        folders: with config.json and safetensors.
        new_tokens: of each row.
        repeats: rounds, whose medians count.
        report: is told of each row of the table as it is finished.

    Raises:
        UserError: if torch or transformers is not installed, or a folder holds no model of text that can be read.
    """
    lines = [
        f"| model | rows | {new_tokens} tokens here, tokens/s | by transformers, tokens/s | ratio | tokens alike |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    module, mesh = import_transformers(), make_mesh(MeshConfig(), jax.devices()[:1])
    for folder in folders:
        model = load_huggingface(folder, dropless(config_of(folder)), mesh)
        assert isinstance(model, TextModel), "dropless refuses the others"
        theirs = load_transformers(folder, module, {})
        for rows in ROWS:
            lines.append(show_row([folder, rows, *_measure(model, theirs, rows, new_tokens, repeats)]))
            report(lines[-1])
    return "\n".join(lines)


def _measure(model: TextModel, theirs: Any, rows: int, new_tokens: int, repeats: int) -> list[object]:
    """Tokens a second here and there, their ratio, and how many tokens are alike."""
    num_ids = model.config.vocab_size
    batch = make_prompts(model.config.family == "encoder_decoder", rows, num_ids)
    decoding = DecodingConfig(max_new_tokens=new_tokens)
    programs = {
        "here": lambda: generate(model, batch, decoding, num_ids, eos=-1),
        "there": lambda: generate_by_transformers(theirs, batch, new_tokens),
    }
    seconds = interleaved_seconds(programs, repeats)
    alike = float(np.mean(np.asarray(programs["here"]()) == programs["there"]()))
    speeds = (f"{rows * new_tokens / statistics.median(times):.0f}" for times in seconds.values())
    return [*speeds, Ratio.of(seconds["there"], seconds["here"]), f"{100 * alike:.0f} %"]


def generate_by_transformers(model: Any, batch: Batch, new_tokens: int) -> Int[np.ndarray, "B T"]:
    """What transformers' model writes after the same prompts, its cache in use.

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
