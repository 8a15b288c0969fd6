"""Conversations with a run's model, and with its base for comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.data.settings import Source
from fedtune.errors import FedtuneError
from fedtune.runtime.predict import model_of
from fedtune.types import LM_TASKS

if TYPE_CHECKING:
    from fedtune.model.stream import Answer, Wish
    from fedtune.model.tunable import TunableModel


@dataclass
class Talker:
    """A language model that answers, and how its conversations are written."""

    tunable: TunableModel
    data: Source
    name: str

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """Tokens of a conversation that ends with the user. Raises C103, D203."""
        from fedtune.model.stream import tokens_of_chat

        data = self.data
        asked = data.task in ("instruct", "preference")  # tasks that say how a conversation is written
        template, system = (data.template, data.system) if asked else ("auto", "")
        return tokens_of_chat(self.tunable, messages, template, system, data.date)

    def text_prompt(self, text: str) -> list[int]:
        """Tokens of a text that is to be gone on with."""
        ids = self.tunable.base.tokenizer(text)["input_ids"]
        end = self.tunable.base.tokenizer.eos_token_id
        return list(ids[:-1] if len(ids) > 1 and ids[-1] == end else ids)

    def answer(self, prompt: list[int], wish: Wish) -> Answer:
        from fedtune.model.stream import answer

        return answer(self.tunable, prompt, wish)


def talker(folder: Path, which: str = "best") -> Talker:
    """The model of a run, or of an adapter that `fedtune export` wrote. Raises M304, M306 (no language
    model)."""
    tunable, data = model_of(folder, which)
    if tunable.base.task not in LM_TASKS:
        raise FedtuneError(
            "M306",
            f"a conversation with a model of data.task = '{tunable.base.task}'",
            "a language model",
            "ask it with: fedtune predict",
        )
    return Talker(tunable, data, folder.name)


@dataclass
class Chat:
    """Conversations of the base and of the tuned model with the same questions, each with its own answers."""

    talker: Talker
    wish: Wish
    sides: tuple[str, ...] = ("base", "tuned")
    past: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def say(self, text: str, show: Callable[[str, str], None]) -> dict[str, str]:
        """Each side's answer, which it remembers; `show` is told each piece with the side that says it."""
        said = {}
        for side in self.sides:
            messages = [*self.past.get(side, []), {"role": "user", "content": text}]
            parts = []
            for piece in self.pieces(side, messages):
                show(side, piece)
                parts.append(piece)
            said[side] = "".join(parts).strip()
            self.past[side] = [*messages, {"role": "assistant", "content": said[side]}]
        return said

    def pieces(self, side: str, messages: list[dict[str, Any]]) -> Iterator[str]:
        from fedtune.model.tunable import without

        prompt = self.talker.prompt(messages)
        if side == "tuned":
            yield from self.talker.answer(prompt, self.wish)
            return
        tunable = self.talker.tunable
        with without(tunable):
            attached, tunable.base.attached = tunable.base.attached, None
            try:
                yield from self.talker.answer(prompt, self.wish)
            finally:
                tunable.base.attached = attached
