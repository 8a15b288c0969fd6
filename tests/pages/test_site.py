"""The site: it builds without a warning, every page can be found in it, and it works without a network."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.browser import browse, needs_browser, requests_of
from tests.pages.blocks import ROOT

LOADED = re.compile(
    r"<(?:link|script|img|iframe|source)\b[^>]*?\b(?:href|src)=[\"']?((?:https?:)?//[^\"'\s>]+)", re.I
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="pip install 'fedtune[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.thorough
def test_every_page_is_built(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs").with_suffix(".html") for path in (ROOT / "docs").rglob("*.md")}
    assert len(pages) > 30 and not [page for page in pages if not (site / page).exists()]
    assert "Threat model" in (site / "security.html").read_text(encoding="utf-8")
    assert not (site / "hooks.py").exists()


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    found = {
        (page.name, address) for page in site.rglob("*.html") for address in LOADED.findall(page.read_text())
    }
    assert not found
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//", sheet.read_text()), sheet


def test_the_search_knows_the_pages(site: Path) -> None:
    known = json.loads((site / "search" / "search_index.json").read_text(encoding="utf-8"))["docs"]
    assert {"getting-started.html", "recipe.html", "errors.html"} <= {
        entry["location"].partition("#")[0] for entry in known
    }


def test_text_of_tables_and_lists_is_not_left_as_it_was_written(site: Path) -> None:
    """Tables and lists that Markdown did not take for such stand in paragraphs, with their marks."""
    raw = [
        (page.name, found)
        for page in site.rglob("*.html")
        for found in re.findall(r"<p>(?:\|[^<]{0,60}|[^<]*\n(?:\* |\|)[^<]{0,60})", page.read_text())
    ]
    assert not raw


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@needs_browser
@pytest.mark.parametrize("page", ["index.html", "concepts.html"])
def test_a_page_is_shown_without_a_network(address: str, page: str, tmp_path: Path) -> None:
    log, picture = tmp_path / "net.json", tmp_path / "page.png"
    size = "--window-size=1400,1800"
    done = browse(
        f"{address}/{page}", tmp_path / "profile", size, f"--screenshot={picture}", f"--log-net-log={log}"
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    asked = requests_of(log)
    assert f"{address}/assets/javascripts/bundle" in " ".join(asked)
    assert not [one for one in asked if not one.startswith(address)]
    assert picture.stat().st_size > 20_000
