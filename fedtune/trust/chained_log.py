"""A log in which no line can be changed, left out or put in without a later reader noticing: each line holds
the hash of the one before, and is signed by the member who keeps it (as in Schneier and Kelsey 1999, "Secure
Audit Logs to Support Computer Forensics", without their encryption).

A log that was cut off at its end is a shorter log that is in order: what it ends with has to be known from
elsewhere (the other side's log, a receipt, a hash that was written down).
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography import x509

from fedtune.disk import disk_errors, json_text
from fedtune.errors import FedtuneError
from fedtune.trust.certificates import member_of, peer_of, read_certificate
from fedtune.trust.envelope import check_signature
from fedtune.trust.identity import Identity

FILE = "audit.jsonl"
TAG = b"fedtune audit line v1"
LONGEST = 1 << 16  # bytes of a line


@dataclass
class ChainedLog:
    """A log to write. member: says who signs, now; None writes lines that are chained only."""

    path: Path
    member: Callable[[], Identity] | None = None
    _last: str = ""  # hash of the last line
    _number: int = -1  # of the last line; -1: not read yet
    _certificate: str = ""  # the last one that the log names

    def write(self, what: str, when: datetime, **facts: Any) -> None:
        """Append a line, and wait until it is on the disk. Raises R404, T709 for a log not in order."""
        if self._number < 0:
            self._take_up()
        member = self.member() if self.member else None
        certificate = member.certificate.decode() if member else ""
        if certificate != self._certificate:
            self._certificate = certificate
            self._append({"what": "key", "when": when.isoformat(), "certificate": certificate}, member)
        self._append({"what": what, "when": when.isoformat(), **facts}, member)

    def _take_up(self) -> None:
        self._number = 0
        if not self.path.exists():
            return
        with disk_errors(self.path), self.path.open("rb+") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            file.truncate(whole)  # a line that a crash cut was never written
        for line in lines(self.path):
            self._number, self._last = line["line"], line["hash"]
            self._certificate = line.get("certificate", self._certificate)

    def _append(self, facts: Mapping[str, Any], member: Identity | None) -> None:
        body = {**facts, "line": self._number + 1, "before": self._last}
        digest = hash_of(body)
        signed = base64.b64encode(member.sign(TAG + bytes.fromhex(digest))).decode() if member else ""
        line = json_text({**body, "hash": digest, "signature": signed}) + "\n"
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        self._number, self._last = self._number + 1, digest


def hash_of(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json_text(body, separators=(",", ":")).encode()).hexdigest()


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """Every line, in order, if it follows from the one before. Raises T709 for the first that does not."""
    before, number = "", 0
    with disk_errors(path), path.open("rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(LONGEST), b""), 1):
            try:
                line = json.loads(raw)
                body = {key: value for key, value in line.items() if key not in ("hash", "signature")}
                wrong = (
                    "has another content than its hash says"
                    if hash_of(body) != line["hash"]
                    else "does not follow from the line before"
                    if (body["line"], body["before"]) != (number, before)
                    else ""
                )
            except (ValueError, KeyError, TypeError, AttributeError):
                wrong = "is no line of an audit log"
            if wrong:
                raise bad_line(path, number, wrong)
            before = line["hash"]
            yield line


@dataclass(frozen=True)
class Verified:
    """What a log that is in order says of itself: how many lines, the last one's hash, who signed all of
    them; "" where some are not signed."""

    lines: int
    last: str
    signer: str


def verify(path: Path, authority: x509.Certificate | None = None) -> Verified:
    """Walk the chain and check every signature: with the authority, that a member of the federation made it;
    without it, that the key did which the log itself names. Raises C105 where there is no log, T709 for the
    first bad line."""
    if not path.exists():
        raise FedtuneError(
            "C105", f"no '{path}'", "an audit log", "give the folder of a run, or a site's home"
        )
    count, last, signers, key = 0, "", set[str](), None
    for line in lines(path):
        count, last = line["line"], line["hash"]
        try:
            if line["what"] == "key":
                key = line["certificate"]
            if not key or not line["signature"]:
                signers.add("")
                continue
            certificate = read_certificate(key.encode(), "a line's certificate")
            when = datetime.fromisoformat(line["when"])
            peer = member_of(certificate, authority, when) if authority else peer_of(certificate)
            signature = base64.b64decode(line["signature"], validate=True)
            check_signature(peer.signing_key, signature, TAG + bytes.fromhex(last), "line")
            signers.add(peer.name.name)
        except (FedtuneError, ValueError, KeyError, TypeError) as error:
            raise bad_line(path, count, f"is not signed as it says ({str(error)[:200]})") from error
    return Verified(count, last, signers.pop() if len(signers) == 1 else "")


def bad_line(path: Path, number: int, wrong: str) -> FedtuneError:
    return FedtuneError(
        "T709",
        sentence=f"line {number} of '{path}' {wrong}",
        do="keep the file, and compare it with a copy or with what the other side has",
    )
