"""Half characters: text that no tokenizer takes, found before one is asked."""

from __future__ import annotations

import re

__all__ = ["half_character"]

_HALF = re.compile("[\ud800-\udfff]")


def half_character(text: str) -> str | None:
    """The first lone surrogate of a text as it is written in code (such as \\ud83c); None: every character is whole."""
    found = _HALF.search(text)
    return ascii(found[0])[1:-1] if found else None
