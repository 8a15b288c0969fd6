"""Before anything is begun: ports that are taken, addresses without a port, proxies of the environment, long
temporary folders."""

from __future__ import annotations

import http.server
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from fedtune.cli import main
from fedtune.config import Recipe
from fedtune.deploy import client
from fedtune.deploy.fleet_proxy import FleetProxy
from fedtune.deploy.policy import Asked, read_policy
from fedtune.deploy.ports import require_free, split_address
from fedtune.deploy.server import HOME
from fedtune.deploy.supervisor import Program, alone, environment, healthy, read_sentence
from fedtune.errors import FedtuneError
from fedtune.exchange import ExchangeClient
from fedtune.proxies import is_loopback, proxy_for, proxy_hint, spared
from fedtune.trust import load
from fedtune.trust.authority import create
from tests import small


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_port_that_is_listened_on_is_refused(host: str, taken: int) -> None:
    began = time.monotonic()
    with pytest.raises(FedtuneError, match=rf"E801.*--listen {host}:{taken}.*in use"):
        require_free({"--listen": f"{host}:{taken}"}, patience=0.5)
    assert time.monotonic() - began < 60


def test_a_port_that_grpc_would_share_is_refused() -> None:
    server = grpc.server(None)  # type: ignore[arg-type]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(FedtuneError, match="E801"):
            require_free({"--metrics": f"127.0.0.1:{port}"}, patience=0.0)
    finally:
        server.stop(None)


def test_a_port_is_waited_for_and_a_foreign_address_is_refused(taken: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        threading.Timer(0.5, other.close).start()
        require_free({"--listen": f"127.0.0.1:{port}"}, patience=10.0)
    with pytest.raises(FedtuneError, match="E801"):
        require_free({"--listen": "192.0.2.1:9443"}, patience=0.0)


@pytest.mark.parametrize("theirs", ["127.0.0.1", "0.0.0.0"])
def test_ipv6_for_all_addresses_needs_the_port_of_ipv4_too(theirs: str) -> None:
    """gRPC opens `[::]` for both, and cannot where somebody has the port for one."""
    with socket.create_server((theirs, 0)) as server, pytest.raises(FedtuneError, match="E801"):
        require_free({"--listen": f"[::]:{server.getsockname()[1]}"}, patience=0.0)


@pytest.mark.parametrize("metrics", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_two_options_cannot_share_a_port(metrics: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(FedtuneError, match=rf"E801.*--metrics {metrics}:{port}.*--listen has the same port"):
        require_free({"--listen": f"0.0.0.0:{port}", "--metrics": f"{metrics}:{port}"}, patience=0.0)


def test_a_name_that_is_none_is_a_sentence() -> None:
    with pytest.raises(FedtuneError, match="E801"):
        require_free({"--listen": "no-such-host.invalid:9443"}, patience=0.0)


@pytest.mark.parametrize(
    "address",
    [
        "fed.example.org",
        "fed.example.org:",
        ":9443",
        "fed:port",
        "fed:0",
        "fed:65536",
        "::1:9443",
        "[::1:80",
        "fed:\u0664",
        "",
    ],
)
def test_an_address_without_a_port_is_a_sentence(address: str) -> None:
    with pytest.raises(FedtuneError, match=r"C103.*--server"):
        split_address(address, "--server")


def test_addresses_with_ports() -> None:
    assert split_address("fed:65535", "x") == ("fed", 65535)
    assert split_address("fed.example.org:9443", "x") == ("fed.example.org", 9443) and split_address(
        "[::1]:80", "x"
    ) == ("::1", 80)


def test_a_server_on_a_taken_port_begins_no_run(
    taken: int, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["keys", "init", "--federation", "demo", "--host", "127.0.0.1", "--keys", str(tmp_path / "keys")])
    main(["keys", "issue", "site-a", "--keys", str(tmp_path / "keys")])
    capsys.readouterr()
    keys, runs = str(tmp_path / "keys" / "coordinator"), tmp_path / "runs"
    assert main(["server", "--keys", keys, "--runs", str(runs), "--listen", f"127.0.0.1:{taken}"]) == 2
    assert "E801" in capsys.readouterr().err and not runs.exists()
    recipe, rows = tmp_path / "r.toml", small.write_rows(tmp_path)
    recipe.write_text(
        f"[model]\nname = '{tiny_bert}'\n[data]\nsource = 'jsonl'\npath = '{rows}'\nmax_length = 12\n"
    )
    assert (
        main(["server", str(recipe), "--keys", keys, "--runs", str(runs), "--listen", "127.0.0.1:1"]) == 2
    )  # a port of root's, or free: labels are missing
    assert any(code in capsys.readouterr().err for code in ("D206", "E801")) and not runs.exists()


def test_a_coordinator_that_cannot_begin_says_so_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Keys of a site, keys that were revoked, a folder where another is at work: no run is begun."""
    keys, runs = tmp_path / "keys", tmp_path / "runs"
    main(["keys", "init", "--federation", "demo", "--host", "127.0.0.1", "--keys", str(keys)])
    main(["keys", "issue", "site-a", "--keys", str(keys)])
    capsys.readouterr()

    def ends(of: Path) -> str:
        assert main(["server", "--keys", str(of), "--runs", str(runs), "--listen", "127.0.0.1:9"]) == 2
        return capsys.readouterr().err

    assert "T70" in ends(keys / "clients" / "site-a") and not runs.exists()
    with alone(runs / HOME):
        assert "F506" in ends(keys)
    main(["keys", "revoke", "coordinator", "--keys", str(keys)])
    assert "T706" in ends(keys)
    assert [path.name for path in runs.iterdir()] == [HOME]


def test_what_one_of_our_programs_refuses_is_said_at_once(tmp_path: Path) -> None:
    """A mistake in its first life is the user's to mend; a stranger with that exit code is started again."""
    sentence = (
        "C103: found 'x', which is not TOML, expected key = value lines, always; mend that line; then again."
    )

    def looked(own: bool) -> None:
        words = f"import sys; print('before'); print({sentence!r}); sys.exit(2)"
        program = Program("it", [sys.executable, "-SEc", words], tmp_path / "log", os.environ, own)
        program.look()
        assert program.process is not None
        program.process.wait()
        program.look()

    with pytest.raises(FedtuneError) as raised:
        looked(own=True)
    assert str(raised.value) == sentence and raised.value.code == "C103"
    looked(own=False)
    assert (
        read_sentence("X123: found a, expected b; c.") is None
        and read_sentence("ImportError: expected b") is None
    )


def test_a_clients_slips_are_sentences_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["keys", "init", "--federation", "demo", "--host", "127.0.0.1", "--keys", str(tmp_path / "keys")])
    main(["keys", "issue", "site-a", "--keys", str(tmp_path / "keys")])
    (tmp_path / "keys" / "allow.toml").write_text("method = 'fedpeft'\n")
    site = [
        "--server",
        "127.0.0.1:9",
        "--keys",
        str(tmp_path / "keys" / "clients" / "site-a"),
        "--home",
        str(tmp_path / "home"),
    ]
    for words, code in (
        (["--server", "127.0.0.1", "--keys", str(tmp_path)], "C103"),
        (
            ["--server", "127.0.0.1:9", "--keys", str(tmp_path), "--data", str(tmp_path / "gone.jsonl")],
            "D201",
        ),
        (["--server", "127.0.0.1:9", "--keys", str(tmp_path / "gone")], "C105"),
        ([*site, "--policy", str(tmp_path / "keys" / "allow.toml")], "C101"),
        ([*site, "--policy", str(tmp_path / "gone.toml")], "C105"),
        (
            [
                "--server",
                "127.0.0.1:9",
                "--keys",
                str(tmp_path / "keys" / "coordinator"),
                "--home",
                str(tmp_path / "home"),
            ],
            "T705",
        ),
    ):
        assert main(["client", *words]) == 2 and f"fedtune: {code}" in capsys.readouterr().err


def test_a_tilde_is_the_home_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shells leave it alone behind an equals sign, and so do recipes and services."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["keys", "init", "--federation", "demo", "--host", "127.0.0.1", "--keys=~/keys"]) == 0
    assert (
        main(["keys", "issue", "site-a", "--keys=~/keys"]) == 0
        and main(["keys", "list", "--keys=~/keys"]) == 0
    )
    assert (
        main(["keys", "renew", "site-a", "--keys=~/keys"]) == 0
        and main(["keys", "revoke", "site-a", "--keys=~/keys"]) == 0
    )
    (tmp_path / "rows.jsonl").write_text("{}\n")
    capsys.readouterr()
    assert (
        main(
            [
                "client",
                "--server",
                "127.0.0.1:9",
                "--keys=~/keys/coordinator",
                "--data=~/rows.jsonl",
                "--home=~/site",
            ]
        )
        == 2
    )
    assert "T705" in capsys.readouterr().err and main(["status", "~/none"]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    policy = tmp_path / "policy.toml"
    policy.write_text("\ufeffmodels = ['~/model']\n", encoding="utf-8")
    read_policy("~/policy.toml").check(
        Recipe.model_validate({"model": {"name": str(tmp_path / "model")}}), Asked()
    )
    with pytest.raises(FedtuneError, match="F507"):
        read_policy("~/policy.toml").check(Recipe.model_validate({"model": {"name": "~/other"}}), Asked())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys", "policy.toml", "rows.jsonl", "site"]


PROXY = {"http_proxy": "http://proxy:3128"}


def test_loopback_is_spared_and_what_was_exempt_stays() -> None:
    assert (
        spared({"no_proxy": "a.org, localhost", "NO_PROXY": "b.org"})["NO_PROXY"]
        == "a.org,localhost,b.org,127.0.0.1,::1"
    )
    assert all(
        is_loopback(text) for text in ("127.0.0.1:9443", "localhost:1", "[::1]:9443", "127.8.9.1")
    ) and not is_loopback("fed.org:9443")


@pytest.mark.parametrize(
    ("env", "proxy"),
    [
        (PROXY, "http_proxy=http://proxy:3128"),
        ({"HTTPS_PROXY": "http://s:1", **PROXY}, "HTTPS_PROXY=http://s:1"),
        ({**PROXY, "no_proxy": "example.org"}, ""),
        ({**PROXY, "NO_PROXY": ".example.org"}, ""),
        ({**PROXY, "no_proxy": "*"}, ""),
        ({**PROXY, "no_proxy": "ample.org"}, "http_proxy=http://proxy:3128"),
        ({}, ""),
    ],
)
def test_the_proxy_that_a_connection_goes_through(env: dict[str, str], proxy: str) -> None:
    assert proxy_for("fed.example.org:9443", env) == proxy and proxy_for("127.0.0.1:9443", env) == ""


def test_a_site_whose_coordinator_is_away_names_the_proxy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert (
        "https_proxy=http://proxy:3128" in proxy_hint("fed.example.org:9443")
        and proxy_hint("127.0.0.1:9443") == ""
    )
    identity = load(create(tmp_path / "keys", "demo", ["localhost"], 30).issue("site-a", 30))
    asked = ExchangeClient("fed.invalid:9443", identity, tmp_path / "site", patience=0.0)
    with pytest.raises(FedtuneError, match=r"E801.*https_proxy=http://proxy:3128"):
        asked.status()
    asked.close()
    said: list[str] = []
    fleet_proxy = FleetProxy(identity, "fed.invalid:9443")
    line = client.Line(identity, "fed.invalid:9443", said.append)
    fleet_proxy.pass_on("POST", "/v1/fleet/pull-messages", [], b"")
    line.look(fleet_proxy)
    fleet_proxy.close()
    assert (
        len(said) == 1
        and said[0].startswith("the coordinator is away")
        and "https_proxy=http://proxy:3128" in said[0]
    )


def test_a_proxys_password_is_not_printed() -> None:
    for value in ("http://me:se@cret@proxy:3128", "me:se@cret@proxy:3128"):
        assert proxy_for("fed.org:9443", {"http_proxy": value}) == "http_proxy=" + value.replace(
            "me:se@cret@", ""
        )


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_programs_of_one_machine_do_not_ask_a_proxy(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Here(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Here)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for known in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert healthy(f"http://127.0.0.1:{server.server_address[1]}/health")
    assert "127.0.0.1" in environment(tmp_path)["no_proxy"]
    server.shutdown()


def test_a_death_by_our_own_hand_does_not_count(tmp_path: Path) -> None:
    program = Program(
        "sleeper", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", os.environ
    )
    for life in range(1, 13):  # more than would end it with F505
        program.look()
        assert program.lives == life and program.process is not None
        program.restart()
    assert program.deaths == 0


def test_a_long_tmpdir_leaves_room_for_sockets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 150)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    folder = client.short_folder()
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(folder / "worker"))
        assert folder.stat().st_mode & 0o777 == 0o700 and not list(long.iterdir())
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_what_the_worker_tells_is_said_once_and_whole(tmp_path: Path) -> None:
    told = client.Told(tmp_path / "worker.jsonl")
    assert told.lines() == []
    told.path.write_text('{"event": "Noted", "text": "asked"}\n{"event": "Noted", "te')
    assert told.lines() == ["asked"] and told.lines() == []
    told.path.write_text(
        '{"event": "Noted", "text": "asked"}\n{"event": "Noted", "text": "sent"}\n{"event": "Other"}\n'
    )
    assert told.lines() == ["sent"]
