"""Why a secure connection does not come about, case by case; with real handshakes: test_tls.py."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fedtune.errors import FedtuneError
from fedtune.exchange import tls_diagnosis as module
from fedtune.exchange.tls_diagnosis import ours, reason, spoken, theirs, unlisted, unreachable
from fedtune.trust import Identity, load
from fedtune.trust.authority import create


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    return load(
        create(tmp_path_factory.mktemp("k") / "keys", "hospitals", ["localhost"], 30).issue("site-a", 30)
    )


@contextmanager
def listening(host: str = "127.0.0.1") -> Iterator[int]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as server:
        yield server.getsockname()[1]


def test_why_an_address_cannot_be_reached() -> None:
    with listening() as port:
        assert unreachable(f"127.0.0.1:{port}") == "" == unreachable(f"localhost:{port}")
    assert "refused" in unreachable(f"127.0.0.1:{port}")
    assert "invalid literal" in unreachable("127.0.0.1:x")
    if socket.has_ipv6:
        with listening("::1") as port:
            assert unreachable(f"[::1]:{port}") == ""


class Hangs:
    """A handshake that works, after which the other end says something, or hangs up."""

    def __init__(self, *says: Any) -> None:
        self.says, self.hosts = list(says), list[str]()

    def wrap_socket(self, plain: socket.socket, server_hostname: str) -> Any:
        self.hosts.append(server_hostname)
        return self

    def __enter__(self) -> Any:
        return SimpleNamespace(recv=self.recv)

    def __exit__(self, *error: Any) -> None:
        pass

    def recv(self, size: int) -> bytes:
        said = self.says.pop(0)
        if isinstance(said, Exception):
            raise said
        assert size == 1
        return bytes(said)


@pytest.mark.parametrize(
    ("says", "code", "tries"),
    [
        ([b"", b"", b""], "E802", 3),  # three times it means us
        ([b"", b"x"], "", 2),  # a coordinator that was just ending
        ([b"x"], "", 1),
        ([ssl.SSLError(1, "[SSL: TLSV1_ALERT_X] tlsv1 alert x")], "E802", 1),
        ([b"", OSError("gone")], "", 2),
        ([ssl.SSLCertVerificationError(1, "no")], "T705", 1),
    ],
)
def test_what_a_handshake_says(
    says: list[Any], code: str, tries: int, site: Identity, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    other = Hangs(*says)
    monkeypatch.setattr(module, "context", lambda identity: other)
    monkeypatch.setattr(module, "time", SimpleNamespace(sleep=pauses.append))
    for one in says:
        if isinstance(one, ssl.SSLCertVerificationError):
            one.verify_code, one.verify_message = 19, "self-signed"
        elif isinstance(one, ssl.SSLError):
            one.reason = "TLSV1_ALERT_X"
    with listening() as port:
        found = reason(site, f"127.0.0.1:{port}")
    assert (found.code if found else "") == code
    assert other.hosts == ["127.0.0.1"] * tries and pauses == [0.3] * (tries - 1)


def test_where_nobody_answers_there_is_no_reason(site: Identity) -> None:
    with listening() as port:
        pass
    assert reason(site, f"127.0.0.1:{port}") is None and reason(site, "127.0.0.1:x") is None


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (62, "E802", "not for the name 'fed'"),
        (64, "E802", "not for the name 'fed'"),
        (9, "T704", "is not valid now \\(so\\)"),
        (10, "T704", "is not valid now \\(so\\)"),
        (19, "T705", "another authority \\(so\\)"),
        (18, "T705", "another authority \\(so\\)"),
    ],
)
def test_what_we_have_against_a_coordinator(number: int, code: str, words: str) -> None:
    error = ssl.SSLCertVerificationError(1, "no")
    error.verify_code, error.verify_message = number, "so"
    with pytest.raises(FedtuneError, match=f"^{code}.*{words}"):
        raise theirs(error, "fed")


@pytest.mark.parametrize(
    ("reason_", "text", "code", "words"),
    [
        ("WRONG_VERSION_NUMBER", "", "E802", "does not use TLS"),
        ("RECORD_LAYER_FAILURE", "", "E802", "does not use TLS"),
        (None, "[SSL] record layer failure", "E802", "does not use TLS"),
        ("TLSV1_ALERT_UNKNOWN_CA", "", "E802", r"refused the TLS handshake \(tlsv1 alert unknown ca\)"),
        ("UNEXPECTED_EOF", "", "", ""),
    ],
)
def test_what_is_said_instead_of_a_handshake(reason_: str | None, text: str, code: str, words: str) -> None:
    error = ssl.SSLError(1, text)
    error.reason = reason_  # type: ignore[assignment]
    found = spoken(error)
    assert (found.code if found else "") == code
    if found:
        with pytest.raises(FedtuneError, match=words):
            raise found


def test_a_certificate_that_looks_right_here_is_a_matter_of_clocks(site: Identity) -> None:
    with pytest.raises(FedtuneError, match=r"^E802.*'site-a'.*clocks"):
        raise ours(site)


def test_a_secret_is_on_no_disk_and_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    with unlisted(b"secret") as path:
        assert Path(path).read_bytes() == b"secret" and path.startswith("/proc/self/fd/")
    monkeypatch.delattr("os.memfd_create")
    with unlisted(b"secret") as path:
        assert Path(path).read_bytes() == b"secret" and Path(path).stat().st_mode & 0o77 == 0
    assert not Path(path).exists() and threading.active_count()
