"""The coordinator's side of the exchange: states are laid out, rounds opened, updates picked up.

    store = ServerStore(folder)             # the runtime; any number of runs, in this process or another
    given = store.offer(run, encoded_state)                     # -> hash for the ticket
    store.open_round(run, 7, "train", base, {"site-a": given}, budget)
    ...                                     # the service (service.py) gives states and takes updates
    for update in store.accepted(run, 7, "train"): store.read(...)
    store.close_round(run, 7, "train")      # updates that come later are refused as stale
    store.release(run, 6)                   # after the journal's commit

Everything is in the folder: a process that dies goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

from fedtune.errors import FedtuneError
from fedtune.exchange.objects import Store, absent
from fedtune.exchange.round_ledger import Accepted, Progress, RoundLedger
from fedtune.forms import Sha256


class ServerStore:
    """One exchange's folder. Safe between threads and processes."""

    def __init__(self, folder: Path) -> None:
        self.store = Store(folder)
        self.ledger = RoundLedger(folder / "book.db")

    def offer(self, run: str, data: bytes) -> Sha256:
        """Lay out a state for a run; returns its SHA-256 (hex). Offered twice is offered once. Raises R404,
        E804."""
        sha256 = Sha256(hashlib.sha256(data).hexdigest())
        self.ledger.pin(run, sha256)  # first: a release of another run must not take it away in between
        return self.store.put(data, sha256)

    def open_round(
        self, run: str, round: int, verb: str, base: str, given: Mapping[str, str], budget: int
    ) -> None:
        """Take updates. Again is fine: what was accepted stays accepted.

        given    client's name -> hash of the state that it is given, as `offer` returned it
        budget   most bytes of one update

        Raises E803 where a state was not offered.
        """
        for sha256 in map(Sha256, set(given.values())):
            if not self.store.has(sha256):
                raise absent(sha256)
        self.ledger.open_round(run, round, verb, base, given, budget)

    def close_round(
        self,
        run: str,
        round: int,
        verb: str,
        why: Mapping[str, str] | None = None,
        again: Collection[str] = (),
    ) -> None:
        """Take no more updates: who has not answered is left out for good, but for those in `again`."""
        self.ledger.close_round(run, round, verb, why or {}, again)

    def left_out(self, run: str, round: int, verb: str) -> dict[str, str]:
        """Whom a question was closed without, and why."""
        return self.ledger.left_out(run, round, verb)

    def let_in(self, run: str, anew: bool = False) -> None:
        """After a round that was given up: everybody may answer when it is asked anew. `anew`: and nothing
        that was accepted counts, because masked sums begin with fresh keys."""
        self.ledger.let_in(run, anew)

    def accepted(self, run: str, round: int, verb: str) -> list[Accepted]:
        """The updates that count, by client's name."""
        return self.ledger.accepted(run, round, verb)

    def read(self, run: str, round: int, verb: str, client: str) -> bytes:
        """An accepted update. Raises E803; E807 where its bytes were damaged on disk: it then no longer
        counts, and the client may be asked again."""
        found = [update for update in self.accepted(run, round, verb) if update.client == client]
        if not found:
            raise FedtuneError(
                "E803",
                f"no update of '{client}' for round {round}",
                "one that was accepted",
                "wait for its receipt",
            )
        try:
            return self.store.read(found[0].payload)
        except FedtuneError as error:
            if error.code in ("E803", "E807"):
                self.ledger.forget(run, round, verb, client)
            raise

    def release(self, run: str, through: int) -> None:
        """Remove states and updates of a run's rounds up to this one. Receipts are kept."""
        self.ledger.release(run, through, self.store.remove)
        for part in self.store.parts(run):
            if part.round <= through:
                part.path.unlink(missing_ok=True)

    def progress(self, run: str = "") -> list[Progress]:
        """Newest rounds first."""
        return self.ledger.progress(run)

    def sweep(self) -> None:
        """Remove what a crash left and nobody needs. Called when the service starts."""
        with self.ledger.transaction():
            for path in self.store.objects.iterdir():
                if not self.ledger.wanted(
                    path.name.lstrip(".").partition(".")[0]
                ):  # a name with a dot is a write that was cut
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        self.ledger.close()
