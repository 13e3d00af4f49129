# SPDX-License-Identifier: Apache-2.0
"""Names that others gave, of classes and files, as they can be shown: in one line, on paper, in a terminal, in any file.

A folder may be called anything, and its name is the class's: bytes that are no UTF-8, line breaks, codes that move a
terminal's cursor or turn the direction of what follows. Such characters are written as Python writes them; others stay.
"""

from __future__ import annotations

import unicodedata

UNSHOWABLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, lone surrogates, separators of lines and paragraphs
TURNING = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"  # the direction of the text around them
FOREIGN_BYTES = range(0xDC80, 0xDD00)  # how Python holds the bytes of a name that are no UTF-8
WIDEST = 24  # characters of a name in a picture


def readable(name: str) -> str:
    """A name without characters that cannot be shown.

    Example:
        >>> readable("a\\nb\\udce9")
        'a\\\\nb\\\\xe9'
    """
    return "".join(map(_shown, name))


def short(name: str) -> str:
    """A name for a picture, of at most :data:`WIDEST` characters; one without any is a pair of quotes."""
    name = readable(name)
    return (name if len(name) <= WIDEST else f"{name[: WIDEST - 8]}…{name[-7:]}") or '""'


def _shown(character: str) -> str:
    if ord(character) in FOREIGN_BYTES:
        return f"\\x{ord(character) - 0xDC00:02x}"
    if unicodedata.category(character) in UNSHOWABLE or character in TURNING:
        return character.encode("unicode_escape").decode()
    return character
