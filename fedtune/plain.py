"""Words of other parties, before a terminal or a page shows them: no control characters, no change of
direction, no end of a line that is not ours."""

from __future__ import annotations

import unicodedata

LONGEST = 2000  # characters of one text


def plain(text: str, longest: int = LONGEST) -> str:
    """The text with every control, format and unassigned character replaced by a middle dot, and cut."""
    cut = text if len(text) <= longest else text[: longest - 3] + "..."
    return "".join(
        "·" if unicodedata.category(sign)[0] == "C" or sign in "\u2028\u2029" else sign for sign in cut
    )
