"""Thousands of tickets and policies that nobody would write: of each comes an answer of the catalogue, and
nothing that was not foreseen."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.deploy.policy import Policy, read_policy
from fedtune.errors import CATALOGUE, FedtuneError
from fedtune.rng import stream
from tests.hostile.coordinator import Taken, taken

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 1e308, -1e-320, "", "\0", "..", "../../etc/passwd",
    "~", "a" * 5000, "\u202e", "\ud7ff", "{{ 1 }}", "nan", [], [[]], {}, {"": ""}, {"type": "later"}, [0] * 300,
    "file:///etc/passwd", "package:json", "1e9", ["a", "a"],
]  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Taken]:
    with taken(tmp_path_factory.mktemp("taken"), tiny_bert) as made:
        yield made


def places(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values of a tree."""
    if isinstance(tree, dict):
        return [at, *(path for key, value in tree.items() for path in places(value, (*at, key)))]
    if isinstance(tree, list):
        return [at, *(path for number, value in enumerate(tree) for path in places(value, (*at, number)))]
    return [at]


def bent(tree: Any, draw: np.random.Generator) -> Any:
    """The tree with one to three values that are others, gone or new."""
    tree = copy.deepcopy(tree)
    for _ in range(int(draw.integers(1, 4))):
        path = places(tree)[1:]
        *parents, last = path[int(draw.integers(len(path)))]
        node = tree
        for key in parents:
            node = node[key]
        match int(draw.integers(4)):
            case 0:
                del node[last]
            case 1 if isinstance(node, dict):
                node[str(ODD[int(draw.integers(len(ODD)))])[:40]] = ODD[int(draw.integers(len(ODD)))]
            case _:
                node[last] = copy.deepcopy(ODD[int(draw.integers(len(ODD)))])
        if not isinstance(tree, dict) or not tree:
            return tree
    return tree


def tickets(hostile: Taken, count: int, seed: int) -> None:
    """The coordinator signs recipes and details that are bent; somebody else bends what it signed."""
    draw, worker = stream("tickets", seed), hostile.worker()
    recipe = hostile.recipe()
    details = {
        "recipe": "", "number": 0, "seed": 1, "members": [0], "last": 0, "first": True, "told": {}, "issued": 0,
        "ends": 0,
    }  # fmt: skip
    pieces = [b"\0", b'"', b"}", b"\\u0000", b"\xff", b"[" * 3000, b"1e999", b"null"]
    for number in range(count):
        if number % 3 == 0:
            said = hostile.asks(worker, bent(recipe, draw))
        elif number % 3 == 1:
            told = bent(details | {"recipe": json.dumps(recipe)}, draw)
            content = hostile.ticket(recipe, whole=json.dumps(told))
            said = worker.outcome(content)
        else:
            content = bytearray(hostile.ticket(recipe))
            for _ in range(int(draw.integers(1, 4))):
                at = int(draw.integers(len(content)))
                content[at : at + int(draw.integers(0, 9))] = pieces[int(draw.integers(len(pieces)))]
            said = worker.outcome(bytes(content))
        assert said["code"] in CATALOGUE, said
        assert said["code"] not in ("R411", "X900"), hostile.made.told["site-a"][-1]


def policies(folder: Path, count: int, seed: int) -> None:
    """Lines of values and of bytes that are others: a policy, or a sentence that says which line is wrong."""
    draw = stream("policies", seed)
    lines = {
        "coordinators": '["3f9a0c77d1e2"]', "approved_only": "true", "methods": '["fedpeft"]', "scores": "false",
        "min_rows": "100", "min_members": "3", "hours": '"20-06"', "bytes_a_day": "1_000", "require": '["sign"]',
    }  # fmt: skip
    values = ["", "-1", "1e400", "nan", '"', '"""', "[", "[1]", "{}", "true", "0x7fffffffffffffffffff", '"25-99"',
              "2026-01-01", "[[]]", '"\\u0000"', "'" + "x" * 5000 + "'", "[" * 2000, "\\"]  # fmt: skip
    for number in range(count):
        made = dict(lines)
        for _ in range(int(draw.integers(1, 4))):
            name = sorted(made)[int(draw.integers(len(made)))]
            made[name] = values[int(draw.integers(len(values)))]
        text = "\n".join(f"{name} = {value}" for name, value in made.items()).encode()
        if number % 4 == 0:
            at = int(draw.integers(len(text)))
            text = text[:at] + bytes(draw.integers(0, 256, 4, dtype=np.uint8)) + text[at:]
        path = folder / "policy.toml"
        path.write_bytes(text)
        try:
            assert isinstance(read_policy(str(path)), Policy)
        except FedtuneError as error:
            assert error.code in ("C101", "C102", "C103", "C105"), error


def test_tickets(hostile: Taken) -> None:
    tickets(hostile, 150, 1)


def test_policies(tmp_path: Path) -> None:
    policies(tmp_path, 400, 1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 8))
def test_many_tickets_and_policies(seed: int, hostile: Taken, tmp_path: Path) -> None:
    tickets(hostile, 2000, seed)
    policies(tmp_path, 5000, seed)
