"""The tokenizer beside the weights: kept for the way back, and read as a vocabulary where it numbers ids as here."""

import json
import logging
import shutil
from pathlib import Path

from switchjax.config import Config, UserError
from switchjax.data.vocabulary import Vocabulary
from switchjax.interop.family import Values
from switchjax.training.workdir import load_vocabulary, vocabulary_path

_log = logging.getLogger(__name__)

_FOLDER = "tokenizer"
_FILES = (
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
    vocabulary = _read_vocabulary(folder)
    if vocabulary is None:
        return {"data.vocabulary_size": vocab_size, "data.num_sentinels": 0}
    sentinels = vocabulary.num_sentinels
    return {"data.vocabulary_size": vocabulary.size - sentinels, "data.num_sentinels": sentinels}


def import_tokenizer(folder: Path, workdir: Path) -> Vocabulary | None:
    """Keeps a folder's tokenizer in the workdir; returns it as a vocabulary, if it is one that can be read here."""
    files = [folder / name for name in _FILES if (folder / name).is_file()]
    if files:
        (workdir / _FOLDER).mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(file, workdir / _FOLDER / file.name)
    return _read_vocabulary(folder)


def export_tokenizer(workdir: Path, folder: Path, config: Config) -> None:
    """Writes the tokenizer that a workdir was imported with, or else its own vocabulary, as T5's tokenizer."""
    if (workdir / _FOLDER).is_dir():
        for file in sorted((workdir / _FOLDER).iterdir()):
            shutil.copy(file, folder / file.name)
        return
    if not vocabulary_path(workdir).exists():
        return
    vocabulary = load_vocabulary(workdir, config)
    if not vocabulary.keeps_ids:
        _log.warning("no tokenizer is written: that of %s numbers its pieces otherwise than their model file", workdir)
        return
    (folder / "spiece.model").write_bytes(vocabulary.model)
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": vocabulary.num_sentinels}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def _read_vocabulary(folder: Path) -> Vocabulary | None:
    for name in ("spiece.model", "tokenizer.model"):
        if not (folder / name).is_file():
            continue
        try:
            vocabulary = Vocabulary.load(folder / name, _num_sentinels(folder) if name == "spiece.model" else 0)
        except UserError as error:
            _log.warning("%s; it is kept, but text cannot be encoded here", error)
            return None
        if vocabulary.keeps_ids:
            return vocabulary
        _log.warning("%s numbers pad, eos and unk otherwise than here: text cannot be encoded for this model", name)
    return None


def _num_sentinels(folder: Path) -> int:
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_bytes())
        return int(settings.get("extra_ids", _T5_SENTINELS))
    except FileNotFoundError:
        return _T5_SENTINELS
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{folder / 'tokenizer_config.json'} is not valid JSON") from None
