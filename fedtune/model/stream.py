"""A language model's answer, piece by piece, as it is written: for a person at a terminal or a program at a
server."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import date
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from fedtune.errors import FedtuneError
from fedtune.hf.draws import own_draws
from fedtune.model.generate import ends, prompt_room, questions
from fedtune.model.loss import autocast
from fedtune.model.predict import UNKNOWN
from fedtune.model.template import THE_DATE
from fedtune.model.tunable import TunableModel


@dataclass(frozen=True)
class Wish:
    """How an answer is to be written. temperature 0 is greedy; seed None draws anew each time."""

    tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass
class Answer:
    """An answer that is being written: iterate over its pieces once; `close` ends it early.

    asked, said  tokens of the prompt, and of the answer so far
    finish       stop or length, when it is through
    """

    asked: int
    pieces: Iterator[str] = field(repr=False)
    closed: threading.Event = field(default_factory=threading.Event, repr=False)
    said: int = 0
    finish: str = "stop"

    def __iter__(self) -> Iterator[str]:
        return self.pieces

    def close(self) -> None:
        self.closed.set()


class Closed(StoppingCriteria):  # type: ignore[misc]  # how transformers asks whether to go on
    """Stops where nobody listens any more, and counts."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer

    def __call__(self, ids: torch.Tensor, scores: Any, **more: Any) -> torch.Tensor:
        self.answer.said += 1
        return torch.full((len(ids),), self.answer.closed.is_set(), device=ids.device)


def tokens_of_chat(
    tunable: TunableModel,
    messages: Sequence[Mapping[str, Any]],
    template: str = "auto",
    system: str = "",
    day: date = THE_DATE,
) -> list[int]:
    """A conversation that ends with the user, up to where the answer begins: through the model's own chat
    template; without one the last message alone, as [data] template says. Raises C103, D203."""
    if not messages or messages[-1].get("role") != "user":
        raise FedtuneError(
            "C103", "messages whose last one is not the user's", "a question", "end with the user"
        )
    talks = bool(tunable.base.tokenizer.chat_template) and template in ("auto", "chat")
    if talks:
        row: dict[str, Any] = {"messages": [*messages, {"role": "assistant", "content": UNKNOWN}]}
    else:
        row = {"prompt": str(messages[-1]["content"]), "response": UNKNOWN}
        system, template = "", template if template in ("auto", "plain") else "plain"
    return questions([row], tunable, template, system, day)[0].tokens


def answer(tunable: TunableModel, prompt: Sequence[int], wish: Wish) -> Answer:
    """What the model says to a prompt, as it stands: attached or, inside `without`, the base. A prompt that
    leaves no room for the answer loses its beginning. Raises D207."""
    ids = list(prompt)[-prompt_room(tunable, wish.tokens) :]
    streamer = TextIteratorStreamer(tunable.base.tokenizer, skip_prompt=True, skip_special_tokens=True)
    made = Answer(len(ids), iter(()))
    failed: queue.SimpleQueue[BaseException] = queue.SimpleQueue()
    net = tunable.net if tunable.base.attached is tunable else tunable.base.net

    def work() -> None:
        try:
            write(tunable, net, ids, wish, made, streamer)
        except BaseException as error:  # it is raised where somebody reads
            failed.put(error)
            streamer.end()

    made.pieces = pieces(threading.Thread(target=work, daemon=True), streamer, made, wish, failed)
    return made


def write(
    tunable: TunableModel, net: Any, ids: list[int], wish: Wish, made: Answer, streamer: TextIteratorStreamer
) -> None:
    device = tunable.base.device
    sampling = {"do_sample": True, "temperature": wish.temperature, "top_p": wish.top_p, "top_k": 0}
    config = GenerationConfig(
        **(sampling if wish.temperature else {"do_sample": False}),
        max_new_tokens=wish.tokens,
        pad_token_id=tunable.base.tokenizer.pad_token_id,
        eos_token_id=ends(tunable),
        use_cache="prompts" not in tunable.named,
    )
    prompt = torch.tensor([ids], device=device)
    draws = own_draws(wish.seed, device) if wish.temperature else nullcontext()
    net.eval()
    with torch.no_grad(), autocast(tunable, "off"), draws:
        net.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=config,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([Closed(made)]),
        )


def pieces(
    thread: threading.Thread,
    streamer: TextIteratorStreamer,
    made: Answer,
    wish: Wish,
    failed: queue.SimpleQueue[BaseException],
) -> Iterator[str]:
    """Starts the work, hands on its text, and ends it before the first of the stop texts; that text is not
    said. What might be the beginning of one waits for its end."""
    thread.start()
    held = ""
    try:
        for piece in streamer:
            held += piece
            places = [place for stop in wish.stop if (place := held.find(stop)) >= 0]
            if places:
                yield held[: min(places)]
                held = ""
                return
            keep = max((begun(held, stop) for stop in wish.stop), default=0)
            if len(held) > keep:
                yield held[: len(held) - keep]
                held = held[len(held) - keep :]
        if held:
            yield held
        made.finish = "length" if made.said >= wish.tokens else "stop"
    finally:
        made.close()
        thread.join()
        if not failed.empty():
            raise failed.get()


def begun(text: str, stop: str) -> int:
    """How many of the text's last characters might begin the stop text."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
