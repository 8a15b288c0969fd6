"""Whatever goes wrong in a client's half is that client's failure, on every engine: the round goes on without
it."""

from __future__ import annotations

import re
import secrets
import traceback
from collections.abc import Mapping
from pathlib import Path

from fedtune.errors import CATALOGUE, ClientFailed, FedtuneError, Paused, Refused

NUMBER = re.compile(r"[0-9a-f]{8}")


def failure_of(error: Exception, client: str, logs: Path | None = None) -> FedtuneError:
    """What a client's work raised, as the reason for which it is left out of the round.

    An error that fedtune did not foresee is R411, with its traceback in a file of `logs` on the client's
    machine. Raises Paused again: it
    is not about one client.
    """
    if isinstance(error, Paused):
        raise error
    if isinstance(error, (ClientFailed, Refused)):
        return error
    if isinstance(error, FedtuneError):
        return ClientFailed(error.code, error.found, error.expected, error.do)
    first = next(iter(str(error).strip().splitlines()), "")[:160]
    sentence = f"the work of client '{client}' stopped with {type(error).__name__}" + (
        f" ({first})" if first else ""
    )
    place = write_traceback(error, client, logs)
    return ClientFailed(
        "R411",
        sentence=sentence,
        do=f"see {place} on the client's machine" if place else "see the client's log",
    )


def write_traceback(error: Exception, client: str, logs: Path | None) -> Path | None:
    """Append the traceback to the client's file; a disk that takes no more must not turn one client's failure
    into another one."""
    if logs is None:
        return None
    path = logs / f"{re.sub(r'[^A-Za-z0-9._-]', '_', client)[:80] or 'client'}.txt"
    try:
        logs.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)) + "\n")
    except OSError:
        return None
    return path


def numbered(error: FedtuneError) -> tuple[dict[str, str], str]:
    """What leaves a site of an error: its code and a number. And the sentence that stays there, with cells,
    columns, paths and names, under that number."""
    number = secrets.token_hex(4)
    return {"code": error.code, "number": number}, f"{error} (number {number})"


def heard(outcome: Mapping[str, str], name: str) -> FedtuneError:
    """The other end of `numbered`: what happened, and who knows more. A code that this version does not know
    is still a failure of that client."""
    code, number = outcome.get("code", ""), outcome.get("number", "")
    about = f", number {number}" if NUMBER.fullmatch(number) else ""
    if code not in CATALOGUE:
        return ClientFailed(
            "F503",
            sentence=f"'{name}' reports an error whose code this version does not know{about}",
            do=f"ask the operator of '{name}'",
        )
    return ClientFailed(
        code,
        sentence=f"at '{name}'{about}: {CATALOGUE[code].rstrip('.')}",
        do=f"ask the operator of '{name}', whose worker.jsonl has the details",
    )
