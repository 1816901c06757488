"""Turns the sources' markup into plain text, one paragraph per line."""

import re
from html.parser import HTMLParser

_BLOCKS = re.compile(r"p|div|h[1-6]|hr|br|ul|ol|li|dl|dt|dd|blockquote|center|pre|table|tr|th|td")
_HIDDEN = re.compile(r"head|script|style")


def paragraphs(text: str) -> str:
    """Joins the lines of each paragraph (paragraphs are separated by blank lines) with single spaces."""
    blocks = (" ".join(block.split()) for block in re.split(r"\n[ \t]*\n", text.replace("\r\n", "\n")))
    return "\n".join(block for block in blocks if block)


class _HTMLText(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += bool(_HIDDEN.fullmatch(tag))
        if _BLOCKS.fullmatch(tag):
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        self._hidden = max(0, self._hidden - bool(_HIDDEN.fullmatch(tag)))
        if _BLOCKS.fullmatch(tag):
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(re.sub(r"\s+", " ", data.replace("\xad", "")))


def html_text(html: str) -> str:
    """The visible text of an HTML page."""
    parser = _HTMLText()
    parser.feed(html)
    parser.close()
    return paragraphs("".join(parser.parts))
