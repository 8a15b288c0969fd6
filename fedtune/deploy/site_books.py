"""A site's own books, for its operator: what has left, what was acknowledged, and for how long that is kept.

HOME/ledger.jsonl      a line for each answer, before it leaves
HOME/spool/*.receipt   the coordinator's signed word for each update that it accepted
HOME/audit.jsonl       the same and what was refused, each line under this site's signature (chained_log.py)
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from fedtune.disk import disk_errors, write_atomic
from fedtune.errors import FedtuneError
from fedtune.trust import Receipt, Signed, receipt
from fedtune.trust.chained_log import ChainedLog

LEDGER, SPOOL = "ledger.jsonl", "spool"
DAY = 24 * 3600.0
NEWEST = 20  # answers that `fedtune site status` shows


@dataclass(frozen=True)
class Sent:
    """An answer that left: when, of which run, round and verb, under which recipe; of how many rows; its
    bytes and their SHA-256."""

    at: float
    bytes: int
    run: str = ""
    round: int = 0
    verb: str = ""
    recipe: str = ""
    rows: int = 0
    sha256: str = ""


def note_sent(home: Path, sent: Sent, log: ChainedLog | None = None) -> None:
    """A line of the ledger, and of the audit log where one is kept: what leaves the house, before it does.
    Raises R404, T709."""
    if log:
        log.write("sent", datetime.fromtimestamp(sent.at, UTC), **asdict(sent))
    with disk_errors(home / LEDGER), (home / LEDGER).open("a", encoding="utf-8") as file:
        file.write(line_of(sent))


def line_of(sent: Sent) -> str:
    return json.dumps(asdict(sent), sort_keys=True) + "\n"


def ledger(home: Path) -> Iterator[Sent]:
    """What has left, in order; a line that a crash cut is passed over."""
    path = home / LEDGER
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield Sent(**json.loads(line))
            except (ValueError, TypeError):
                continue


def sent_since(home: Path, since: float) -> tuple[int, ...]:
    """Bytes of each answer that has left since a time."""
    return tuple(sent.bytes for sent in ledger(home) if sent.at >= since)


def receipts(home: Path, authority: x509.Certificate) -> Iterator[tuple[Path, Receipt | FedtuneError]]:
    """Each receipt, checked with nothing but the authority's certificate; or why it proves nothing."""
    for path in sorted((home / SPOOL).glob("*.receipt")):
        try:
            yield path, receipt.read(Signed.from_json(path.read_bytes()), authority)
        except FedtuneError as error:
            yield path, error


def forget(home: Path, days: float, now: float | None = None) -> int:
    """Remove lines and receipts that are older than so many days, and none of the last one: the policy counts
    those. How many. Raises R404."""
    before = (time.time() if now is None else now) - max(days, 1.0) * DAY
    held = list(ledger(home))
    kept = [sent for sent in held if sent.at >= before]
    if len(kept) < len(held):
        write_atomic(home / LEDGER, "".join(map(line_of, kept)).encode())
    old = [path for path in (home / SPOOL).glob("*.receipt") if path.stat().st_mtime < before]
    old += [path for path in (home / SPOOL).glob("*.refused") if path.stat().st_mtime < before]
    for path in old:
        path.unlink(missing_ok=True)
    return len(held) - len(kept) + len(old)


# --- in words ---


def status(home: Path) -> Iterator[str]:
    """What this site has done, the newest last; reads only."""
    held = list(ledger(home))
    day = [sent for sent in held if sent.at >= time.time() - DAY]
    waiting = len(list((home / SPOOL).glob("*.envelope")))
    kept = sum(path.stat().st_size for path in (home / "cache").glob("*")) if (home / "cache").exists() else 0
    runs = sorted({sent.run for sent in held})
    total = sum(sent.bytes for sent in held)
    yield f"{home}: {len(held)} answers to {len(runs)} runs, {total:,} bytes in all"
    yield f"last 24 hours: {len(day)} answers, {sum(sent.bytes for sent in day):,} bytes"
    tokens = sum(path.stat().st_size for path in (home / "tokens").glob("*.tokens"))
    yield (
        f"waiting to be sent: {waiting}; states in the cache: {kept:,} bytes; "
        f"rows kept as tokens: {tokens:,} bytes"
    )
    if held:
        yield f"{'when':<20}{'run':<28}{'round':>6} {'verb':<10}{'rows':>8}{'bytes':>14}  sha256"
    for sent in held[-NEWEST:]:
        yield (
            f"{datetime.fromtimestamp(sent.at):%Y-%m-%d %H:%M:%S} {sent.run[:27]:<28}{sent.round:>6} "
            f"{sent.verb[:9]:<10}{sent.rows:>8,}{sent.bytes:>14,}  {sent.sha256[:16]}  recipe "
            f"{sent.recipe[:16]}"
        )


def proven(home: Path, authority: x509.Certificate) -> Iterator[str]:
    """A line a receipt: when the coordinator took what, and whether this site's ledger says the same. Raises
    FedtuneError T707 at the end, where one proves nothing."""
    left = {(sent.run, sent.round, sent.verb, sent.sha256) for sent in ledger(home)}
    bad = 0
    for path, read in receipts(home, authority):
        if isinstance(read, FedtuneError):
            bad += 1
            yield f"{path.name[:16]}  proves nothing: {read}"
            continue
        when = datetime.fromtimestamp(read.accepted / 1e6, UTC)
        known = (read.run, read.round, read.verb, read.payload) in left
        yield (
            f"{when:%Y-%m-%d %H:%M:%S} UTC  run {read.run}  round {read.round}  '{read.verb}'  "
            f"{read.size:,} bytes  sha256 {read.payload[:16]}  number {read.row}  "
            f"{'' if known else 'not '}in the ledger"
        )
    if bad:
        raise FedtuneError(
            "T707",
            sentence=f"{bad} receipts of '{home}' are not signed by this federation's coordinator",
            do="keep them, and ask the coordinator's operator",
        )
