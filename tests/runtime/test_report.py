"""The page of a run: what is on it, and that nothing of a client's own text becomes markup."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fedtune.runtime import folder as folders
from fedtune.runtime.report import page, plot, read_events, write_report

RESULT = {
    "metric": "accuracy",
    "base": 0.25,
    "local": None,
    "federated": 0.75,
    "centralised": 0.8,
    "up_bytes_per_client_round": 2048,
    "down_bytes_per_client_round": 1024,
    "rounds": 2,
    "clients": 3,
    "seconds": 4.25,
    "phases": {},
    "state_sha256": "0123456789abcdef" * 4,
}


def done(number: int, loss: float | None, left_out: int = 0) -> dict[str, Any]:
    return {
        "event": "RoundDone",
        "round": number,
        "metrics": {} if loss is None else {"loss": loss},
        "members": 3,
        "left_out": left_out,
        "up_bytes": 1024 * number,
        "down_bytes": 512,
        "seconds": 1.5,
    }


OUT = {
    "event": "ClientLeftOut",
    "round": 2,
    "client": 1,
    "name": "<b>site</b>",
    "text": "F503: no answer",
    "code": "F503",
}


def rows(text: str) -> list[list[str]]:
    return [re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", text)]


def test_scores_rounds_and_who_was_left_out_are_on_the_page() -> None:
    text = page("run & co", {"seed": 1}, [done(2, 0.5, 1), done(1, 1.5), OUT, done(2, 0.5, 1)], RESULT)
    assert rows(text) == [
        ["", "accuracy"],
        ["base model", "0.2500"],
        ["federated", "0.7500"],
        ["centralised", "0.8000"],
        ["round", "clients", "up", "down", "seconds"],
        ["1", "3 of 3", "1.0 KiB", "512 B", "1.5"],
        ["2", "2 of 3", "2.0 KiB", "512 B", "1.5"],
        ["round", "client", "why"],
        ["2", "&lt;b&gt;site&lt;/b&gt;", "F503: no answer"],
    ]
    for said in (
        "run &amp; co",
        "2.0 KiB up and 1.0 KiB down",
        "2 rounds, 3 clients, 4.2 s",
        "<code>0123456789abcdef</code>",
    ):
        assert said in text
    assert "<script" not in text and "http" not in text and "not finished" not in text
    assert "&quot;seed&quot;: 1" in text


def test_a_run_that_is_not_finished_says_so_and_one_round_is_no_curve() -> None:
    text = page("run", {}, [done(1, 1.5)], None)
    assert "This run is not finished." in text and "<svg" not in text and "Left out" not in text
    assert "<svg" not in page("run", {}, [done(1, None), done(2, 0.5)], None)
    assert "<svg" in page("run", {}, [done(1, 1.0), done(2, 0.5)], None)


def test_the_curve_goes_from_the_first_round_to_the_last_and_from_the_highest_loss_to_the_lowest() -> None:
    found = re.search(r"points='([^']*)'", plot([(3, 2.0), (4, 1.0), (5, 1.5)]))
    assert found and found[1] == "40.0,40.0 320.0,180.0 600.0,110.0"
    flat = plot([(1, 1.0), (2, 1.0)])
    assert "40.0,180.0 600.0,180.0" in flat and flat.count("1.000") == 2


def test_half_a_line_at_the_end_is_no_event(tmp_path: Path) -> None:
    folder = folders.create(tmp_path, "", "run")
    assert list(read_events(folder)) == []
    (folder.path / "events.jsonl").write_text(json.dumps(done(1, 1.0)) + "\n" + json.dumps(OUT)[:20])
    assert list(read_events(folder)) == [done(1, 1.0)]
    folder.write_json("config.json", {"rounds": 3})
    assert write_report(folder) == str(folder.path / "report.html")
    assert "This run is not finished." in (folder.path / "report.html").read_text()
    folder.write_json("result.json", RESULT)
    write_report(folder)
    assert "0.7500" in (folder.path / "report.html").read_text()
