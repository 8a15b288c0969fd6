"""docs/pictures/report-*.png and dashboard-*.png: pages of real runs of the built-in federation, as Chromium shows them.

    python -m tests.screenshots [--runs DIR] [--to DIR]

It needs fedtune[demo,report], Chromium and some minutes: runs that are not in DIR yet are made there, and the pictures
are taken while the last of them goes on.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from fedtune.report import write_report
from fedtune.runtime.folder import RunFolder
from fedtune.ui.pages import RunPages
from fedtune.ui.serve import Server
from tests.browser import browse
from tests.waiting import wait_for

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
ALONE = ("evaluate.local=false", "evaluate.centralised=false")
SIGN = 'chain=[{step = "sign", error_feedback = true}]'
RUNS = {  # name -> what differs from the built-in federation
    "federation": ("evaluate.every=1",),
    "one-bit": ("evaluate.every=1", "method.adapter.rank=4", SIGN, *ALONE),
}
GOING_ON = ("evaluate.every=1", "rounds=40", *ALONE)
SEEN = 8  # rounds of the run that goes on, when it is looked at
TELEPHONE = 400  # CSS pixels


def simulate(runs: Path, name: str, changes: tuple[str, ...]) -> list[str]:
    sets = [f"--set={change}" for change in (f"name={name}", *changes)]
    return [sys.executable, "-m", "fedtune", "simulate", "--quiet", "--runs", str(runs), *sets]


@contextmanager
def going_on(runs: Path) -> Iterator[None]:
    """A run that has come some way, and goes on until the block ends."""
    shutil.rmtree(runs / "long", ignore_errors=True)  # of an earlier call
    process = subprocess.Popen(simulate(runs, "long", GOING_ON))
    try:
        events = runs / "long" / "events.jsonl"
        wait_for(
            lambda: events.exists() and events.read_text().count('"RoundDone"') >= SEEN,
            f"round {SEEN}",
            every=0.5,
        )
        yield
    finally:
        process.terminate()
        process.wait()


def take(page: str, picture: Path, width: int, height: int, dark: bool = False) -> None:
    """`page` is an address or a file. The picture has as many colours as such a page needs."""
    with tempfile.TemporaryDirectory() as place:
        browse(
            page, Path(place, "profile"), f"--window-size={width},{height}", f"--screenshot={picture}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", "--allow-file-access-from-files",
        )  # fmt: skip
    with Image.open(picture) as shown:
        small = shown.convert("RGB").crop((0, 0, min(width, shown.width), height))
    small.quantize(256, dither=Image.Dither.NONE).save(picture, optimize=True)


def take_narrow(html: str, picture: Path, height: int) -> None:
    """On a telephone's width, which a window of Chromium's own cannot have: in a frame."""
    with tempfile.TemporaryDirectory() as place:
        Path(place, "page.html").write_text(html, encoding="utf-8")
        frame = f'<body style="margin:0"><iframe src=page.html width={TELEPHONE} height={height} style="border:0">'
        Path(place, "frame.html").write_text(frame)
        wide = Path(place, "wide.png")
        take(Path(place, "frame.html").as_uri(), wide, 800, height)
        with Image.open(wide) as shown:
            shown.crop((0, 0, TELEPHONE, height)).save(picture, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.screenshots",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--runs", type=Path, help="a folder of runs of an earlier call (default: a temporary one)"
    )
    parser.add_argument("--to", type=Path, default=PICTURES)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        shoot((options.runs or Path(place, "runs")).resolve(), options.to)


def shoot(runs: Path, to: Path) -> None:
    for name, changes in RUNS.items():
        if not (runs / name / "result.json").exists():
            subprocess.run(simulate(runs, name, changes), check=True)
    page = write_report([RunFolder(runs / "federation")])
    for name, dark in (("light", False), ("dark", True)):
        take(page.as_uri(), to / f"report-{name}.png", 1100, 1150, dark)
    take_narrow(page.read_text(encoding="utf-8"), to / "report-narrow.png", 1150)
    with going_on(runs), Server(RunPages(runs)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        take(server.address, to / "dashboard-light.png", 1100, 470)
        take(f"{server.address}long/", to / "dashboard-dark.png", 1100, 1150, dark=True)
        overview = server.pages([])
        assert overview
        take_narrow(overview.body, to / "dashboard-narrow.png", 800)
        server.shutdown()


if __name__ == "__main__":
    main()
