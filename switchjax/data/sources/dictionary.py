"""The Collaborative International Dictionary of English in dictd's format."""

import re
import string
import unicodedata

from switchjax.data.sources.source import Documents

_BASE64 = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
_LETTERS = {
    **{"ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "eth": "ð", "th": "þ", "thorn": "þ", "yogh": "ʒ"},
    **{"root": "√", "add": "ạ", "udd": "ụ", "asl": "ã", "ng": "ŋ", "deg": "°", "sect": "§", "imac": "ī"},
    **{"pounds": "£", "times": "\u00d7", "sharp": "♯", "flat": "♭", "dsdot": "ṣ"},
}
_MARKS = {"'": "\u0301", "`": "\u0300", "^": "\u0302", '"': "\u0308", "=": "\u0304", "-": "\u0304"} | {
    "~": "\u0303",
    ",": "\u0327",
    ".": "\u0307",
    "*": "",
}
_SOURCE_TAG = re.compile(r"\s*\[[^\[\]]*\b(?:Webster|WordNet|PJC|RDH)\b[^\[\]]*\]")
_ACCENT = re.compile(r"""\[([-'`^"=~,.*]?)([A-Za-z]{1,8})([\^]?)\]""")
_PRONUNCIATION = re.compile(r"\\[^\\]{1,80}\\(\s*\([^()]*\))?")
_SYLLABLES = re.compile(r"""(?<=\w)[*"`]+(?=\w)""")


def dictionary_entries(database: bytes, index: str) -> Documents:
    """Yields the entries of a dictd database, one document per headword.

    Each line of the index is one entry: headword, offset and length, the latter two in base 64.
    """
    entries: dict[str, list[str]] = {}
    seen = set()
    for line in index.splitlines():
        headword, offset, length = line.split("\t")
        start = _number(offset)
        if headword.startswith("00-") or start in seen:
            continue
        seen.add(start)
        entry = database[start : start + _number(length)].decode("utf-8", errors="ignore")
        entries.setdefault(headword.lower(), []).append(_entry_text(entry))
    for headword, texts in entries.items():
        yield headword, "\n".join(texts)


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + _BASE64.index(digit)
    return value


def _entry_text(entry: str) -> str:
    """The text of an entry without pronunciation, links and editors' tags, one paragraph per sense."""
    entry = _PRONUNCIATION.sub("", _ACCENT.sub(_letter, entry))
    entry = re.sub(r"[{}]", "", _SYLLABLES.sub("", _SOURCE_TAG.sub("", entry)))
    entry = entry.replace(" -- ", " — ").replace("--", "—").replace("[nbsp]", " ")
    blocks = (" ".join(block.split()) for block in re.split(r"\n\s*\n", entry))
    return "\n".join(block.replace(" ,", ",") for block in blocks if block)


def _letter(code: re.Match[str]) -> str:
    """Decodes a letter: `['e]` -> é, `[a^]` -> ă, `[aum]` -> ä, `[pi]` -> π; leaves other brackets as they are."""
    mark, name, breve = code.groups()
    if not mark and not breve:
        if name in _LETTERS:
            return _LETTERS[name]
        if re.fullmatch(r"[A-Za-z]um", name):
            return unicodedata.normalize("NFC", f"{name[0]}\u0308")
        return _greek(name) or code[0]
    letters = _LETTERS.get(name, name)
    if len(letters) > 2:
        return code[0]
    return unicodedata.normalize("NFC", letters + (_MARKS[mark] if mark else "") + ("\u0306" if breve else ""))


def _greek(name: str) -> str:
    """The Greek letter of that name, or an empty string."""
    case = "CAPITAL" if name[0].isupper() else "SMALL"
    try:
        return unicodedata.lookup(f"GREEK {case} LETTER {name.replace('ambda', 'amda')}")
    except KeyError:
        return ""
