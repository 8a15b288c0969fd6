"""Both sides of a deployed run keep a signed log, and what they say of each other's answers agrees; one page
says it in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli import main
from fedtune.deploy import transport
from fedtune.report.audit import audit_report
from fedtune.runtime.quarantine import quarantine
from fedtune.trust.certificates import utc_now
from fedtune.trust.chained_log import FILE, lines, verify
from tests import small
from tests.deploy.inside import SITES, FakeGrid, Inside, inside
from tests.hostile.site import Liar, times


@pytest.fixture(scope="module")
def done(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    """Two rounds of three sites, of which the third answers too much."""
    root = tmp_path_factory.mktemp("audited")
    rows = small.write_rows(tmp_path_factory.mktemp("rows"))
    with pytest.MonkeyPatch.context() as patch, inside(root, tiny_bert, rows, rounds=2) as made:
        patch.setattr(transport, "AGAIN", 0.3)
        patch.setattr(transport, "PAUSE", 0.02)
        patch.setattr("fedtune.flower.nodes.LOOK_SECONDS", 0.02)
        liar = made.worker("site-c", Liar)
        assert isinstance(liar, Liar)
        liar.lie = times(3e37)  # type: ignore[method-assign]
        made.conduct(FakeGrid({101: made.worker("site-a"), 102: made.worker("site-b"), 103: liar}))
        yield made


def of(path: Path, what: str) -> list[dict[str, Any]]:
    return [line for line in lines(path) if line["what"] == what]


def test_every_answer_that_counts_stands_in_both_logs(done: Inside) -> None:
    ours = done.folder.path / FILE
    assert verify(ours, done.authority.certificate).signer == "coordinator"
    counted = [(line["round"], line["client"], line["up_bytes"]) for line in of(ours, "ClientDone")]
    for number, site in enumerate(SITES[:2]):
        theirs = done.root / f"home-{site}" / FILE
        assert verify(theirs, done.authority.certificate).signer == site
        sent, taken = of(theirs, "sent"), of(theirs, "receipt")
        assert [(s["round"], s["sha256"], s["bytes"]) for s in sent] == [
            (r["round"], r["payload"], r["size"]) for r in taken
        ]
        assert [(s["round"], number, s["bytes"]) for s in sent] == [
            one for one in counted if one[1] == number
        ]
    left_out = [(line["round"], line["client"], line["code"]) for line in of(ours, "ClientLeftOut")]
    assert left_out == [(1, 2, "W607"), (2, 2, "W607")]
    states = [line["state_sha256"] for line in of(ours, "RoundDone")]
    assert states[-1] == done.folder.read_json("result.json")["state_sha256"] and len(states) == 2


def test_a_site_that_refuses_a_ticket_writes_it_down(done: Inside) -> None:
    worker = done.worker("site-a")
    outcome = worker.answer({"what": "ticket", "ticket": "nonsense"})
    (line,) = of(done.root / "home-site-a" / FILE, "refused")
    assert (line["code"], line["number"]) == (outcome["code"], outcome["number"]) != ("", "")


def test_the_page_says_who_took_part_and_what_was_seen(done: Inside, tmp_path: Path) -> None:
    quarantine(done.folder, "site-c", utc_now(), "its <values>")
    page = audit_report(done.folder)
    for words in (
        "| site-a | 2 | 2 |",
        "| site-c | 2 | 0 |",
        "| 1 | client-2 | W607 |",
        "No differential privacy.",
        "each client's answer as it passes, uses the sum only",
        "signed by coordinator",
        str(done.folder.read_json("result.json")["base_sha256"]),
    ):
        assert words in page
    target = tmp_path / "page.md"
    assert main(["audit", "report", str(done.folder.path), "--to", str(target)]) == 0
    assert target.read_text() == page


def test_the_command_names_the_first_bad_line(
    done: Inside, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = str(done.authority.place("site-a"))
    assert main(["audit", "verify", str(done.folder.path), "--keys", keys]) == 0
    assert "lines in order, signed by coordinator" in capsys.readouterr().out
    kept = (done.folder.path / FILE).read_text().splitlines(keepends=True)
    (tmp_path / FILE).write_text("".join([*kept[:3], *kept[4:]]))
    assert main(["audit", "verify", str(tmp_path), "--keys", keys]) == 2
    assert "T709: line 4 of" in capsys.readouterr().err
