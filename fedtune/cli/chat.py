"""fedtune chat: talk with a run's model, beside the base that it was made of."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.cli.common import add_round
from fedtune.cli.waits import waiting
from fedtune.errors import FedtuneError
from fedtune.plain import plain
from fedtune.quiet import quiet

if TYPE_CHECKING:
    from fedtune.runtime.chat import Chat

HINT = "/new begins another conversation, /bye or Ctrl-D ends"


def add_commands(commands: Any) -> None:
    parser = commands.add_parser(
        "chat", help="talk with a run's language model, beside its base", description=__doc__
    )
    parser.add_argument("model", help="the folder of a run or of an adapter that fedtune export wrote")
    parser.add_argument("--say", default="", metavar="TEXT", help="one question instead of a conversation")
    parser.add_argument(
        "--only", choices=("base", "tuned"), default="", help="one of the two; without it, both answer"
    )
    parser.add_argument("--tokens", type=int, default=256, metavar="N", help="of an answer, at most")
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (the default) is greedy"
    )
    add_round(parser)
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    if options.tokens < 1 or options.temperature < 0:
        found = f"--tokens {options.tokens} and --temperature {options.temperature}"
        raise FedtuneError("C103", found, "1 or more, and 0 or more", "correct them")
    quiet()
    with waiting("reading the model"):
        from fedtune.model.stream import Wish
        from fedtune.runtime.chat import Chat, talker

        model = talker(Path(options.model).expanduser().resolve(), options.round)
    sides = (options.only,) if options.only else ("base", "tuned")
    chat = Chat(model, Wish(options.tokens, options.temperature), sides)
    person = sys.stdin.isatty() and not options.say
    if person:
        print(f"{model.name} on {model.tunable.base.name}; {HINT}")
    for text in [options.say] if options.say else questions(person):
        if text == "/new":
            chat.past.clear()
        else:
            show(chat, text)
    return 0


def questions(person: bool) -> Iterator[str]:
    """Lines of the standard input that are not blank, until it ends or says /bye."""
    while True:
        try:
            text = input("> " if person else "").strip()
        except EOFError:
            return
        if text == "/bye":
            return
        if text:
            yield text


def show(chat: Chat, text: str) -> None:
    """Both answers as they come: side by side where there is room, otherwise one under the other."""
    if sys.stdout.isatty() and len(chat.sides) > 1 and shutil.get_terminal_size().columns >= 80:
        side_by_side(chat, text)
        return
    last = ""

    def tell(side: str, piece: str) -> None:
        nonlocal last
        if side != last:
            print(f"{chr(10) if last else ''}{side}: ", end="")
            last = side
        print(clean(piece), end="", flush=True)

    chat.say(text, tell)
    print()


def side_by_side(chat: Chat, text: str) -> None:
    """Two columns that grow."""
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    said = dict.fromkeys(chat.sides, "")

    def table() -> Table:
        made = Table(*chat.sides, expand=True)
        made.add_row(*(Text(part) for part in said.values()))
        return made

    with Live(table(), auto_refresh=False) as live:

        def tell(side: str, piece: str) -> None:
            said[side] += clean(piece)
            live.update(table(), refresh=True)

        chat.say(text, tell)


def clean(text: str) -> str:
    """What a model says, on a terminal."""
    return "\n".join(plain(line, 1 << 20) for line in text.split("\n"))
