"""fedtune keys, as an operator types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedtune.cli import main
from fedtune.trust import AllowList, load


def test_an_operators_year(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert (
        main(["keys", "init", "--federation", "hospitals", "--host", "fed.example.org", "--host", "10.0.0.1"])
        == 0
    )
    assert "fed.example.org, 10.0.0.1" in capsys.readouterr().out
    assert main(["keys", "issue", "site-a", "--days", "30"]) == 0
    old = load(Path("keys/clients/site-a"))
    assert main(["keys", "renew", "site-a"]) == 0
    new = load(Path("keys/clients/site-a"))
    capsys.readouterr()
    assert main(["keys", "list"]) == 0
    said = capsys.readouterr().out
    assert (
        said.count("site-a") == 2
        and "valid for 29 days" in said
        and "valid for 364 days" in said
        and old.peer.key[:12] in said
    )
    assert main(["keys", "revoke", "site-a", "--key", old.peer.key[:12]]) == 0
    assert (
        main(["keys", "list", "--keys", "keys/coordinator"]) == 0
    )  # as it lies on the coordinator's machine
    assert capsys.readouterr().out.count("revoked") == 2
    AllowList(Path("keys/coordinator/allowed.json")).check(new.peer)


def test_a_mistake_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = ["--keys", str(tmp_path / "keys")]
    for command, code in (
        (["issue", "a"], "T702"),
        (["list"], "T702"),
        (["init", "--host", "x/y"], "T708"),
        (["init", "--federation", "No"], "T708"),
    ):
        assert main(["keys", *command, *keys]) == 2
        said = capsys.readouterr().err.strip()
        assert said.startswith(f"fedtune: {code}: ") and "\n" not in said
    assert main(["keys", "init", *keys]) == 0
    with pytest.raises(SystemExit):
        main(["keys", "issue", "a", "--days", "0", *keys])


def test_a_passphrase_is_never_an_argument(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["--keys", str(tmp_path / "keys")]
    monkeypatch.setenv("FEDTUNE_AUTHORITY_PASSPHRASE", "anchor")
    monkeypatch.delenv("FEDTUNE_PASSPHRASE", raising=False)
    assert main(["keys", "init", "--authority-passphrase", *keys]) == 0
    monkeypatch.delenv("FEDTUNE_AUTHORITY_PASSPHRASE")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert main(["keys", "issue", "a", *keys]) == 2 and "T703" in capsys.readouterr().err
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    answers = iter(["anchor", "one", "two", "anchor", "boat", "boat"])
    monkeypatch.setattr("getpass.getpass", lambda prompt: next(answers))
    assert main(["keys", "issue", "a", "--passphrase", *keys]) == 2 and "differ" in capsys.readouterr().err
    assert main(["keys", "issue", "a", "--passphrase", *keys]) == 0
    assert load(tmp_path / "keys" / "clients" / "a", lambda path: "boat").name.name == "a"


def test_help_of_keys_loads_no_cryptography() -> None:
    probe = (
        "import sys; from fedtune.cli import build_parser; build_parser(); print([m for m in "
        "('cryptography', 'grpc') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", probe], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
