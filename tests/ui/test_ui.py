"""fedtune ui: who may read, what is shown of a run that goes on, and that a browser follows it."""

from __future__ import annotations

import http.client
import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.events import ClientDone, Event, Noted, RoundDone, RoundStarted, RunStarted
from fedtune.sinks.jsonl import jsonl_sink
from fedtune.ui.pages import RunPages
from fedtune.ui.serve import MOST, Server
from tests.browser import BROWSER, needs_browser
from tests.waiting import PATIENCE, wait_for

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


def tell(runs: Path, name: str, *events: Event) -> None:
    for event in events:
        jsonl_sink(runs / name / "events.jsonl")(event)


def done(number: int) -> tuple[Event, ...]:
    return (
        RoundStarted(number, ("site-a", "site-b")),
        ClientDone(number, 0, "site-a", 4.0, 10, 10, {"loss": 1.0}, 0.5),
        RoundDone(number, 2, 1, 10, 10, 1.0, {"loss": 1.0 / number}),
    )


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with a run that goes on, on real sites, of which one has a node."""
    runs = tmp_path / "runs"
    (runs / "one" / "state").mkdir(parents=True)
    (runs / "one" / "config.json").write_text(
        json.dumps({"rounds": 5, "deploy": {"sites": ["site-a", "<b>site-b</b>"]}})
    )
    (runs / "one" / "deploy.json").write_text("{}")
    home = runs / ".coordinator"
    (home / "logs").mkdir(parents=True)
    (home / "nodes.json").write_text('{"site-a": ["00", 7]}')
    (home / "logs" / "gate.log").write_text("early\n" * 10_000 + "<img src=x>\x1b[2Jlast words\n")
    tell(runs, "one", RunStarted("one", "runs/one", 5, 2, 10, 100), *done(1), Noted("site-a is here"))
    return runs


@pytest.fixture
def server(runs: Path) -> Iterator[Server]:
    with Server(RunPages(runs, again=0.0)) as made:
        threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield made
        made.shutdown()


def get(server: Server, path: str, host: str = "", method: str = "GET") -> tuple[int, str, Any]:
    line = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=PATIENCE)
    line.putrequest(method, path, skip_host=True)
    line.putheader("Host", host or f"127.0.0.1:{server.server_port}")
    line.endheaders()
    answer = line.getresponse()
    return answer.status, answer.read().decode(), answer.headers


def test_the_pages_of_a_run_that_goes_on(server: Server, runs: Path) -> None:
    status, page, headers = get(server, f"/{server.token}/")
    assert (
        status == 200
        and 'href="one/"' in page
        and "1 of 5" in page
        and headers["Cache-Control"] == "no-store"
    )
    status, page, _ = get(server, f"/{server.token}/one/")
    assert status == 200 and "not finished: 1 of 5 rounds" in page and "Training loss by round" in page
    sites = re.search(r"<table><caption>Sites of this run.*?</table>", page, re.S)
    assert sites and re.findall(r"<td>(.*?)</td>", sites[0])[::4] == ["has a node", "not here"]
    assert (
        "&lt;b&gt;site-b" in page
        and "last words" in page
        and "&lt;img src=x&gt;" in page
        and "\x1b" not in page
    )
    said = json.loads(get(server, f"/{server.token}/one/stamp")[1])
    assert said["now"].startswith("round 1 of 5")
    tell(runs, "one", *done(2))
    after = json.loads(get(server, f"/{server.token}/one/stamp")[1])
    assert after["stamp"] != said["stamp"] and after["now"].startswith("round 2 of 5")


def test_nothing_without_the_token_and_nothing_for_another_host(server: Server) -> None:
    there = f"/{server.token}/one/"
    for path in ("/", "/one/", f"/{server.token[:-1]}/", f"/x{server.token}/", "/favicon.ico"):
        status, page, _ = get(server, path)
        assert status == 404 and "one/" not in page
    for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1", "127.0.0.1:1"):
        assert get(server, there, host)[0] == 403
    assert get(server, there, f"localhost:{server.server_port}")[0] == 200
    for path in (
        "nowhere/",
        "..%2f..%2fetc/",
        "../../../etc/passwd",
        "one/config.json",
        "one/../one/",
        ".coordinator/",
    ):
        assert get(server, f"/{server.token}/{path}")[0] == 404
    for method in ("POST", "PUT", "DELETE", "HEAD"):
        assert get(server, there, method=method)[0] == 501
    with Server(RunPages(Path("."))) as other:
        assert len(server.token) >= 32 and other.token != server.token
        assert other.server_address[0] == "127.0.0.1"


def test_many_silent_connections_leave_room_again(server: Server) -> None:
    silent = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(MOST + 8)]
    for one in silent:
        one.close()

    def answers() -> bool:
        try:
            return get(server, f"/{server.token}/")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    wait_for(answers, "an answer after the silent ones have gone")


@needs_browser
def test_a_browser_follows_a_run(server: Server, runs: Path, tmp_path: Path) -> None:
    """The page asks for itself again when a round is done, while the browser is open."""
    asked: list[list[str]] = []
    pages = server.pages

    def heard(parts: list[str]) -> Any:
        asked.append(parts)
        if asked.count(["one", "stamp"]) == 2:
            tell(runs, "one", *done(3))
        return pages(parts)

    server.pages = heard
    assert BROWSER
    browser = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
        "--enable-logging=stderr", "--virtual-time-budget=30000", "--dump-dom", f"{server.address}one/",
    ]  # fmt: skip
    shown = subprocess.run(browser, capture_output=True, text=True, check=True, timeout=PATIENCE)
    assert "CONSOLE" not in shown.stderr
    assert 'data-updates="' in shown.stdout and "3 of 5 rounds" in shown.stdout
    assert asked.count(["one"]) >= 2


def test_the_command_prints_its_address_and_ends_with_ctrl_c(runs: Path) -> None:
    import signal

    process = subprocess.Popen(
        [sys.executable, "-m", "fedtune", "ui", str(runs)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        address = process.stdout.readline().strip()
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/([\w-]{32})/", address)
        assert found
        line = http.client.HTTPConnection("127.0.0.1", int(found[1]), timeout=PATIENCE)
        line.request("GET", f"/{found[2]}/")
        assert line.getresponse().status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert found[2] not in (process.stderr.read() if process.stderr else "")
    finally:
        process.kill()
        process.communicate()
