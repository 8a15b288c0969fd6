"""What a person at a terminal sees: finished things as lines, and below them where the run stands now.

A thread of its own draws, so that a run never waits for a terminal; it rests while the run's process forks
(fedtune.forks), which a second thread would forbid.
"""

from __future__ import annotations

import queue
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from fedtune import forks
from fedtune.events import Event, Progress, Waiting
from fedtune.plain import plain
from fedtune.sinks.console import line, shown, size
from fedtune.sinks.standing import Standing, duration

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live as RichLive

EVERY = 0.25  # seconds between two drawings
LONG = 2.0  # seconds after which a display says how long something has been going on


class Live:
    """A sink and a context: `with Live() as tell`. What is told is shown until the block ends."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self.console = console or Console(highlight=False, markup=False, emoji=False)
        self.standing = Standing()
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.over = threading.Event()
        self.thread = threading.Thread()
        self.writing = threading.Lock()
        self.telling = threading.Lock()  # never held while something is written

    def __call__(self, event: Event) -> None:
        with self.telling:
            self.standing.told(event)
        text = "" if isinstance(event, (Progress, Waiting)) else line(event)
        if text:
            self.say(shown(event, text))

    def say(self, text: str) -> None:
        """A line above what is going on."""
        self.lines.put(text)

    def __enter__(self) -> Self:
        from rich.live import Live as RichLive

        self.live: RichLive = RichLive(
            console=self.console, auto_refresh=False, transient=True, get_renderable=self._now
        )
        self.live.start()
        self.go_on()
        forks.HELPERS.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        forks.HELPERS.remove(self)
        self.rest()
        with self.writing:  # all that was said is shown, however slow the terminal
            self._print_lines()
            self.live.stop()

    def go_on(self) -> None:
        """Draw from now on."""
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._draw, args=(self.over,), name="display", daemon=True)
        self.thread.start()

    def rest(self) -> None:
        """Draw no more. The thread ends at once, unless a terminal holds it up."""
        self.over.set()
        self.thread.join(EVERY)

    def _draw(self, over: threading.Event) -> None:
        while not over.wait(EVERY):
            with self.writing:
                self._print_lines()
                self.live.refresh()

    def _print_lines(self) -> None:
        while not self.lines.empty():
            self.console.print(self.lines.get(), markup=False, highlight=False, soft_wrap=True)

    def _now(self) -> RenderableType:
        with self.telling:
            return panel(self.standing, self.console.width)


def panel(standing: Standing, width: int = 80) -> RenderableType:
    """Up to three lines: the rounds, their figures, and what is going on this moment."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    rows: list[RenderableType] = []
    if standing.rounds and not standing.finished:
        head = Table.grid(padding=(0, 1))
        inside = standing.answered / standing.members if standing.round_began and standing.members else 0.0
        bar = ProgressBar(standing.rounds, standing.committed + inside, width=min(24, max(6, width // 5)))
        head.add_row(
            Text(f"round {standing.round} of {standing.rounds}", style="bold"),
            bar,
            Text(clients_in_words(standing), no_wrap=True, overflow="ellipsis"),
        )
        rows.append(head)
        if text := figures_in_words(standing):
            rows.append(Text(text, no_wrap=True, overflow="ellipsis"))
    if text := now_in_words(standing):
        rows.append(Text(plain(text), style="dim", no_wrap=True, overflow="ellipsis"))
    return Group(*rows)


def clients_in_words(standing: Standing) -> str:
    """Clients that have answered, and the time that the rounds will take."""
    parts = [f"{standing.answered} of {standing.members} clients"] if standing.members else []
    if left := standing.seconds_left():
        parts.append(f"about {duration(left)} left")
    return " · ".join(parts)


def figures_in_words(standing: Standing) -> str:
    """Loss with its trend, the last scores, bytes."""
    parts = [f"loss {standing.losses[-1]:.4f} {standing.trend}"] if standing.losses else []
    parts += [f"{phase} {metric} {value:.4f}" for phase, (metric, value) in standing.scores.items()]
    if standing.up_bytes or standing.down_bytes:
        parts.append(f"up {size(standing.up_bytes)}, down {size(standing.down_bytes)}")
    return " · ".join(parts)


def now_in_words(standing: Standing, now: float | None = None) -> str:
    """What is going on, how far it is, for how long it has been going on, and who is slow."""
    parts = []
    if standing.progress is not None:
        parts.append(progress_in_words(standing.progress))
    if standing.waited_for and standing.round_began:
        names = standing.waited_for
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        parts.insert(0, f"waiting for {names[0]}{more}")
    elif standing.what:
        parts.insert(0, standing.what)
    waited = (time.time() if now is None else now) - standing.since
    if parts and waited > LONG and not standing.finished:
        parts.append(f"for {duration(waited)}")
    if found := standing.slow():
        name, seconds, usual = found
        parts.append(f"slow: {name}, {seconds:.1f} s where others take {usual:.1f} s")
    return " · ".join(parts)


def progress_in_words(event: Progress) -> str:
    """
    >>> progress_in_words(Progress("training", 3, 20, 1.5)), progress_in_words(Progress("loading", 0, 0))
    ('training 3 of 20, loss 1.5000', 'loading')
    """
    far = f" {event.done:,} of {event.total:,}" if event.total else ""
    return f"{event.what}{far}" + (f", loss {event.loss:.4f}" if event.loss is not None else "")
