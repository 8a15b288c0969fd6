"""A hostile coordinator's tickets: no word of them becomes a path, no recipe says what is read at a site, and
whatever is new to a site is a sentence."""

from __future__ import annotations

import ast
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedtune.deploy.worker import Worker
from fedtune.errors import FedtuneError
from fedtune.events import Noted
from fedtune.forms import MemberName, RunName, Sha256, VerbName
from tests import small
from tests.hostile.coordinator import Taken, taken

ROOT = Path(__file__).parents[2] / "fedtune"


@pytest.fixture(scope="module")
def hostile(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Taken]:
    with taken(tmp_path_factory.mktemp("taken"), tiny_bert) as made:
        yield made


def files(root: Path) -> dict[str, bytes]:
    """All that lies under a folder, but for what a site says of its own work."""
    own = ("worker.jsonl", "audit.jsonl", "errors", "lock", "tickets.json")
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and not set(path.parts) & set(own)
    }


WORDS = [
    "../../keys/clients/site-a/signing-key.pem",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    "a\x00b",
    "~",
    "%2e%2e",
    "-",
    "a" * 101,
    "a\n",
    "é",
    "CON/..",
    "a" * 63,
    "A" * 64,
]


@pytest.mark.parametrize("field", ["run", "verb", "given", "base", "client"])
@pytest.mark.parametrize("word", WORDS, ids=repr)
def test_no_word_of_a_ticket_becomes_a_path(field: str, word: str, hostile: Taken) -> None:
    """`given` deleted a site's key, and `run` wrote files anywhere."""
    worker = hostile.worker()
    before = files(hostile.made.root)
    said = hostile.asks(worker, **{field: word})
    assert said["code"] in ("W601", "W602", "W604", "W606", "E806", "F507", "M301", "E801", "E803"), said
    after = files(hostile.made.root)
    assert after.keys() >= before.keys() and all(
        after[name] == content for name, content in before.items() if "sequence" not in name
    )
    assert not {name for name in after.keys() - before.keys() if not name.startswith("home-site-a/")}


@pytest.mark.parametrize(
    "about", [{"round": 1 << 63}, {"given_size": 1 << 63}, {"budget": (1 << 64) - 1}, {"attempt": 1 << 63}]
)
def test_numbers_of_a_ticket_are_bounded(about: dict[str, int], hostile: Taken) -> None:
    assert hostile.asks(hostile.worker(), **about)["code"] == "W606"


@pytest.mark.parametrize(
    "details",
    [
        {"number": -1},
        {"number": 1 << 40},
        {"last": -1},
        {"members": [-1]},
        {"members": "x"},
        {"number": 1},
        {"recipe": "[" * 100_000},
        {"told": {"token": "../x"}},
    ],
    ids=lambda d: str(d)[:40],
)
def test_details_of_a_ticket_are_judged(details: dict[str, Any], hostile: Taken) -> None:
    said = hostile.asks(hostile.worker(), None, details)
    assert said["code"] in ("W601", "W602", "W604", "W606", "S702", "R411")


def test_a_ticket_that_has_ended_is_not_done_again(hostile: Taken) -> None:
    """An old one, found by somebody or kept for a day when the site has lost its spool."""
    worker = hostile.worker()
    ended = hostile.asks(worker, None, {"issued": 1, "ends": int((time.time() - 1) * 1e6)})
    assert ended["code"] == "W604"
    told = [event.text for event in hostile.made.told["site-a"] if isinstance(event, Noted)]
    assert "a ticket that ended" in told[-1]
    open_ = hostile.asks(worker, None, {"ends": int((time.time() + 60) * 1e6)})
    told = [event.text for event in hostile.made.told["site-a"] if isinstance(event, Noted)]
    assert open_["code"] == "W604" and "base model" in told[-1]


def test_an_older_ticket_is_not_done_after_a_newer_one(hostile: Taken) -> None:
    """Somebody keeps a ticket that the coordinator signed, waits, and sends it again; also to another life of
    the worker, and one of a run that was forgotten."""
    worker, now = hostile.worker(), int(time.time() * 1e6)

    def at(number: int, run: str = hostile.made.run, who: Worker = worker) -> str:
        return str(hostile.asks(who, None, {"issued": number}, run=run)["code"])

    assert at(now) == "W604" == at(now)  # the base is made up; so far it gets each time
    assert at(now - 1) == "E809" == at(0)
    assert at(now + 1) == "W604"
    assert at(now, who=hostile.worker()) == "E809"
    assert (
        at(now + int(3600e6)) == "E809" and at(now + 2) == "W604"
    )  # of next hour: it is not taken for newest
    for other in range(70):
        assert at(now + 10 + other, f"run-{other}") == "W604"
    assert at(now + 3, "run-0") == "E809" and at(now, "run-of-last-year") == "E809"
    assert len(json.loads((worker.home / "tickets.json").read_text())["newest"]) <= 64
    (worker.home / "tickets.json").write_text("{")
    assert at(now, who=hostile.worker()) == "W604"  # a home that was damaged: the site goes on
    (worker.home / "tickets.json").unlink()


@pytest.mark.parametrize("make", [Sha256, RunName, VerbName, MemberName])
def test_a_name_that_has_no_form_cannot_be_made(make: Any) -> None:
    for word in WORDS:
        if make.form.fullmatch(word):
            assert not set(word) & set("/\\\0~%") and word not in ("", ".", "..")
            continue
        with pytest.raises(FedtuneError, match="W601"):
            make(word)


# --- rows ---


def test_a_recipe_cannot_name_rows_at_a_site(hostile: Taken, tmp_path: Path) -> None:
    """With and without --data; whether the file is there or not makes no difference to the answer."""
    (tmp_path / "secret").mkdir()
    other = small.write_rows(tmp_path / "secret")
    for more in ({}, {"data": ""}):
        worker = hostile.worker(**more)
        answers = []
        for path in (str(other), "/nowhere/at/all.jsonl", "/etc/passwd", "~/.ssh/id_rsa"):
            answers.append(hostile.asks(worker, hostile.recipe(deploy__data="partition", data__path=path)))
        assert {said["code"] for said in answers} == {"F507"}


def test_a_recipe_cannot_name_a_models_folder_at_a_site(hostile: Taken) -> None:
    """Neither to be read, nor to learn whether it is there; `package:` would import what is installed."""
    worker = hostile.worker(model="")
    names = [
        str(hostile.model),
        "/nowhere",
        "./model",
        "../model",
        "~/model",
        "package:json",
        "package:tests.tiny/x",
        "file:///x",
        "a/b/c",
    ]
    answers = [hostile.asks(worker, hostile.recipe(model__name=name)) for name in names]
    assert {said["code"] for said in answers} == {"F507"}


@pytest.mark.parametrize("source", ["docstrings", "digits"])
def test_a_recipe_cannot_have_rows_made_of_what_is_installed(source: str, hostile: Taken) -> None:
    task = {"docstrings": "classify", "digits": "image-classify"}[source]
    recipe = hostile.recipe(data={"source": source, "task": task, "labels": sorted(small.WORDS)})
    assert hostile.asks(hostile.worker(), recipe)["code"] == "F507"


# --- versions ---


def test_settings_and_verbs_of_another_version_are_refused_as_that(hostile: Taken) -> None:
    worker = hostile.worker()
    for recipe in (
        hostile.recipe(novelty=1),
        hostile.recipe(method__novelty=1),
        hostile.recipe(method__type="later"),
        hostile.recipe(rounds="many"),
    ):
        assert hostile.asks(worker, recipe)["code"] == "W602"
    assert hostile.asks(worker, verb="mask.open")["code"] == "W602"
    assert hostile.asks(worker, protocol=9)["code"] == "W602"


def test_a_recipe_of_two_thousand_labels_travels(hostile: Taken) -> None:
    from fedtune.trust import Ticket, ticket

    labels = [f"a class with a long name, number {number} of two thousand" for number in range(2000)]
    recipe = hostile.recipe(data__labels=labels)
    about = Ticket(
        hostile.made.run,
        1,
        "site-a",
        "train",
        "",
        "b" * 64,
        hostile.given,
        1,
        1,
        details=json.dumps({"recipe": json.dumps(recipe)}),
    )  # type: ignore[arg-type]
    assert len(json.dumps(recipe)) > 100_000
    assert (
        ticket.read(ticket.write(about, hostile.identity), hostile.worker().identity).details == about.details
    )
    assert hostile.asks(hostile.worker(), recipe, verb="none")["code"] == "W602"


# --- the code ---

# file -> what is joined to a path there and is no constant: where it comes from, that it may be a name
JOINED = {
    "deploy/app.py": {"name": "FILES, here"},
    "deploy/supervisor.py": {"name": "APPS, here"},
    "deploy/server.py": {
        "name": "of a recipe, by the coordinator's operator",
        "recipe.name or stem": "the same",
        "f'{name}.log'": "a program of ours",
    },
    "deploy/client.py": {"f'{name}.log'": "a program of ours"},
    "deploy/worker.py": {"about.run": "RunName, checked where a ticket is made"},
    "exchange/cache.py": {"sha256": "Sha256", "newest": "Sha256", "f'{sha256}.part'": "Sha256"},
    "exchange/objects.py": {
        "sha256": "Sha256",
        "name": "three folders, here",
        "f'{short(run)}-{round:08d}-{client}-{envelope[:32]}.part'": "hashes and a MemberName",
    },
    "exchange/outbox.py": {
        f"f'{{{name}}}.{end}'": "a hash that is made here"
        for name, ends in {
            "name": ("update", "envelope"),
            "finished.name": ("receipt", "refused"),
            "name_of(ticket)": ("receipt",),
        }.items()
        for end in ends
    },
    "trust/authority.py": {"name": "checked(): the form of a member's name", "file": "four files, here"},
    "trust/renewal.py": {
        "peer.key[:16]": "a hash that is made here",
        "f'{name}.request'": "MemberName",
        "f'{name}.answer'": "MemberName",
        "peer.ends - peer.starts": "a division of times",
    },
}


def joins(path: Path) -> Iterator[str]:
    """What is joined to a path by `/` or `joinpath` and is neither a text nor a constant's name."""
    for node in ast.walk(ast.parse(path.read_text())):
        found = [node.right] if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) else []
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("joinpath", "with_name")
        ):
            found = [*node.args] if node.func.attr == "joinpath" else []
        for part in found:
            plain = (
                isinstance(part, ast.Constant)
                or (isinstance(part, ast.Name) and part.id.isupper())
                or (isinstance(part, ast.Attribute) and part.attr.isupper())
            )
            if not plain:
                yield ast.unparse(part)


@pytest.mark.parametrize("room", ["deploy", "exchange", "trust"])
def test_whatever_is_joined_to_a_path_is_known_to_be_a_name(room: str) -> None:
    """A new join stands in the table above with the place where its value was checked, or fails here."""
    numbers = {
        "self.counts",
        "weight",
        "update.weight",
        "norm",
        "total",
        "stride",
        "2",
    }  # a division of numbers
    for path in sorted((ROOT / room).glob("*.py")):
        known = JOINED.get(f"{room}/{path.name}", {})
        new = {
            part
            for part in joins(path)
            if part not in known and part not in numbers and not part.startswith(("1024", "len("))
        }
        assert not new, f"{room}/{path.name}: {new}"
