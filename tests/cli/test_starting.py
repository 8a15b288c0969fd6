"""The first commands: a recipe from rows alone, what the loader sees, completion, the schema, the version."""

from __future__ import annotations

import json
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import fedtune
from fedtune import config
from fedtune.cli import init, main
from fedtune.cli.schema import HEADER, recipe_schema
from fedtune.errors import FedtuneError
from tests import small

ROOT = Path(__file__).parents[2]
SHIPPED = [*sorted((ROOT / "simulations").glob("*.toml")), *sorted((ROOT / "fedtune/recipes").glob("*.toml"))]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "notes.csv"
    rows = small.rows(60)
    file.write_text("text,label,site\n" + "".join(f"{r['text']},{r['label']},{r['site']}\n" for r in rows))
    return file


def test_init_writes_a_recipe_that_check_passes(
    table: Path, tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "mine.toml"
    assert main(["init", str(table), "--model", str(tiny_bert), "--to", str(target)]) == 0
    assert "classify" in capsys.readouterr().out
    recipe = config.read(str(target))
    assert (recipe.data.text, recipe.data.label, recipe.partition.by) == ("text", "label", "column")
    assert 8 <= recipe.data.max_length <= 32  # of the model's context
    assert main(["check", str(target)]) == 0 and "clients   4," in capsys.readouterr().out
    before = target.read_text()
    assert before.count("#") > 10 and HEADER not in before
    assert main(["init", str(table), "--model", str(tiny_bert), "--to", str(target)]) == 2
    assert "R401" in capsys.readouterr().err and target.read_text() == before


def test_init_takes_a_task_and_asks_at_a_terminal(
    table: Path, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "lm.toml"
    (tmp_path / "recipe.schema.json").write_text("{}")
    told = ["init", str(table), "--task", "causal-lm", "--model", str(tiny_llama), "--to", str(target)]
    assert main(told) == 0
    assert target.read_text().startswith(f"{HEADER} recipe.schema.json\n")
    assert config.read(str(target)).data.task == "causal-lm"

    answers = iter([str(table), "odd", "causal-lm", str(tiny_llama)])
    monkeypatch.setattr("builtins.input", lambda said: next(answers))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    other = tmp_path / "asked.toml"
    assert init.run(parsed(["init", "--to", str(other)])) == 0
    assert config.read(str(other)).canonical() == config.read(str(target)).canonical()
    assert list(answers) == []


def parsed(arguments: list[str]) -> Any:
    from fedtune.cli import build_parser

    return build_parser().parse_args(arguments)


def test_init_refuses_in_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.bin").write_bytes(b"\0")
    (tmp_path / "a.txt").write_text("a text\n")
    for arguments, code in (
        ([], "C103"),
        ([str(tmp_path / "none.csv")], "D201"),
        ([str(tmp_path / "a.bin")], "D202"),
        ([str(tmp_path / "a.txt"), "--task", "classify"], "C104"),
    ):
        assert main(["init", *arguments, "--to", str(tmp_path / "r.toml")]) == 2
        assert code in capsys.readouterr().err
    assert not (tmp_path / "r.toml").exists()


def test_data_shows_what_the_loader_sees(
    table: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table.write_text(table.read_text() + " ,music,site-0\n" + table.read_text().splitlines()[1] + "\n")
    more = ["--set", "data.max_length=6", "--examples", "2"]
    assert main(["data", str(table), "--model", str(tiny_bert), *more]) == 0
    said = capsys.readouterr().out
    for part in (
        "62 rows",
        "1 rows: an empty text",
        "1 rows equal an earlier one",
        "labels    3",
        "61 of 61",
    ):
        assert part in said
    examples = said[said.index("examples") :].splitlines()[1:]
    assert len(examples) == 2 and all("[CLS]" in one and "[SEP]  ->" in one for one in examples)


def test_data_shows_which_tokens_carry_loss(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "say fox", "response": "red fox"}\n' * 3)
    assert main(["data", str(file), "--model", str(tiny_llama)]) == 0
    said = capsys.readouterr().out
    assert "<|user|>↵say fox</s>↵<|assistant|>↵«red fox</s>↵»" in said and "2 rows equal" in said
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main(["data", str(file), "--model", str(tiny_llama)]) == 0
    assert "\x1b[32mred fox</s>↵\x1b[0m" in capsys.readouterr().out


def test_a_recipe_is_shown_as_it_is(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = small.write_recipe(tmp_path / "r.toml", tiny_bert, small.write_rows(tmp_path))
    assert main(["data", str(path)]) == 0 and "120 rows" in capsys.readouterr().out
    assert main(["data", str(path), "--task", "instruct"]) == 2


def test_the_schema_accepts_what_is_shipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "recipe.schema.json"
    assert main(["schema", "--to", str(target)]) == 0 and HEADER in capsys.readouterr().out
    schema = json.loads(target.read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    assert len(SHIPPED) >= 6
    for file in SHIPPED:
        jsonschema.Draft7Validator(schema).validate(tomllib.loads(file.read_text()))


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return recipe_schema()


def test_shipped_recipes_name_the_schema_beside_the_pages(schema: dict[str, Any]) -> None:
    for file in sorted((ROOT / "simulations").glob("*.toml")):
        header, place = file.read_text().splitlines()[0].split()
        assert header == HEADER
        assert json.loads((file.parent / place).read_text()) == schema


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("rounds = 3", True),
        ("rounds = 0", False),
        ("round = 3", False),
        ("[data]\nmax_length = 12", True),  # the default source
        ("[data]\npath = 'a'", False),  # a key of another source
        ("[data]\nsource = 'csv'\npath = 'a'\nencoding = 'cp1252'", True),
        ("[data]\nsource = 'excel'", False),
        ("[partition]\nalpha = 0.3", True),  # dirichlet's
        ("[partition]\nby = 'iid'\nalpha = 0.3", False),
        ("[method.adapter]\nrank = 4", True),
        ("[method.adapter]\nkind = 'bias'\nrank = 4", False),
        ("[method]\ntype = 'fedkseed'\neps = 1e-3", True),
        ("[method]\neps = 1e-3", False),
        ("[[chain]]\nstep = 'sign'\nerror_feedback = true", True),
        ("[[chain]]\nbits = 4", False),  # a step has to be named
        ("[[metrics]]\nmetric = 'macro-f1'", True),
        ("[method.train]\nlr = 'auto'", True),
        ("[method.train]\nlr = -1", False),
    ],
)
def test_schema_and_loader_agree(text: str, good: bool, schema: dict[str, Any]) -> None:
    tree = tomllib.loads(text)
    assert jsonschema.Draft7Validator(schema).is_valid(tree) == good
    if good:
        config.parse_with(tree, (), "recipe")
    else:
        with pytest.raises(FedtuneError):
            config.parse_with(tree, (), "recipe")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out == f"fedtune {fedtune.__version__}\n"


def test_bash_completes_commands_options_and_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "fedtune.bash"
    script.write_text(capsys.readouterr().out)
    (tmp_path / "mine.toml").touch()

    def completed(*words: str) -> set[str]:
        ask = 'source fedtune.bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_fedtune "" "${@: -1}"'
        run = subprocess.run(
            ["bash", "-c", f'{ask}; printf "%s\\n" "${{COMPREPLY[@]}}"', "bash", "fedtune", *words],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return set(run.stdout.split())

    assert {"simulate", "site", "schema", "server"} <= completed("s")
    assert "--engine" in completed("simulate", "--e")
    assert completed("simulate", "--engine", "f") == {"flower"}
    assert "mine.toml" in completed("check", "mi")


@pytest.mark.parametrize(("shell", "option"), [("zsh", '"--engine['), ("fish", "-l engine ")])
def test_other_shells_have_a_script(shell: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    said = capsys.readouterr().out
    assert "fedtune" in said and "simulate" in said and option in said
