"""The page in a real browser: nothing is asked of the network, nothing is wrong in the console, nothing is cut off
between a telephone and a wide screen, in light and in dark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from fedtune.report import write_report
from tests import small
from tests.browser import browse, needs_browser, requests_of
from tests.marks import mostly_thorough

pytestmark = needs_browser


@pytest.fixture(scope="module")
def page(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    evaluate = {"every": 1, "base": True, "local": False, "centralised": False, "clients": True}
    folder, _, events = small.play(small.recipe(tiny_bert, small.write_rows(root), evaluate=evaluate), root)
    (folder.path / "events.jsonl").write_text(
        "".join(json.dumps(e.record(), default=str) + "\n" for e in events)
    )
    return write_report([folder])


def test_a_page_that_asks_is_noticed(tmp_path: Path) -> None:
    page, log = tmp_path / "page.html", tmp_path / "net.json"
    page.write_text("<img src=http://example.invalid/x.png><script>console.log('said')</script>")
    done = browse(page, tmp_path / "profile", "--dump-dom", f"--log-net-log={log}")
    assert "http://example.invalid/x.png" in requests_of(log) and "CONSOLE" in done.stderr


@pytest.mark.parametrize(
    ("width", "scheme"),
    mostly_thorough([(400, "light"), (1400, "dark"), (3840, "light")], [(400, "light"), (1400, "dark")]),
)
def test_the_page_is_drawn_at_every_width(page: Path, width: int, scheme: str, tmp_path: Path) -> None:
    picture, log = tmp_path / "page.png", tmp_path / "net.json"
    done = browse(
        page, tmp_path / "profile", f"--window-size={width},1600", f"--screenshot={picture}",
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", f"--log-net-log={log}",
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    assert requests_of(log) == []
    with Image.open(picture) as shown:
        assert shown.width >= width
        corner = shown.convert("RGB").getpixel((3, 3))
        assert corner == ((13, 17, 23) if scheme == "dark" else (255, 255, 255))


def test_nothing_is_wider_than_a_telephone(page: Path, tmp_path: Path) -> None:
    frame = tmp_path / "frame.html"  # a window of Chromium's own cannot be as narrow
    (tmp_path / "inner.html").write_text(page.read_text())
    frame.write_text(
        "<iframe id=f src=inner.html width=400 height=900></iframe><script>f.onload=()=>{"
        "document.body.dataset.width=f.contentDocument.documentElement.scrollWidth}</script>"
    )
    done = browse(frame, tmp_path / "profile", "--allow-file-access-from-files", "--dump-dom")
    assert 'data-width="400"' in done.stdout
