"""Pages in a real, headless browser, where one is installed: what they look like, say to the console, and ask a network
for."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed here")


def browse(page: Path | str, profile: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Open a file, or an address of this machine, without a network; `profile` is a new folder."""
    assert BROWSER
    return subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
         "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"--user-data-dir={profile}", *options,
         page.as_uri() if isinstance(page, Path) else page],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip


def requests_of(log: Path) -> list[str]:
    """What a page asked of a network, and not the browser for itself, from a file of --log-net-log."""
    asked = [one.get("params", {}) for one in json.loads(log.read_text())["events"]]
    return [
        one["url"]
        for one in asked
        if str(one.get("url")).startswith("http") and one.get("initiator", "not an origin") != "not an origin"
    ]
