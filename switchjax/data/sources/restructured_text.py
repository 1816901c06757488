"""Extracts prose from reStructuredText as Python's documentation uses it."""

import re

_PROSE_DIRECTIVES = re.compile(
    r"note|warning|tip|important|caution|hint|danger|attention|seealso|versionadded|versionchanged|"
    r"deprecated(-removed)?|impl-detail|topic|rubric|describe|glossary|admonition|centered|epigraph"
)
_SIGNATURES = re.compile(
    r"(py:|c:)?(function|class|method|classmethod|staticmethod|abstractmethod|coroutinemethod|coroutinefunction|"
    r"awaitablefunction|decorator|decoratormethod|attribute|data|exception|property|macro|type|member|var|"
    r"cmdoption|option|opcode|pdbcommand|2to3fixer|envvar|confval|audit-event-table)"
)
_DIRECTIVE = re.compile(r"\.\. ([\w:+-]+)::\s*(.*)")
_INLINE = (
    (re.compile(r"\[#\w*\]_|\[\d+\]_|\[[A-Z]\w+\]_"), ""),
    (re.compile(r":[\w:+.-]+:`!?~(?:[\w.]*\.)?([^`<]+)`"), r"\1"),
    (re.compile(r":[\w:+.-]+:`!?([^`<]+?)\s*<[^`>]*>`"), r"\1"),
    (re.compile(r":[\w:+.-]+:`!?([^`]+)`"), r"\1"),
    (re.compile(r"``(.+?)``"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?"), r"\1"),
    (re.compile(r"`([^`]+)`_{0,2}"), r"\1"),
    (re.compile(r"(?<![\w*])\*\*(\S(?:.*?\S)?)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*(\S(?:[^*]*?\S)?)\*(?!\w)"), r"\1"),
    (re.compile(r"\|(\w+)\|"), r"\1"),
    (re.compile(r"::$"), ":"),
    (re.compile(r"\\(.)"), r"\1"),
)


def restructured_text(text: str) -> str:
    """The prose of a page, one paragraph a line: no directives, code, tables, targets or inline markup."""
    kept: list[str] = []
    skipped_indent: int | None = None
    # Blank lines separate blocks, except that a directive may directly follow a heading.
    for block in re.split(r"\n[ ]*\n|\n(?=[ ]*\.\. )", text.expandtabs()):
        lines = [line for line in block.splitlines() if line.strip()]
        if not lines:
            continue
        indent = len(lines[0]) - len(lines[0].lstrip())
        if skipped_indent is not None and indent > skipped_indent:
            continue
        skipped_indent = None
        prose, skips = _prose([line.strip() for line in lines])
        if skips:
            skipped_indent = indent
        kept.extend(paragraph for paragraph in map(_without_inline_markup, prose) if paragraph)
    return "\n".join(kept)


def _prose(lines: list[str]) -> tuple[list[str], bool]:
    """The paragraphs of one block, and whether to skip the blocks indented below it, which are not prose."""
    directive = _DIRECTIVE.match(lines[0])
    if directive:
        return _directive_prose(directive[1], directive[2], lines[1:])
    if lines[0].startswith((".. ", "__ ", ">>>", "+--", "$ ", "...")) or lines[0] == "..":
        return [], True
    table = next((i for i, line in enumerate(lines) if re.fullmatch(r"=+( +=+)+", line)), len(lines))
    lines = [line for line in lines[:table] if not re.fullmatch(r"([^\w\s])\1{2,}|[| ]+", line)]
    return _items(lines), bool(lines) and lines[-1].endswith("::")


def _directive_prose(name: str, argument: str, lines: list[str]) -> tuple[list[str], bool]:
    body = [line for line in lines if not re.match(r":[\w-]+:( |$)", line)]
    if _PROSE_DIRECTIVES.fullmatch(name):
        if name.startswith(("version", "deprecated")):
            release = argument.split()
            argument = f"{name.split('-')[0].removeprefix('version').capitalize()} in {' '.join(release[:1])}."
        return [" ".join([argument, *body]).strip()], bool(body) and body[-1].endswith("::")
    if _SIGNATURES.fullmatch(name):
        return [argument.rstrip("\\").strip()], False
    return [], True


def _items(lines: list[str]) -> list[str]:
    """Joins a block's lines; each list item becomes a paragraph."""
    joined: list[str] = []
    for line in lines:
        item = re.match(r"(?:[*\-+•]|#\.|\d+[.)]|\|) +(.*)", line)
        if item:
            joined.append(item[1])
        elif joined:
            joined[-1] += " " + line
        else:
            joined.append(line)
    return joined


def _without_inline_markup(text: str) -> str:
    for pattern, replacement in _INLINE:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())
