"""fedtune client --check: each thing that would keep a site out, said before it takes part."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.cli import main
from fedtune.deploy import rehearsal
from fedtune.trust.authority import revoke
from tests import small
from tests.exchange.federation import Federation
from tests.waiting import free_ports

LABELS = sorted(small.WORDS)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    made = Federation(tmp_path_factory.mktemp("rehearsal"))
    yield made
    made.close()


def said(
    federation: Federation, tmp_path: Path, *more: str, server: str = "", site: str = "site-a", **recipe: Any
) -> int:
    rows, path = tmp_path / "rows.jsonl", tmp_path / "recipe.toml"
    if not rows.exists():
        small.write_rows(tmp_path)
    changes = "".join(f"{key} = {value}\n" for key, value in recipe.items())
    path.write_text(
        f"{changes}[data]\nsource = 'jsonl'\nlabels = {LABELS}\n[deploy]\ndata = 'sites'\n[model]\nname = "
        "'org/model'\n"
    )
    keys = str(federation.authority.place(site))
    place = [
        "--server",
        server or federation.server.address,
        "--keys",
        keys,
        "--data",
        str(rows),
        "--home",
        str(tmp_path / "home"),
    ]
    return main(["client", *place, "--check", str(path), *more])


def test_a_site_that_can_take_part(
    federation: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a recipe for real sites, which names no rows."""
    assert said(federation, tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "keys",
        "policy",
        "proxy",
        "port",
        "clock",
        "data",
        "rows",
        "recipe",
    ]
    assert (
        "108 to train on, 12 held out" in lines[6]
        and "'site-a' of 'hospitals'" in lines[0]
        and not (tmp_path / "home").exists()
    )


def test_what_would_keep_it_out(
    federation: Federation,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("max_rounds = 2\n")
    assert (
        said(federation, tmp_path, "--policy", str(policy), rounds=3) == 2
        and "F507: found a run of 3 rounds" in capsys.readouterr().err
    )
    assert (
        said(federation, tmp_path, server=f"localhost:{free_ports(1)[0]}") == 2
        and "E801: found nobody who answers" in capsys.readouterr().err
    )
    (tmp_path / "mine.py").write_text("")
    rows = "method.train.private={max_grad_norm = 1.0, noise_multiplier = 1.0, sample_rate = 0.1}"
    private = ("--set", "method.head_start=random", "--set", rows)
    assert (
        said(federation, tmp_path, "--trainer", str(tmp_path / "mine.py"), *private) == 2
        and "F507: found [method.train.private]" in capsys.readouterr().err
    )
    assert said(federation, tmp_path, "--model", "/nowhere") == 2 and "M301" in capsys.readouterr().err
    assert (
        said(federation, tmp_path, "--set", "data.label=nowhere") == 2 and "D204" in capsys.readouterr().err
    )
    monkeypatch.setattr(rehearsal, "AHEAD", -60.0)
    assert said(federation, tmp_path) == 2 and "T704: found a clock" in capsys.readouterr().err
    monkeypatch.undo()
    revoke(federation.coordinator.folder, "site-c")
    assert said(federation, tmp_path, site="site-c") == 2 and "T706" in capsys.readouterr().err
