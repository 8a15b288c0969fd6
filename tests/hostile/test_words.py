"""What leaves a site of a mistake is a code and a number; what comes from another party cannot play with a
terminal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import CATALOGUE
from fedtune.events import ClientLeftOut, Noted, RoundDone
from fedtune.plain import plain
from fedtune.report import write_report
from fedtune.runtime.failures import heard
from fedtune.runtime.folder import RunFolder
from fedtune.sinks.console import console_sink
from tests.hostile.coordinator import Taken, taken

SECRET = "KowalskiHIV"


@pytest.fixture(scope="module")
def hostile(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Taken]:
    with taken(tmp_path_factory.mktemp("taken"), tiny_bert) as made:
        yield made


CHANGES: list[dict[str, Any]] = [
    {"data__label": f"patient {SECRET}"},
    {"data__label": "nowhere"},
    {"data__text": "nowhere"},
    {"data__text": "number"},
    {"data__task": "instruct"},
    {"data__task": "instruct", "data__prompt": f"patient {SECRET}", "data__response": "text"},
    {"data__task": "instruct", "data__messages": "text"},
    {"data__task": "image-classify", "data__image": "text"},
    {"data__source": "csv"},
    {"data__source": "parquet"},
    {"data__source": "images"},
    {"data__source": "plays"},
    {"data__source": "hub"},
    {"data__source": "clinc150"},
    {"data__encoding": "utf-16"},
    {"data__encoding": "nowhere"},
    {"data__template": "{text}{nowhere}", "data__task": "instruct"},
    {"data__max_length": 10**9},
    {"method__adapter__targets": ["nowhere"]},
]


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_no_cell_column_or_path_leaves_a_site_in_a_mistake(
    changes: dict[str, Any], hostile: Taken, tmp_path: Path
) -> None:
    """One distinct value a ticket, verbatim, was to be had by `data.label` = any column and data.labels that
    grew."""
    rows = tmp_path / f"{SECRET}.jsonl"
    row = {"text": f"seen {SECRET}", "label": SECRET, "number": 3, f"patient {SECRET}": f"Anna {SECRET}"}
    rows.write_text("".join(json.dumps(row) + "\n" for _ in range(20)))
    worker = hostile.worker(data=str(rows))
    recipe = hostile.recipe()
    for path, value in changes.items():
        node = recipe
        *parents, last = path.split("__")
        for key in parents:
            node = node[key]
        node[last] = value
    said = hostile.asks(worker, recipe)
    assert said.keys() == {"code", "number"} and said["code"] in CATALOGUE and len(said["number"]) == 8
    assert SECRET not in json.dumps(said) and str(tmp_path) not in json.dumps(said)
    here = [event.text for event in hostile.made.told["site-a"] if isinstance(event, Noted)]
    assert said["number"] in here[-1] and here[-1].startswith(said["code"])  # the site's operator finds it


def test_the_operator_reads_what_happened_and_whom_to_ask() -> None:
    error = heard({"code": "D206", "number": "0123abcd"}, "site-a")
    assert str(error) == (
        "D206: at 'site-a', number 0123abcd: A label is not in the label set; ask the operator of 'site-a', "
        "whose worker.jsonl has the details."
    )
    for outcome in (
        {"code": "Z1", "number": "x"},
        {"code": "", "number": "\x1b[2J"},
        {"code": "\x1b]0;x\x07", "number": "é" * 8, "found": "words"},
    ):
        assert (
            heard(outcome, "site-a").code == "F503"
            and "\x1b" not in str(heard(outcome, "site-a"))
            and "words" not in str(heard(outcome, "site-a"))
        )


EVIL = "\x1b]0;owned\x07\x1b[2J\r\nround 9: all is well\u202e\u2066\x9b31m\x00\u200b"


def test_text_of_another_party_is_cleaned_before_a_terminal_shows_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console_sink(ClientLeftOut(1, 0, "site-a", "F503", EVIL))
    console_sink(Noted(EVIL))
    console_sink(RoundDone(1, 3, 0, 1, 1, 1.0, {"loss": 1.0}))
    shown = capsys.readouterr().out
    assert (
        shown.count("\n") == 3
        and all(sign == "\n" or sign.isprintable() for sign in shown)
        and "owned" in shown
    )
    assert plain("plain, ümlaut 漢") == "plain, ümlaut 漢" and len(plain("x" * 10_000)) == 2000


def test_and_before_a_page_shows_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    record = ClientLeftOut(1, 0, "<script>site</script>", "F503", EVIL + "<img src=x>").record()
    (tmp_path / "events.jsonl").write_text(json.dumps(record) + "\n")
    page = write_report([RunFolder(tmp_path)]).read_text()
    assert not any(
        (ord(sign) < 32 and sign != "\n") or 0x7F <= ord(sign) < 0xA0 or sign in "\u202e\u2066\u200b"
        for sign in page
    )
    assert "owned" in page and "<script" not in page and "<img" not in page
