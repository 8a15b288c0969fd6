"""What the coordinator asks of one client, signed: whoever carries it can neither change it nor make one up.

Flower's messages carry tickets, and a client acts on what its coordinator signed only: access to Flower's own
service is then no
way to make a site compute something.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedtune.errors import Refused
from fedtune.forms import MemberName, RunName, Sha256, VerbName, sha256_or_nothing
from fedtune.trust import canonical
from fedtune.trust.certificates import utc_now
from fedtune.trust.envelope import PROTOCOL, require_spoken
from fedtune.trust.identity import Identity
from fedtune.trust.signed import Signed, check, seal

TAG = b"fedtune ticket v1"
FORMS: dict[str, canonical.Form] = {
    "protocol": "number",
    "federation": "text",
    "run": "text",
    "round": "number",
    "client": "text",
    "verb": "text",
    "address": "text",
    "base": "text",
    "given": "text",
    "given_size": "number",
    "budget": "number",
    "attempt": "number",
    "details": "text",
}


@dataclass(frozen=True)
class Ticket:
    """One question to one client.

    address     host:port of the exchange
    base        fingerprint of the frozen base model, "" where there is none
    given       SHA-256 (hex) of the state to fetch, given_size its bytes
    budget      most bytes of the answer
    attempt     1; higher where an accepted answer was lost and is wanted anew
    details     what else the runtime wants to say, at most 1 MiB
    protocol    the newest that both ends speak; the answer is written in it
    """

    run: RunName
    round: int
    client: MemberName
    verb: VerbName
    address: str
    base: str
    given: Sha256
    given_size: int
    budget: int
    attempt: int = 1
    details: str = ""
    federation: str = ""
    protocol: int = PROTOCOL

    def __post_init__(self) -> None:
        """Raises Refused W601, W606 for words and numbers that are none: a ticket names files at a site."""
        for name, form in (("run", RunName), ("client", MemberName), ("verb", VerbName), ("given", Sha256)):
            object.__setattr__(self, name, form(getattr(self, name)))
        sha256_or_nothing(self.base)
        for name in ("round", "given_size", "budget", "attempt"):
            if not 0 <= getattr(self, name) < 1 << 63:
                raise Refused(
                    "W606",
                    f"{name} {getattr(self, name)}",
                    "less than 2**63",
                    "ask the coordinator's operator",
                )


def write(ticket: Ticket, coordinator: Identity) -> bytes:
    """The signed ticket as JSON (ASCII); the federation is the coordinator's."""
    ticket = replace(ticket, federation=coordinator.name.federation)
    record = canonical.join(TAG, [(form, getattr(ticket, name)) for name, form in FORMS.items()])
    return seal(record, coordinator).to_json()


def read(content: bytes, identity: Identity) -> Ticket:
    """A ticket for this client. Raises T704, T705, T707, Refused W601, W602, W604."""
    signed = Signed.from_json(content)
    check(signed, identity.authority, utc_now(), "ticket")
    values = canonical.part(TAG, signed.record, FORMS)
    require_spoken(values["protocol"])
    ticket = Ticket(**values)  # type: ignore[arg-type]  # FORMS gives the types
    if (ticket.federation, ticket.client) != (identity.name.federation, identity.name.name):
        raise Refused(
            "W604",
            f"a ticket for '{ticket.client}' of '{ticket.federation}'",
            f"one for '{identity.name.name}'",
            "send it to the right client",
        )
    return ticket
