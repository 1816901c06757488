"""Hugging Face's tokenizer: reads its SentencePiece model as a vocabulary, and keeps its files for `to-hf`."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
from jaxtyping import Int

from switchjax.config import Config, UserError
from switchjax.data.vocabulary import EOS, PAD, UNK, Vocabulary
from switchjax.interop.family import Values
from switchjax.training.workdir import load_vocabulary, vocabulary_path

_log = logging.getLogger(__name__)

FOLDER = "huggingface"
"""Folder of an imported workdir with Hugging Face's files other than the weights."""
_FILES = (
    "config.json",
    "spiece.model",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "preprocessor_config.json",
)
_T5_SENTINELS = 100
"""The default of T5's tokenizer."""


def vocabulary_sizes(folder: Path, vocab_size: int) -> Values:
    """`data.vocabulary_size` and `data.num_sentinels` for a folder's tokenizer; without one, all ids are pieces."""
    vocabulary = read_vocabulary(folder)
    if vocabulary is None:
        return {"data.vocabulary_size": vocab_size, "data.num_sentinels": 0}
    sentinels = vocabulary.num_sentinels
    return {"data.vocabulary_size": vocabulary.size - sentinels, "data.num_sentinels": sentinels}


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """Reads the SentencePiece model of a Hugging Face folder; None if it has no usable one."""
    for name in ("spiece.model", "tokenizer.model"):
        if not (folder / name).is_file():
            continue
        try:
            vocabulary = Vocabulary.load(folder / name, _num_sentinels(folder) if name == "spiece.model" else 0)
        except UserError as error:
            _log.warning("%s; the file is kept, but switchjax cannot encode text for this model", error)
            return None
        if vocabulary.model_ids.min() >= 0:
            return vocabulary
        _log.warning("%s has neither pad nor bos; it is kept, but switchjax cannot encode text for this model", name)
    return None


def own_vocabulary(workdir: Path, config: Config) -> Vocabulary | None:
    """The vocabulary of a workdir, if it has one."""
    return load_vocabulary(workdir, config) if vocabulary_path(workdir).exists() else None


def renumbering(vocabulary: Vocabulary | None, vocab_size: int) -> Int[np.ndarray, "V"] | None:
    """For each of our ids, the SentencePiece id that numbers Hugging Face's rows of embeddings; None if equal.

    Our pad, eos and unk are 0, 1 and 2. In Mixtral, eos is 2, unk is 0, and bos, 1, serves as our pad: both mark the
    start of a text. Ids above the model's pieces are equal.
    """
    if vocabulary is None or vocabulary.model_ids.min() < 0:
        return None
    ids = np.concatenate([vocabulary.model_ids, np.arange(len(vocabulary.model_ids), vocab_size)]).astype(np.int32)
    return None if np.array_equal(ids, np.arange(vocab_size)) else ids


def special_tokens(vocabulary: Vocabulary | None, config: Config) -> Values:
    """The entries of config.json for the ids that start and end a text."""
    if vocabulary is None:
        return {}
    first, eos = map(int, np.maximum(vocabulary.model_ids[:2], 0))
    if config.model.family == "encoder_decoder":
        return {"pad_token_id": first, "decoder_start_token_id": first, "eos_token_id": eos}
    return {"bos_token_id": first, "eos_token_id": eos}


def keep_files(folder: Path, workdir: Path) -> None:
    """Copies the tokenizer and config.json of a folder into the workdir, so that `to-hf` can write them back."""
    (workdir / FOLDER).mkdir()
    for file in (folder / name for name in _FILES if (folder / name).is_file()):
        shutil.copy(file, workdir / FOLDER / file.name)


def export_tokenizer(workdir: Path, folder: Path, vocabulary: Vocabulary | None) -> None:
    """Writes the tokenizer that a workdir was imported with, or else its own vocabulary.

    Its own vocabulary becomes T5's tokenizer, which reads a line break as a space. A model without pad, such as
    Mixtral's, becomes LLaMA's tokenizer, which expects byte-pair encoding.
    """
    if (workdir / FOLDER).is_dir():
        for file in (workdir / FOLDER).iterdir():
            if file.name != "config.json":
                shutil.copy(file, folder / file.name)
        return
    if vocabulary is None:
        return
    if vocabulary.model_ids.min() < 0:
        _log.warning("no tokenizer is written: the SentencePiece model of %s has neither pad nor bos", workdir)
        return
    if np.array_equal(vocabulary.model_ids[:3], [PAD, EOS, UNK]):
        name, settings = "spiece.model", {"tokenizer_class": "T5Tokenizer", "extra_ids": vocabulary.num_sentinels}
    else:
        name, settings = "tokenizer.model", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}
    (folder / name).write_bytes(vocabulary.model)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _num_sentinels(folder: Path) -> int:
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
        return int(settings.get("extra_ids", _T5_SENTINELS))
    except FileNotFoundError:
        return _T5_SENTINELS
    except (OSError, ValueError, AttributeError, TypeError, OverflowError):
        raise UserError(f"{folder / 'tokenizer_config.json'} gives no valid number of extra_ids") from None
