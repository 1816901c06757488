"""Divides corpora into train, validation and test, which share no document."""

import hashlib

from switchjax.config import UserError

SPLITS = ("train", "validation", "test")


def split_documents(documents: list[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    """Divides documents into splits of about 90%, 5% and 5% by a hash of their ids.

    Leaves out empty documents and exact copies of an earlier text, so that no text is in two splits.

    Args:
        documents: (id, text) pairs.

    Raises:
        ValueError: if fewer than three documents remain, since every split needs one.
    """
    first: dict[str, str] = {}
    for document, text in documents:
        if text:
            first.setdefault(text, document)
    if len(first) < len(SPLITS):
        raise ValueError(f"cannot divide {len(first)} distinct documents into {len(SPLITS)} splits")
    ranked = sorted((_fraction(document), document, text) for text, document in first.items())
    # In a small corpus no hash may fall below a bound; test and validation then take the lowest hashes, one each.
    num_test = min(max(1, sum(fraction < 0.05 for fraction, _, _ in ranked)), len(ranked) - 2)
    bound = min(max(num_test + 1, sum(fraction < 0.1 for fraction, _, _ in ranked)), len(ranked) - 1)
    stretches = {"train": ranked[bound:], "validation": ranked[num_test:bound], "test": ranked[:num_test]}
    return {split: [(document, text) for _, document, text in stretch] for split, stretch in stretches.items()}


def _fraction(document: str) -> float:
    """A hash of the document's id, in [0, 1)."""
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:6], "big") / 2**48


def split_expressions(available: list[str]) -> dict[str, str]:
    """TFDS's expressions for train, validation and test, made from the splits that a dataset has.

    A missing split is cut from the end of another one, which is then read without that part. The order on disk is
    random, so any stretch is a random sample.
    """
    if "train" not in available:
        raise UserError(f"the dataset has no train split, only {', '.join(sorted(available))}")
    if "validation" in available and "test" in available:
        return {split: split for split in SPLITS}
    if "validation" in available:
        return {"train": "train", "validation": "validation[:50%]", "test": "validation[50%:]"}
    if "test" in available:
        return {"train": "train[:95%]", "validation": "train[95%:]", "test": "test"}
    return {"train": "train[:90%]", "validation": "train[90%:95%]", "test": "train[95%:]"}
