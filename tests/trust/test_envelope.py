"""Signed records: no field can change, no two records share bytes, and a receipt proves itself."""

from __future__ import annotations

import hashlib
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import FedtuneError, Refused
from fedtune.forms import MemberName, RunName, Sha256, VerbName
from fedtune.trust import Envelope, Identity, Signed, Ticket, canonical, envelope, load, receipt, ticket
from fedtune.trust.authority import create

UPDATE = b"an update"
ENVELOPE = Envelope(
    "hospitals",
    "run-1",
    3,
    "site-a",
    "train",
    "b" * 64,
    "c" * 64,
    hashlib.sha256(UPDATE).hexdigest(),
    len(UPDATE),
    7,
    bytes(range(16)),
)
OTHER = {
    str: "x",
    int: 2,
    bytes: b"\xff" * 16,
    RunName: "x",
    MemberName: "x",
    VerbName: "x",
    Sha256: "d" * 64,
}


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    authority = create(tmp_path_factory.mktemp("trust") / "keys", "hospitals", ["localhost"], 30)
    return {
        "coordinator": load(authority.place("coordinator")),
        **{name: load(authority.issue(name, 30)) for name in ("site-a", "site-b")},
    }


def test_an_envelope_is_read_back_and_its_signature_holds(members: dict[str, Identity]) -> None:
    data = ENVELOPE.encode()
    assert envelope.decode(data) == ENVELOPE and data.startswith(b"fedtune envelope v1\0")
    assert (
        envelope.verified(data, envelope.sign(ENVELOPE, members["site-a"]), members["site-a"].peer)
        == ENVELOPE
    )


@pytest.mark.parametrize("name", [field.name for field in fields(Envelope)])
def test_every_field_is_signed(name: str, members: dict[str, Identity]) -> None:
    site, signature = members["site-a"], envelope.sign(ENVELOPE, members["site-a"])
    altered = replace(
        ENVELOPE, **{name: "d" * 64 if name == "base" else OTHER[type(getattr(ENVELOPE, name))]}
    )
    assert altered != ENVELOPE and altered.digest != ENVELOPE.digest
    with pytest.raises(FedtuneError, match="T707"):
        envelope.verified(altered.encode(), signature, site.peer)
    if name not in ("protocol", "nonce"):
        with pytest.raises(Refused, match=f"W604: found {name} "):
            altered.require(**{name: getattr(ENVELOPE, name)})


def test_every_flipped_bit_and_every_cut_is_refused(members: dict[str, Identity]) -> None:
    data, site = ENVELOPE.encode(), members["site-a"]
    signature = envelope.sign(ENVELOPE, site)
    for at in range(0, len(data), 3):
        with pytest.raises(FedtuneError, match="T707"):
            envelope.verified(
                data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :], signature, site.peer
            )
        with pytest.raises(Refused, match="W60"):
            envelope.decode(data[:at])
    for bad in (b"", signature[:-1], bytes(64), signature[::-1]):
        with pytest.raises(FedtuneError, match="T707"):
            envelope.verified(data, bad, site.peer)
    with pytest.raises(Refused, match="W601"):
        envelope.decode(data + b"\0")


def test_nobody_speaks_for_another(members: dict[str, Identity]) -> None:
    """site-b signs what says it is site-a, and hands in what site-a signed."""
    b = members["site-b"]
    with pytest.raises(FedtuneError, match="T705"):
        envelope.verified(ENVELOPE.encode(), envelope.sign(ENVELOPE, b), b.peer)
    with pytest.raises(FedtuneError, match="T707"):
        envelope.verified(ENVELOPE.encode(), envelope.sign(ENVELOPE, members["site-a"]), b.peer)


def test_another_protocol_and_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(Refused, match="W602"):
        envelope.decode(replace(ENVELOPE, protocol=2).encode())
    with pytest.raises(Refused, match="W606"):
        envelope.decode(replace(ENVELOPE, sequence=1 << 63).encode())
    with pytest.raises(Refused, match="W601"):
        envelope.decode(replace(ENVELOPE, nonce=b"short").encode())
    for odd in (
        {"round": -1},
        {"size": 1 << 64},
        {"federation": "r" * (canonical.LONGEST + 1)},
        {"nonce": "text"},
    ):
        with pytest.raises(ValueError):
            replace(ENVELOPE, **odd).encode()  # type: ignore[arg-type]


texts = st.text(st.characters(codec="utf-8"), max_size=12)
numbers = st.integers(0, 2**64 - 1)
values = st.one_of(
    st.tuples(st.just("text"), texts),
    st.tuples(st.just("number"), numbers),
    st.tuples(st.just("bytes"), st.binary(max_size=12)),
)
records = st.tuples(st.sampled_from([b"a", b"ab", b"fedtune envelope v1"]), st.lists(values, max_size=5))


@given(records, records)
def test_two_records_never_share_bytes(
    one: tuple[bytes, list[tuple[canonical.Form, canonical.Value]]],
    two: tuple[bytes, list[tuple[canonical.Form, canonical.Value]]],
) -> None:
    """Equal bytes mean an equal tag and equal contents, field by field."""
    contents = [
        (tag, [canonical.to_bytes(form, value) for form, value in items]) for tag, items in (one, two)
    ]
    assert (canonical.join(*one) == canonical.join(*two)) == (contents[0] == contents[1])


@given(texts, texts, numbers, st.binary(max_size=12), st.integers(0, 12))
def test_moving_a_border_between_fields_changes_the_bytes(
    a: str, b: str, number: int, raw: bytes, at: int
) -> None:
    """The classic mistake: ("ab", "c") and ("a", "bc")."""
    both = a + b
    moved = [("text", both[:at]), ("text", both[at:]), ("number", number), ("bytes", raw)]
    fields: list[tuple[canonical.Form, canonical.Value]] = [
        ("text", a),
        ("text", b),
        ("number", number),
        ("bytes", raw),
    ]
    assert (canonical.join(b"t", moved) == canonical.join(b"t", fields)) == ((both[:at], both[at:]) == (a, b))  # type: ignore[arg-type]
    forms: dict[str, canonical.Form] = {"a": "text", "b": "text", "n": "number", "r": "bytes"}
    assert list(canonical.part(b"t", canonical.join(b"t", fields), forms).values()) == [a, b, number, raw]


@given(st.binary(max_size=80))
def test_only_what_join_makes_can_be_read(data: bytes) -> None:
    forms: dict[str, canonical.Form] = {"a": "text", "n": "number"}
    for candidate in (data, b"t\0" + data):
        try:
            read = canonical.part(b"t", candidate, forms)
        except Refused:
            continue
        assert canonical.join(b"t", [("text", read["a"]), ("number", read["n"])]) == candidate


NOW = datetime.now(UTC).replace(microsecond=123456)


def test_a_receipt_proves_itself_with_the_authority_alone(members: dict[str, Identity]) -> None:
    signed = receipt.write(ENVELOPE, 41, NOW, members["coordinator"])
    kept = Signed.from_json(signed.to_json())
    read = receipt.read(kept, members["site-a"].authority, ENVELOPE)
    assert (read.row, read.client, read.payload, read.size) == (41, "site-a", ENVELOPE.payload, len(UPDATE))
    assert datetime.fromtimestamp(read.accepted / 1e6, UTC) == NOW


@pytest.mark.parametrize("name", [field.name for field in fields(receipt.Receipt)])
def test_every_field_of_a_receipt_is_signed(name: str, members: dict[str, Identity]) -> None:
    signed = receipt.write(ENVELOPE, 41, NOW, members["coordinator"])
    read = receipt.read(signed, members["site-a"].authority)
    value = getattr(read, name)
    altered = replace(
        read, **{name: value + 1 if isinstance(value, int) else "d" * 64 if len(value) == 64 else value + "x"}
    )
    with pytest.raises(FedtuneError, match="T707"):
        receipt.read(replace(signed, record=altered.encode()), members["site-a"].authority)


def test_receipts_of_others_are_refused(members: dict[str, Identity], tmp_path: Path) -> None:
    site = members["site-a"]
    with pytest.raises(FedtuneError, match=r"T705.*receipt of 'site-b'"):
        receipt.read(receipt.write(ENVELOPE, 1, NOW, members["site-b"]), site.authority)
    other = create(tmp_path / "keys", "hospitals", ["localhost"], 30)
    with pytest.raises(FedtuneError, match="T705"):
        receipt.read(receipt.write(ENVELOPE, 1, NOW, load(other.place("coordinator"))), site.authority)
    with pytest.raises(FedtuneError, match="T704"):
        receipt.read(
            receipt.write(ENVELOPE, 1, NOW + timedelta(days=31), members["coordinator"]), site.authority
        )
    for odd in (
        {"round": 4},
        {"payload": "d" * 64},
        {"client": "site-b"},
        {"run": "run-2"},
        {"verb": "score"},
        {"size": 1},
    ):
        with pytest.raises(Refused, match="W604"):
            receipt.read(
                receipt.write(replace(ENVELOPE, **odd), 1, NOW, members["coordinator"]),
                site.authority,
                ENVELOPE,
            )  # type: ignore[arg-type]
    again = replace(ENVELOPE, nonce=bytes(16))  # the same update, signed a second time
    assert (
        receipt.read(receipt.write(ENVELOPE, 1, NOW, members["coordinator"]), site.authority, again).envelope
        == ENVELOPE.digest
    )
    for junk in (b"", b"{}", b'{"record": "!", "signature": "", "certificate": ""}', b"[]", b"\xff"):
        with pytest.raises(Refused, match="W601"):
            Signed.from_json(junk)


def test_an_envelope_is_never_a_receipt(members: dict[str, Identity]) -> None:
    """The domain tag: a signature for one kind of record is none for another."""
    coordinator = members["coordinator"]
    data = replace(ENVELOPE, client="coordinator").encode()
    with pytest.raises(Refused, match="W601"):
        receipt.read(Signed(data, coordinator.sign(data), coordinator.certificate), coordinator.authority)


TICKET = Ticket(
    "run-1",
    3,
    "site-a",
    "train",
    "fed.example.org:9443",
    "b" * 64,
    "c" * 64,
    10,
    1 << 20,
    details='{"seed": 7}',
)


def test_a_client_acts_on_what_its_coordinator_signed_only(
    members: dict[str, Identity], tmp_path: Path
) -> None:
    signed = ticket.write(TICKET, members["coordinator"])
    assert ticket.read(signed, members["site-a"]) == replace(TICKET, federation="hospitals")
    with pytest.raises(Refused, match="W604"):
        ticket.read(signed, members["site-b"])
    with pytest.raises(FedtuneError, match="T705"):
        ticket.read(ticket.write(TICKET, members["site-b"]), members["site-a"])
    other = create(tmp_path / "keys", "hospitals", ["localhost"], 30)
    with pytest.raises(FedtuneError, match="T705"):
        ticket.read(ticket.write(TICKET, load(other.place("coordinator"))), members["site-a"])
    kept = Signed.from_json(signed)
    for name in (
        "run",
        "round",
        "verb",
        "address",
        "base",
        "given",
        "given_size",
        "budget",
        "attempt",
        "details",
    ):
        value = getattr(TICKET, name)
        altered = replace(
            TICKET,
            federation="hospitals",
            **{name: value + 1 if isinstance(value, int) else "d" * 64 if len(value) == 64 else value + "x"},
        )
        record = Signed.from_json(ticket.write(altered, members["coordinator"])).record
        with pytest.raises(FedtuneError, match="T707"):
            ticket.read(replace(kept, record=record).to_json(), members["site-a"])


def test_a_version_and_the_one_before_it_understand_each_other_and_no_others(
    members: dict[str, Identity], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator of protocol 2 asks a site of protocol 1 in protocol 1; the site's answer is in it too."""
    old = ENVELOPE.encode()
    asked = ticket.write(
        Ticket("run-1", 1, "site-a", "train", "", "b" * 64, "c" * 64, 1, 10, protocol=1),
        members["coordinator"],
    )
    monkeypatch.setattr(envelope, "PROTOCOL", 2)
    assert envelope.decode(old).protocol == 1 and ticket.read(asked, members["site-a"]).protocol == 1
    assert envelope.decode(replace(ENVELOPE, protocol=2).encode()).protocol == 2
    with pytest.raises(Refused, match="W602: found protocol 3, expected protocol 1 to 2"):
        envelope.decode(replace(ENVELOPE, protocol=3).encode())
    monkeypatch.setattr(envelope, "OLDEST", 2)
    with pytest.raises(Refused, match="W602: found protocol 1, expected protocol 2;"):
        ticket.read(asked, members["site-a"])


def test_words_and_numbers_of_a_ticket_or_an_envelope_are_in_their_forms() -> None:
    """They name files at the other end."""
    for made in (ENVELOPE, TICKET):
        for field, bad in {
            "run": "../x",
            "client": "A",
            "verb": "a/b",
            "given": "c" * 63,
            "base": "x",
        }.items():
            with pytest.raises(Refused, match=r"^W601"):
                replace(made, **{field: bad})
        assert replace(made, base="").base == ""
    with pytest.raises(Refused, match=r"^W601"):
        replace(ENVELOPE, payload="E" * 64)
    for field in ("round", "given_size", "budget", "attempt"):
        assert getattr(replace(TICKET, **{field: (1 << 63) - 1}), field) == (1 << 63) - 1
        assert getattr(replace(TICKET, **{field: 0}), field) == 0
        for bad in (1 << 63, -1):
            with pytest.raises(Refused, match=rf"^W606: found {field}"):
                replace(TICKET, **{field: bad})
    for field in ("round", "size", "sequence"):
        assert (
            getattr(envelope.decode(replace(ENVELOPE, **{field: (1 << 63) - 1}).encode()), field)
            == (1 << 63) - 1
        )
        with pytest.raises(Refused, match=rf"^W606: found {field}"):
            envelope.decode(replace(ENVELOPE, **{field: 1 << 63}).encode())
