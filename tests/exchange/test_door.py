"""Behind TLS: who calls, how many calls each may have, what is said of an error, and what the service says of itself."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from fedtune.errors import FedtuneError
from fedtune.events import Event
from fedtune.exchange import ExchangeClient, tls
from fedtune.exchange.events import CallRefused
from fedtune.exchange.grpc_errors import NoRoom
from fedtune.exchange.limits import FRAME
from fedtune.exchange.service import NAME, Server
from fedtune.exchange.split_service import dial
from fedtune.exchange.tls import CLIENT_OPTIONS, SERVER_OPTIONS, Door, secure_channel, server_options
from fedtune.trust import AllowList, Identity, load
from fedtune.trust.authority import Authority, create, revoke
from fedtune.wire.v1 import exchange_pb2 as pb
from tests.exchange.federation import STATE, Federation
from tests.exchange.pushing import Ended, code_of
from tests.waiting import PATIENCE

S = grpc.StatusCode


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = create(tmp_path_factory.mktemp("keys") / "keys", "hospitals", ["localhost"], 30)
    for name in ("site-a", "site-b"):
        made.issue(name, 30)
    return made


class Call(Ended):
    """A call of a member as the server sees it."""

    def __init__(self, identity: Identity | None, active: bool = True) -> None:
        super().__init__()
        self.pem, self.active, self.cancelled = identity and identity.certificate, active, 0

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [self.pem]} if self.pem else {}

    def is_active(self) -> bool:
        return self.active

    def cancel(self) -> None:
        self.cancelled += 1


@pytest.fixture
def door(authority: Authority) -> SimpleNamespace:
    """With two calls of a member at once, and what was told."""
    told: list[Event] = []
    return SimpleNamespace(it=Door("hospitals", AllowList(authority.allowed), told.append, 2), told=told)


@pytest.fixture
def site(authority: Authority) -> Identity:
    return load(authority.place("site-a"))


def ended(call: Any, *arguments: Any) -> Ended:
    with pytest.raises(Ended) as caught:
        result = call(*arguments)
        list(result)
    return caught.value


# --- the door ---


def test_a_caller_is_who_its_certificate_says(door: SimpleNamespace, site: Identity, tmp_path: Path) -> None:
    assert door.it.peer(Call(site)) == site.peer
    banks = load(create(tmp_path / "banks", "banks", ["localhost"], 30).place("coordinator"))
    for other in (None, banks):
        with pytest.raises(FedtuneError, match=r"^T705"):
            door.it.peer(Call(other))


@pytest.mark.parametrize("kind", ["_single", "_stream"])
def test_whoever_may_not_call_reaches_nothing_and_is_told_of(
    door: SimpleNamespace, site: Identity, authority: Authority, kind: str
) -> None:
    reached: list[Any] = []

    def behavior(request: Any, context: Any) -> Any:
        reached.append(request)
        return iter([request])

    run = getattr(door.it, kind)(behavior, "Fetch")
    assert list(run("hello", Call(site))) == ["hello"] == reached
    gone = load(authority.renew("site-b", 30))
    revoke(authority.place("coordinator"), "site-b", gone.peer.key[:16])
    for caller, code, name in ((gone, "T706", "site-b"), (None, "T705", "?")):
        call = ended(run, "again", Call(caller))
        assert call.code() is S.PERMISSION_DENIED and (call.details() or "").startswith(code)
        told = door.told.pop()
        assert isinstance(told, CallRefused)
        assert (told.call, told.peer, told.code, told.text) == ("Fetch", name, code, call.details())
    assert reached == ["hello"] and not door.told


@pytest.mark.parametrize("kind", ["_single", "_stream"])
def test_an_unforeseen_error_is_a_number_for_the_caller_and_a_line_for_the_operator(
    door: SimpleNamespace, site: Identity, kind: str
) -> None:
    def fails(request: Any, context: Any) -> Any:
        raise request

    run = getattr(door.it, kind)(fails, "Push")
    call = ended(run, ValueError("patient 17"), Call(site))
    number = (call.details() or "").partition("number ")[2][:8]
    assert (
        call.code() is S.INTERNAL
        and "X900" in (call.details() or "")
        and "patient" not in (call.details() or "")
    )
    (told,) = door.told
    assert (told.call, told.peer, told.code) == ("Push", "site-a", "X900")
    assert told.text == f"{number}: ValueError: patient 17"
    over, gone = Call(site), Call(site, active=False)
    over.said = S.OK, "", None
    for context in (over, gone):  # ended already, by the handler or by the other end
        with pytest.raises(ValueError):
            list(run(ValueError(), context))
    with pytest.raises(grpc.RpcError):
        list(run(grpc.RpcError(), Call(site)))
    assert len(door.told) == 1


def test_a_member_has_so_many_calls_at_once_and_is_present_for_a_while(
    door: SimpleNamespace, site: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(tls, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with door.it._counted("b"), door.it._counted("b"):
        with pytest.raises(NoRoom, match="2 calls of 'b'") as full, door.it._counted("b"):
            pass
        assert full.value.retry_after == 2.0
        with pytest.raises(KeyError), door.it._counted("a"):
            raise KeyError
    for _ in range(3):
        with door.it._counted("b"), door.it._counted("a"):
            pass
    assert door.it.present() == ["a", "b"]
    now[0] = 1059.0
    with door.it._counted("c"):
        assert door.it.present() == ["a", "b", "c"]
    now[0] = 1060.0
    assert door.it.present() == ["c"] and door.it.present(61.0) == ["a", "b", "c"]


def test_a_call_that_says_nothing_is_ended(
    door: SimpleNamespace, site: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(tls, "time", SimpleNamespace(monotonic=lambda: now[0]))
    run, call = door.it._first(lambda request, context: (request, context)), Call(site)

    def hesitates() -> Iterator[str]:
        now[0] += 30.0
        door.it.cut_silent(30.0)
        assert call.cancelled == 0
        now[0] += 0.1
        door.it.cut_silent(30.0)
        assert call.cancelled == 1
        yield "hello"

    assert run(hesitates(), call) == ("hello", call)
    door.it.cut_silent(-1.0)
    assert call.cancelled == 1  # it has spoken
    with pytest.raises(FedtuneError, match=r"^E808"):
        run(iter([]), call)
    door.it.cut_silent(-1.0)
    assert call.cancelled == 1


def test_every_kind_of_call_goes_through_the_door(federation: Federation) -> None:
    client = federation.client()
    for name, kind in (("Status", "stream_unary"), ("Fetch", "stream_stream")):
        nothing = getattr(client.channel, kind)(f"/{NAME}/{name}")
        assert code_of(lambda call=nothing: list(call(iter([]), timeout=PATIENCE))) == "E808"
    calls = [event.call for event in federation.told if isinstance(event, CallRefused)]
    assert calls == ["Status", "Fetch"]
    with pytest.raises(grpc.RpcError) as caught:
        client.channel.unary_unary(f"/{NAME}/Nothing")(b"", timeout=PATIENCE)
    assert caught.value.code() is S.UNIMPLEMENTED


# --- what gRPC is told ---


def test_what_grpc_is_told_of_a_channel(site: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other machines are called by way of a proxy where there is one, this machine is not."""
    made: list[tuple[str, Any, dict[str, Any]]] = []
    monkeypatch.setattr(
        grpc,
        "secure_channel",
        lambda address, credentials, options: made.append((address, credentials, dict(options))),
    )
    secure_channel(site, "localhost:1")
    secure_channel(site, "fed.example.org:2", alone=True, longest=7)
    own = "grpc.use_local_subchannel_pool"
    longest = "grpc.max_receive_message_length"
    assert [one[0] for one in made] == ["localhost:1", "fed.example.org:2"]
    assert made[0][2] == {**dict(CLIENT_OPTIONS), "grpc.enable_http_proxy": 0, longest: FRAME, own: 0}
    assert made[1][2] == {**dict(CLIENT_OPTIONS), longest: 7, own: 1}
    assert all(isinstance(one[1], grpc.ChannelCredentials) for one in made)
    assert dict(server_options(9)) == {**dict(SERVER_OPTIONS), longest: 9}


def test_a_sites_way_to_the_body_beats_as_it_is_told(site: Identity) -> None:
    sockets = [dial(site, "localhost:1")(), dial(site, "localhost:1", 2.5)()]
    assert [one.beat for one in sockets] == [5.0, 2.5]
    for one in sockets:
        one.close()


# --- the service ---


def test_a_member_fetches_two_states_at_once_and_takes_no_others_place(federation: Federation) -> None:
    service, request = (
        federation.server.service,
        pb.FetchRequest(run="run-1", sha256=bytes.fromhex(federation.given)),
    )
    calls = {name: Call(federation.sites[name]) for name in ("site-a", "site-b")}

    def begun(name: str) -> Any:
        stream = service.fetch(request, Call(federation.sites[name]))
        return stream, next(stream)

    held = [begun("site-a"), begun("site-a")]
    with pytest.raises(NoRoom, match="2 downloads of 'site-a'") as full:
        begun("site-a")
    assert full.value.retry_after == 2.0
    held.append(begun("site-b"))
    assert {piece.total for _, piece in held} == {len(STATE)}
    for stream, _ in held:
        list(stream)
    assert begun("site-a") and not any(service._fetching[name] for name in calls if name != "site-a")


def test_a_download_that_does_not_move_is_cut(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedtune.exchange import service as module

    now, service = [time.monotonic()], federation.server.service
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    call = Call(federation.sites["site-a"])
    stream = service.fetch(pb.FetchRequest(run="run-1", sha256=bytes.fromhex(federation.given)), call)
    next(stream)
    now[0] += service.limits.stall_seconds
    service.cut_stalled()
    assert call.cancelled == 0
    now[0] += 0.1
    service.cut_stalled()
    assert call.cancelled == 1 and list(stream) == [] and not service._watched


def test_the_status_of_an_exchange_is_of_the_callers_runs(federation: Federation, tmp_path: Path) -> None:
    runs = [pb.RunStatus(run=name) for name in ("run-1", "run-2")]
    federation.limits["free_bytes"] = 1 << 20
    server = federation.start(runs=lambda: iter(runs))
    federation.open(4, "run-2", ("site-c",))
    a = federation.client(address=server.address)
    update = b"x" * 40
    a.send(federation.ticket(), update)
    said = a.status()
    assert [
        (one.run, one.round, one.verb, one.open, one.asked, one.accepted, one.bytes) for one in said.rounds
    ] == [("run-1", 1, "train", True, 2, 1, len(update))]
    assert [run.run for run in said.runs] == ["run-1"] and list(said.names) == [] and said.present == 1
    assert (said.oldest_protocol, said.newest_protocol, said.sequence, said.uploads) == (1, 1, 1, 0)
    assert abs(said.now - time.time()) < 60
    assert abs(said.free_bytes - (federation.server_store.store.free() - (1 << 20))) < 1 << 30
    own = ExchangeClient(server.address, federation.coordinator, tmp_path / "own")
    all_ = own.status()
    assert [run.run for run in all_.runs] == ["run-1", "run-2"] and list(all_.names) == [
        "coordinator",
        "site-a",
    ]
    assert [(one.run, one.round, one.verb) for one in all_.rounds] == [
        ("run-2", 4, "train"),
        ("run-1", 1, "train"),
    ]
    assert own.status("run-2").rounds[0].run == "run-2" and len(own.status("run-2").rounds) == 1
    for client in (a, own):
        client.close()
    server.stop(0)


def test_a_server_looks_twice_in_the_time_after_which_it_cuts() -> None:
    for stall, pause in ((0.5, 0.25), (30.0, 1.0)):
        waits: list[float] = []
        looked: list[Any] = []
        stopped = SimpleNamespace(wait=lambda seconds, waits=waits: waits.append(seconds) or len(waits) > 1)
        service = SimpleNamespace(
            limits=SimpleNamespace(stall_seconds=stall),
            cut_stalled=lambda looked=looked: looked.append("streams"),
        )
        door = SimpleNamespace(cut_silent=looked.append)
        Server._look(SimpleNamespace(_stopped=stopped, service=service, door=door))  # type: ignore[arg-type]
        assert waits == [pause] * 2 and looked == ["streams", stall]


def test_a_server_keeps_no_process_from_ending(federation: Federation) -> None:
    before = set(threading.enumerate())
    server = federation.start()
    assert all(
        thread.daemon for thread in set(threading.enumerate()) - before if "exchange" not in thread.name
    )
    assert server.connections.port == int(server.address.rpartition(":")[2])
    assert server.connections.each == server.service.limits.connections
    server.stop(0)
    assert server._stopped.is_set() and hashlib.sha256(STATE).hexdigest() == federation.given
