"""Tickets in their order: once a site has had a newer one of a run, an older one that somebody found or kept
is not done again, whatever became of the site's other files.

HOME/tickets.json holds the newest number of each run, of so many runs; `floor` is the highest of those that
were forgotten, so that a run of long ago cannot begin anew. A ticket's number is when it was signed, in
microseconds.
"""

from __future__ import annotations

import json
from pathlib import Path

from fedtune.disk import write_atomic
from fedtune.errors import FedtuneError
from fedtune.forms import RunName

FILE = "tickets.json"
RUNS = 64  # that are remembered
AHEAD = 600.0  # seconds: a number of next year would shut this site to every ticket before it


class TicketWindow:
    """One site's. One thread at a time."""

    def __init__(self, home: Path) -> None:
        self.path = home / FILE
        self.floor, self.newest = 0, dict[str, int]()
        try:
            tree = json.loads(self.path.read_bytes())
            self.newest = {str(run): int(number) for run, number in tree["newest"].items()}
            self.floor = int(tree["floor"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            self.floor, self.newest = 0, {}  # a new home, or a file that was damaged

    def take(self, run: RunName, number: int, now: float) -> None:
        """Note a ticket that was checked; the same one again is fine. Raises R404, and E809, which is no word
        against the site: it is asked again."""
        last = self.newest.get(run, self.floor)
        if number < last:
            found = f"a ticket of run '{run}' that is {(last - number) / 1e6:.0f} s older than another one"
            raise FedtuneError("E809", found, "the newest", "nothing to do: the newest one counts")
        if number > (now + AHEAD) * 1e6:
            found = f"a ticket that was signed {number / 1e6 - now:.0f} s from now"
            raise FedtuneError("E809", found, "one of before", "set the clocks of both machines (NTP)")
        if number == last:
            return
        self.newest[run] = number
        for old in sorted(self.newest, key=lambda name: self.newest[name])[:-RUNS]:
            self.floor = max(self.floor, self.newest.pop(old))
        write_atomic(self.path, json.dumps({"floor": self.floor, "newest": self.newest}).encode())
