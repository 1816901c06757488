"""SentencePiece vocabularies with T5's special ids (Raffel et al. 2020, sections 2.4 and 3.1.4)."""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import sentencepiece
from jaxtyping import Integer
from sentencepiece import sentencepiece_model_pb2

from switchjax.config import UserError

PAD, EOS, UNK = 0, 1, 2
_SENTINEL = re.compile(r"<extra_id_(\d+)>")
_TRAINING_THREADS = 4
"""Constant on every machine, because the order of floating-point sums in training depends on it."""


class Vocabulary:
    """Converts text to token ids and back.

    Ids are pad = 0, eos = 1, unk = 2, then the other SentencePiece pieces in their order, and at the top the sentinels
    of span corruption: `<extra_id_k>` is `size - 1 - k`. A model with other ids for its special pieces is renumbered.
    Without a pad id, bos serves as pad: both mark the start of a text. A model without either gets a new pad id.

    Attributes:
        size: number of ids, including the sentinels.
        num_sentinels: number of sentinels.
        model: the serialized SentencePiece model; `load` reads it from a file.
        fingerprint: changes whenever the same text could get different ids.
    """

    def __init__(self, model: bytes, num_sentinels: int) -> None:
        """Reads a serialized SentencePiece model.

        Raises:
            UserError: if `model` is not a SentencePiece model, or has no eos or no unk piece.
        """
        try:
            proto = sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
            # A second processor encodes text after a sentinel: it keeps a leading space and adds none.
            proto.normalizer_spec.add_dummy_prefix = False
            proto.normalizer_spec.remove_extra_whitespaces = False
            self._continuation = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
        except Exception as error:
            raise UserError(f"not a SentencePiece model: {str(error).splitlines()[0]}") from None
        bos_is_pad = self._processor.pad_id() < 0 <= self._processor.bos_id()
        pad = self._processor.bos_id() if bos_is_pad else self._processor.pad_id()
        special = [pad, self._processor.eos_id(), self._processor.unk_id()]
        if min(special[1:]) < 0:
            raise UserError("the SentencePiece model needs an eos and an unk piece, but lacks one of them")
        others = [i for i in range(self._processor.vocab_size()) if i not in special]
        self._model_ids = np.array(special + others, np.int32)
        self._ids = np.zeros(self._processor.vocab_size(), np.int32)
        self._ids[self._model_ids[self._model_ids >= 0]] = np.flatnonzero(self._model_ids >= 0)
        self.model = model
        self.num_sentinels = num_sentinels
        self.size = len(self._model_ids) + num_sentinels
        self.fingerprint = hashlib.sha256((b"2" if bos_is_pad else b"1") + model).hexdigest()[:16]

    @property
    def model_ids(self) -> Integer[np.ndarray, "pieces"]:
        """The id of each piece in the SentencePiece model itself; -1 if it has no piece for pad."""
        return self._model_ids

    @classmethod
    def load(cls, path: str | Path, num_sentinels: int) -> "Vocabulary":
        """Reads a SentencePiece model file.

        Raises:
            UserError: if the file is missing or holds no usable model.
        """
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read the vocabulary {path}: {error.strerror}") from None
        try:
            return cls(model, num_sentinels)
        except UserError as error:
            raise UserError(f"cannot use the vocabulary {path}: {error}") from None

    def encode(self, text: str) -> list[int]:
        """Encodes a text that may contain sentinels; adds no EOS.

        A space before a sentinel is dropped, because a replaced span begins with the space of its first word.
        """
        ids: list[int] = []
        end = 0
        for match in _SENTINEL.finditer(text):
            ids += self._encode_run(text[end : match.start()].removesuffix(" "), first=end == 0)
            ids.append(self.sentinel(int(match[1])))
            end = match.end()
        return ids + self._encode_run(text[end:], first=end == 0)

    def encode_batch(self, texts: Sequence[str], num_threads: int = -1) -> list[Integer[np.ndarray, "_"]]:
        """Encodes documents, in which `<extra_id_0>` is ordinary text.

        Args:
            texts: any number of documents.
            num_threads: -1 uses all cores.
        """
        return [self._ids[ids] for ids in self._processor.encode(list(texts), num_threads=num_threads)]

    def decode(self, ids: Sequence[int] | Integer[np.ndarray, "_"]) -> str:
        """Decodes ids up to the first EOS; drops pads and writes sentinels as `<extra_id_k>`.

        Raises:
            ValueError: for an id outside the vocabulary.
        """
        text = ""
        for is_sentinel, run in groupby(self._until_eos(ids), lambda i: i >= self.size - self.num_sentinels):
            if is_sentinel:
                text += "".join(f"<extra_id_{self.size - 1 - i}>" for i in run)
            else:
                pieces = self._model_ids[list(run)].tolist()
                # SentencePiece drops the leading space of the first piece, which is right only at the start of a text.
                space = " " if text and self._processor.id_to_piece(pieces[0]).startswith("▁") else ""
                text += space + self._processor.decode(pieces)
        return text

    def sentinel(self, index: int) -> int:
        """The id of `<extra_id_index>`.

        Raises:
            UserError: if the vocabulary has fewer sentinels.
        """
        if not 0 <= index < self.num_sentinels:
            raise UserError(f"<extra_id_{index}>: the vocabulary has {self.num_sentinels} sentinels")
        return self.size - 1 - index

    def _encode_run(self, text: str, first: bool) -> list[int]:
        if not text:
            return []
        processor = self._processor if first else self._continuation
        return [int(self._ids[i]) for i in processor.encode(text)]

    def _until_eos(self, ids: Sequence[int] | Integer[np.ndarray, "_"]) -> list[int]:
        kept = []
        for i in map(int, ids):
            if not 0 <= i < self.size:
                raise ValueError(f"id {i} is outside the vocabulary of {self.size}")
            if i == EOS:
                break
            if i != PAD:
                kept.append(i)
        return kept


def train_vocabulary(texts: Iterable[str], num_pieces: int, path: Path) -> None:
    """Trains a unigram model and writes it to `path`, which appears only when complete.

    The same texts give the same file on any number of cores. Text is not normalised and rare characters are encoded as
    bytes, so no character is unknown and every text survives a round trip (except U+2581, SentencePiece's sign for a
    space). A line break is a piece of its own.

    Args:
        texts: a sample of the corpora; see `sample_texts`.
        num_pieces: size of the model, including the 256 bytes.
        path: file to write.

    Raises:
        UserError: if the texts do not support that many pieces.
    """
    unfinished = path.with_name(f"unfinished-{os.getpid()}-{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished.open("wb") as file:
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=(line for text in texts for line in _lines(text)),
                model_writer=file,
                model_type="unigram",
                vocab_size=num_pieces,
                pad_id=PAD,
                eos_id=EOS,
                unk_id=UNK,
                bos_id=-1,
                byte_fallback=True,
                user_defined_symbols=["\n"],
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                split_digits=True,
                num_threads=_TRAINING_THREADS,
                minloglevel=2,
            )
        except (RuntimeError, OSError) as error:
            unfinished.unlink()
            reason = " ".join(str(error).split())
            raise UserError(f"cannot train a vocabulary of data.vocabulary_size={num_pieces}: {reason}") from None
    unfinished.replace(path)


def _lines(text: str) -> list[str]:
    """Cuts a text at spaces into stretches that are short enough for SentencePiece's trainer."""
    return re.findall(r"\S.{0,1000}(?=\s|$)", text)


def sample_texts(corpora: Iterable[Iterable[Sequence[str]]], num_characters: int) -> Iterable[str]:
    """Yields documents from the start of each corpus until it has given its equal share of `num_characters`.

    Args:
        corpora: for each corpus, blocks of documents in random but fixed order.
        num_characters: upper bound of the sample's size.
    """
    streams = list(corpora)
    for blocks in streams:
        left = num_characters // len(streams)
        for text in (text for block in blocks for text in block):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break
