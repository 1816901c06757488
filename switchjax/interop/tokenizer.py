"""The tokenizer beside the weights: kept for the way back, and read as a vocabulary where it numbers ids as here."""

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
"""Of a workdir: the files that it was imported with, but for the weights."""
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
"""What T5's tokenizer has where its config does not say."""


def vocabulary_sizes(folder: Path, vocab_size: int) -> Values:
    """`data.vocabulary_size` and `data.num_sentinels` of a folder's tokenizer; without one, all ids are pieces."""
    vocabulary = read_vocabulary(folder)
    if vocabulary is None:
        return {"data.vocabulary_size": vocab_size, "data.num_sentinels": 0}
    sentinels = vocabulary.num_sentinels
    return {"data.vocabulary_size": vocabulary.size - sentinels, "data.num_sentinels": sentinels}


def read_vocabulary(folder: Path) -> Vocabulary | None:
    """The SentencePiece model of a folder of Hugging Face's, if it has one that can be read here."""
    for name in ("spiece.model", "tokenizer.model"):
        if not (folder / name).is_file():
            continue
        try:
            vocabulary = Vocabulary.load(folder / name, _num_sentinels(folder) if name == "spiece.model" else 0)
        except UserError as error:
            _log.warning("%s; it is kept, but text cannot be encoded here", error)
            return None
        if vocabulary.model_ids.min() >= 0:
            return vocabulary
        _log.warning("%s has neither pad nor bos: it is kept, but text cannot be encoded here", name)
    return None


def own_vocabulary(workdir: Path, config: Config) -> Vocabulary | None:
    """The vocabulary of a workdir, if it has one."""
    return load_vocabulary(workdir, config) if vocabulary_path(workdir).exists() else None


def renumbering(vocabulary: Vocabulary | None, vocab_size: int) -> Int[np.ndarray, "V"] | None:
    """The SentencePiece model's own id of each of ours, by which Hugging Face's rows of vectors go; None: the same.

    Here pad, eos and unk are 0, 1 and 2; Mixtral's are none, 2 and 0, and its bos 1 is our pad, with which text begins.
    Ids above the model's pieces are the same.
    """
    if vocabulary is None or vocabulary.model_ids.min() < 0:
        return None
    ids = np.concatenate([vocabulary.model_ids, np.arange(len(vocabulary.model_ids), vocab_size)]).astype(np.int32)
    return None if np.array_equal(ids, np.arange(vocab_size)) else ids


def special_tokens(vocabulary: Vocabulary | None, config: Config) -> Values:
    """What config.json says of the ids of a vocabulary that text begins and ends with."""
    if vocabulary is None:
        return {}
    first, eos = map(int, np.maximum(vocabulary.model_ids[:2], 0))
    if config.model.family == "encoder_decoder":
        return {"pad_token_id": first, "decoder_start_token_id": first, "eos_token_id": eos}
    return {"bos_token_id": first, "eos_token_id": eos}


def keep_files(folder: Path, workdir: Path) -> None:
    """Keeps the tokenizer and config.json of a folder in the workdir, for the way back."""
    (workdir / FOLDER).mkdir()
    for file in (folder / name for name in _FILES if (folder / name).is_file()):
        shutil.copy(file, workdir / FOLDER / file.name)


def export_tokenizer(workdir: Path, folder: Path, vocabulary: Vocabulary | None) -> None:
    """Writes the tokenizer that a workdir was imported with, or else its own vocabulary.

    That is T5's tokenizer, which reads a line break as a space, or LLaMA's for a model without pad, such as Mixtral's;
    LLaMA's pieces are of byte-pair encoding.
    """
    if (workdir / FOLDER).is_dir():
        for file in (workdir / FOLDER).iterdir():
            if file.name != "config.json":
                shutil.copy(file, folder / file.name)
        return
    if vocabulary is None:
        return
    if vocabulary.model_ids.min() < 0:
        _log.warning("no tokenizer is written: that of %s has neither pad nor bos, and ids of our own", workdir)
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
        raise UserError(f"{folder / 'tokenizer_config.json'} does not say how many extra_ids there are") from None
