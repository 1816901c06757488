import itertools

import pytest

from switchjax.data.splits import split_documents, split_expressions

DOCUMENTS = [(f"document-{i}", f"text {i}") for i in range(4000)]


def test_splits_part_documents_about_90_5_5() -> None:
    splits = split_documents(DOCUMENTS)
    assert sorted(itertools.chain(*splits.values())) == sorted(DOCUMENTS)
    # Three standard deviations of a count of 4000 draws at 5 %.
    assert abs(len(splits["test"]) - 200) < 42
    assert abs(len(splits["validation"]) - 200) < 42


def test_a_document_stays_in_its_split() -> None:
    where = {document: split for split, part in split_documents(DOCUMENTS).items() for document, _ in part}
    for split, part in split_documents(DOCUMENTS[::-3]).items():
        assert all(where[document] == split for document, _ in part)


@pytest.mark.parametrize("count", [3, 4, 7, 20])
def test_no_split_is_empty(count: int) -> None:
    for first in range(0, 400, count):
        assert all(split_documents(DOCUMENTS[first : first + count]).values())


def test_copies_and_empty_documents_are_left_out() -> None:
    splits = split_documents([*DOCUMENTS[:9], ("copy", "text 3"), ("empty", "")])
    assert sorted(itertools.chain(*splits.values())) == sorted(DOCUMENTS[:9])
    with pytest.raises(ValueError, match="2 distinct documents"):
        split_documents([("a", "x"), ("b", "x"), ("c", "y")])


@pytest.mark.parametrize(
    ("available", "train", "validation", "test"),
    [
        (["train", "validation", "test", "more"], "train", "validation", "test"),
        (["train", "validation"], "train", "validation[:50%]", "validation[50%:]"),
        (["train", "test"], "train[:95%]", "train[95%:]", "test"),
        (["train"], "train[:90%]", "train[90%:95%]", "train[95%:]"),
    ],
)
def test_missing_splits_are_cut_from_others(available: list[str], train: str, validation: str, test: str) -> None:
    assert split_expressions(available) == {"train": train, "validation": validation, "test": test}
