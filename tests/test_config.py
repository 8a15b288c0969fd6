"""Reading a recipe: what is right is resolved, what is wrong is one sentence with a code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedtune import config
from fedtune.errors import CATALOGUE, FedtuneError

ROOT = Path(__file__).parent.parent


def bad(tmp_path: Path, text: str, *overrides: str) -> str:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(FedtuneError) as caught:
        config.read(str(path), overrides)
    return str(caught.value)


def test_the_built_in_recipe_is_complete_and_stable() -> None:
    recipe = config.read(None)
    assert recipe.data.source == "docstrings" and recipe.partition.clients == 8
    assert recipe.fingerprint == config.read(None).fingerprint != config.read(None, ["seed=2"]).fingerprint


def test_the_name_of_a_run_is_not_part_of_its_identity() -> None:
    assert config.read(None, ["name=a"]).fingerprint == config.read(None, ["name=b"]).fingerprint


@pytest.mark.parametrize(
    "path",
    sorted([*ROOT.glob("simulations/*.toml"), *ROOT.glob("docker/*.toml")]),
    ids=lambda p: f"{p.parent.name}-{p.stem}",
)
def test_every_shipped_recipe_parses(path: Path) -> None:
    assert config.read(str(path)).rounds >= 1


def test_overrides_are_read_as_toml_and_as_bare_words() -> None:
    recipe = config.read(
        None,
        [
            "rounds=3",
            "model.name=../some/folder",
            "method.train.lr=1e-2",
            "method.adapter.targets=['query']",
            "partition.by=iid",
        ],
    )
    assert (recipe.rounds, recipe.model.name, recipe.method.train.lr) == (3, "../some/folder", 0.01)
    assert recipe.method.adapter.targets == ("query",) and recipe.partition.by == "iid"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rond = 3", "C101: found unknown key 'rond', expected one of name, seed, rounds"),
        ("[method.train]\nsteeps = 3", "unknown key 'method.train.steeps', expected one of optimizer"),
        ("[method.train]\nsteeps = 3", "write 'steps'"),
        ("rounds = 'three'", 'C102: found rounds = "three", expected a valid integer'),
        (
            "[method.train]\nlr = -1.0",
            "C102: found method.train.lr = -1.0, expected 'auto' or a number greater than 0",
        ),
        (
            "[method.train]\nlr = 'fast'",
            "found method.train.lr = \"fast\", expected 'auto' or a valid number",
        ),
        ("rounds = 0", "C102: found rounds = 0, expected a number greater than or equal to 1"),
        ("[method.adapter]\nrank = 0", "C102: found method.adapter.rank = 0"),
        (
            "[method.adapter]\nkind = 'lore'",
            "C102: found method.adapter.kind = \"lore\", expected one of 'lora', 'bias'",
        ),
        ("[method]\ntype = 'fedsgd'", 'C102: found method.type = "fedsgd"'),
        ("method = 3", "C102: found method = 3"),
        ("rounds = ", "C103"),
        ("[data]\nsource = 'jsonl'", "C104: found no data.path"),
        (
            "[data]\ntask = 'image-classify'",
            "C104: found data.task = 'image-classify' with data.source = 'docstrings'",
        ),
        ("[partition]\nby = 'column'", "C104: found partition.by = 'column' without partition.column"),
        (
            "[data]\ntask = 'causal-lm'\n[partition]\nby = 'dirichlet'",
            "C104: found partition.by = 'dirichlet' for a task without labels",
        ),
        ("[sampling]\ncount = 9", "C104: found sampling.count = 9 of 8 clients"),
        (
            "[method.adapter]\nkind = 'bias'\nrank = 4",
            "C104: found method.adapter.rank with method.adapter.kind = 'bias'",
        ),
        (
            "[method.server]\noptimizer = 'adam'\nmomentum = 0.9",
            "C104: found method.server.momentum with method.server.optimizer = 'adam'",
        ),
        ("[model]\ndtype = 'float16'", "C104: found model.dtype = 'float16' with training by gradients"),
        (
            "[model]\ndtype = 'float16'\n[method]\ntype = 'fedkseed'\nestimator = 'auto'",
            "C104: found model.dtype = 'float16' with training by gradients",
        ),
        ("[method.train]\nepochs = 2", "C104: found method.train.epochs together with method.train.steps"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    said = bad(tmp_path, text)
    assert sentence in said and "\n" not in said and said[:4] in CATALOGUE


def test_an_override_of_a_selector_takes_the_old_keys_with_it(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("[method.adapter]\nkind = 'lora'\nrank = 4\n[partition]\nby = 'dirichlet'\nalpha = 0.1")
    recipe = config.read(
        str(path), ["method.adapter.kind=prompt", "method.adapter.tokens=5", "partition.by=iid"]
    )
    assert (recipe.method.adapter.kind, recipe.method.adapter.tokens, recipe.partition.by) == (
        "prompt",
        5,
        "iid",
    )
    with pytest.raises(FedtuneError, match="C104"):
        config.read(str(path), ["method.adapter.kind=prompt", "method.adapter.rank=5"])


def test_the_order_of_overrides_loses_none() -> None:
    sets = [
        "method.train.steps=7",
        "method.size=128",
        "method.adapter.kind=head",
        "method.space=adapter",
        "method.type=fedkseed",
    ]
    recipe = config.read(None, sets)
    assert (
        recipe.method.type,
        recipe.method.train.steps,
        recipe.method.size,
        recipe.method.adapter.kind,
    ) == ("fedkseed", 7, 128, "head")
    assert recipe.fingerprint == config.read(None, sets[::-1]).fingerprint


def test_what_an_override_drops_is_said_and_the_rest_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        "[method]\nlora_alpha_by_client = [1.0]\n[method.train]\nlr = 0.5\n[method.adapter]\nrank = "
        "64\n[aggregate]\nrule = 'trimmed'\ntrim = 0.3"
    )
    recipe = config.read(str(path), ["method.type=fedkseed", "method.space=adapter", "aggregate.rule=mean"])
    assert (recipe.method.train.lr, recipe.method.adapter.rank) == (0.5, 64)
    assert sorted(note.split()[3] for note in recipe.notes) == [
        "aggregate.trim",
        "method.lora_alpha_by_client",
    ]
    assert config.read(str(path), ["aggregate.rule=trimmed"]).notes == ()
    assert config.read(str(path), ["aggregate.trim=0.4"]).aggregate.trim == 0.4


def test_a_table_without_its_discriminator_has_the_default_one(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("[method]\n[method.server]\n[aggregate]\n")
    recipe = config.read(str(path))
    assert (recipe.method.type, recipe.method.server.optimizer, recipe.aggregate.rule) == (
        "fedpeft",
        "none",
        "mean",
    )
    path.write_text("[aggregate]\nrule = 'meen'")
    assert "C102: found aggregate.rule = \"meen\", expected one of 'mean', 'ffa'" in bad(
        tmp_path, "[aggregate]\nrule = 'meen'"
    )


@pytest.mark.parametrize("override", ["rounds", "=3", "rounds.x=3", "a..b=1"])
def test_a_broken_override_names_itself(override: str) -> None:
    with pytest.raises(FedtuneError, match=r"C10[123]"):
        config.read(None, [override])


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FedtuneError, match=r"C105.*nothere"):
        config.read(str(tmp_path / "nothere.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FedtuneError, match="C105"):
        config.read(str(tmp_path / "binary.toml"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[model]\nmax_length = 5", "C101: found unknown key 'model.max_length'.*write data.max_length"),
        ("[method]\nrank = 5", "C101: found unknown key 'method.rank'.*write method.adapter.rank"),
        (
            "[method.train]\nlr = 1000000.0",
            "C102: found method.train.lr = 1000000.0.*less than or equal to 100",
        ),
    ],
)
def test_a_key_that_stands_elsewhere_and_a_slip_of_the_pen_are_named(
    text: str, words: str, tmp_path: Path
) -> None:
    assert re.search(words, bad(tmp_path, text))


def test_a_byte_order_mark_and_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "r.toml").write_bytes(b"\xef\xbb\xbfseed = 9\r\nrounds = 2\r\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (config.read("~/r.toml").seed, config.read("~/r.toml").rounds) == (9, 2)


INT8 = "chain=[{step='quantize', bits=8}]"


@pytest.mark.parametrize(
    ("chosen", "overrides"),
    [
        ("none", []),
        ("int8", [INT8]),
        ("int8", ["chain=[{step='dither'}]", "aggregate.rule=ffa"]),
        ("none", [INT8, "downlink.step=none"]),
        ("delta", [INT8, "downlink.step=delta"]),
        ("none", ["chain=[{step='mask'}]"]),  # its answers are exact
        ("none", [INT8, "method.adapter.kind=ia3"]),  # scales around one
        ("none", [INT8, "method.adapter.kind=bias"]),  # numbers of the base
        ("none", [INT8, "aggregate.rule=fedex"]),  # what it lays on top is exact
        ("none", [INT8, "method.lora_start=pissa"]),  # so is a residual
        ("none", [INT8, "method.type=experts"]),  # groups are given different tensors
    ],
)
def test_the_way_down_is_in_8_bits_where_nothing_shows_it(chosen: str, overrides: list[str]) -> None:
    assert config.read(None, overrides).downlink.step == chosen
