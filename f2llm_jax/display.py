"""Text of any script in terminal columns."""

from __future__ import annotations

import unicodedata

# Right-to-left scripts and their digits: among left-to-right columns these reorder what is next to them.
_RIGHT_TO_LEFT = {"R", "AL", "AN"}

# Characters that control the direction of the text after them; a text must not affect the table around it.
_DIRECTIONS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}

FIRST_STRONG_ISOLATE, POP_ISOLATE = "\u2068", "\u2069"


def width(text: str) -> int:
    """The number of terminal columns of a text: two for a wide character, none for a combining mark."""
    return sum(_columns(char) for char in text)


def one_line(text: str) -> str:
    """The text with every run of white space collapsed into one space, and without control characters."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return "".join(
        char
        for char in text
        if unicodedata.category(char) != "Cc" and unicodedata.bidirectional(char) not in _DIRECTIONS
    )


def shorten(text: str, columns: int) -> str:
    """The text if it fits, else its beginning and an ellipsis."""
    if width(text) <= columns:
        return text
    end, used = 0, 1
    for char in text:
        used += _columns(char)
        if used > columns:
            break
        end += 1
    return text[:end] + "…"


def isolate(text: str) -> str:
    """A right-to-left text in isolating marks of no width, so that the columns around it stay in place."""
    if any(unicodedata.bidirectional(char) in _RIGHT_TO_LEFT for char in text):
        return FIRST_STRONG_ISOLATE + text + POP_ISOLATE
    return text


def _columns(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1
