"""Every code has a page that says what happened, why, and what to do; what a page names is there."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedtune.cli import build_parser, main
from fedtune.cli.explain import pages
from fedtune.config import Recipe
from fedtune.deploy.supervisor import read_sentence
from fedtune.errors import CATALOGUE, FedtuneError
from fedtune.plain import plain
from fedtune.validation import places_of

ROOT = Path(__file__).parents[2] / "fedtune"
TEXT = (ROOT / "error_pages.toml").read_text(encoding="utf-8")


def test_every_code_has_a_page_and_every_page_a_code() -> None:
    assert list(pages()) == list(CATALOGUE)


@pytest.mark.parametrize("code", CATALOGUE)
def test_a_page_has_all_three_parts(code: str) -> None:
    page = pages()[code]
    assert page.why and page.fix
    for sentence in (CATALOGUE[code], page.what, *page.why, *page.fix):
        assert len(sentence.split()) >= 2 and sentence[-1] in ".`" and sentence == plain(sentence)


def test_every_code_is_raised_somewhere() -> None:
    sources = "\n".join(
        path.read_text(encoding="utf-8") for path in ROOT.rglob("*.py") if path.name != "errors.py"
    )
    used = set(re.findall(r"[\"( ]([A-Z]\d{3})[\",:]", sources))
    assert not CATALOGUE.keys() - used


def commands(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, set[str]]]:
    """Every command with its options."""
    yield name, {option for action in parser._actions for option in action.option_strings}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, below in action.choices.items():
                yield from commands(below, f"{name} {word}")


def test_commands_and_options_that_a_page_names_exist() -> None:
    known = dict(commands(build_parser(), "fedtune"))
    named = re.findall(r"`(fedtune(?: [a-z]+)+)([^`]*)`", TEXT)
    assert len(named) > 50
    for command, rest in named:
        words = command.split()
        while " ".join(words) not in known:
            words.pop()
        assert len(words) > 1, command
        assert set(re.findall(r"--[a-z-]+", rest)) <= known[" ".join(words)], (command, rest)


def test_settings_that_a_page_names_exist() -> None:
    tables = "|".join(Recipe.model_fields)
    named = set(re.findall(rf"`((?:{tables})\.[a-z_.]+)", TEXT)) - {"model.safetensors"}
    assert len(named) > 30
    for path in named:
        home, _, key = path.rpartition(".")
        assert any(place.startswith(home.split(".")[0]) for place in places_of(key, Recipe)), path


def test_a_page_is_printed_without_torch() -> None:
    probe = (
        "import sys, fedtune.cli as c; code = c.main(['explain', 'c101']); print('HEAVY', [m for m in "
        "('torch', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert (
        done.startswith("C101: A key in the recipe")
        and "Usual causes:\n  * " in done
        and "What to do:\n  * " in done
    )
    assert done.endswith("HEAVY []\n")


def test_an_unknown_code_is_one_sentence_with_near_misses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "D219"]) == 2
    said = capsys.readouterr().err
    assert (
        said.startswith("fedtune: C103: there is no error code 'D219'; did you mean D20")
        and said.count("\n") == 1
    )


def test_without_a_code_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(CATALOGUE)


def test_an_error_with_a_sentence_of_its_own_is_not_framed() -> None:
    error = FedtuneError("F501", sentence="Ray is not installed", do="install it")
    assert str(error) == "F501: Ray is not installed; install it."
    assert str(FedtuneError(error.code, error.found, error.expected, error.do)) == str(
        error
    )  # as it comes over the network
    assert str(read_sentence(str(error))) == str(error)  # and from the log of another program
