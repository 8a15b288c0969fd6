"""Plays."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

from fedtune.data.rows import Table
from fedtune.data.settings import TextFileSource
from fedtune.data.sources.files import existing
from fedtune.data.text_files import read_text
from fedtune.errors import FedtuneError

TURN = re.compile(r"^([A-Z][^\n:]{1,40}):\n(.*)$", re.S)  # "First Citizen:\nSpeak, speak."


class Plays(TextFileSource):
    """source = "plays": one row a speaker's turn, with columns text (heading, lines and the blank line after
    them) and speaker."""

    source: Literal["plays"] = "plays"
    tasks: ClassVar[frozenset[str]] = frozenset({"causal-lm", "classify"})
    suffixes: ClassVar[tuple[str, ...]] = (".txt",)

    def table(self) -> Table:
        """What has no heading is counted and left out."""
        path = existing(self)
        blocks = [block.strip() for block in read_text(path, self.encoding).split("\n\n") if block.strip()]
        turns = [(match[1], block) for block in blocks if (match := TURN.match(block))]
        if not turns:
            raise FedtuneError(
                "D202",
                f"no turns in '{path}'",
                "paragraphs that start with 'NAME:' on a line of its own",
                "correct data.path or data.source",
            )
        dropped = (
            {"paragraphs without a speaker's heading": len(blocks) - len(turns)}
            if len(blocks) > len(turns)
            else {}
        )
        return Table(
            [{"text": block + "\n\n", "speaker": speaker} for speaker, block in turns],
            str(path),
            dropped=dropped,
        )
