"""What an export says about loading works as it stands: the card's lines with stock libraries, and load.py
without fedtune."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from fedtune.model.export import is_stock, load_adapter, save
from fedtune.model.fit import fit
from fedtune.model.settings import TrainSettings
from fedtune.model.tunable import TunableModel, attach
from tests.model.cases import ALL, VARIANTS
from tests.tables import adapter_of


def tuned(workspace: Any, model: str, **settings: Any) -> TunableModel:
    tunable = attach(workspace.base(model), adapter_of(**settings), 0)
    fit(tunable, workspace.encoded(model), TrainSettings(steps=3, lr=0.05, batch=6), 5)
    return tunable


def logits(net: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(net(**batch).logits)


def run_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Execute the lines of the card in its folder."""
    (lines,) = re.findall(r"## Use\n.*?```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "load", raising=False)
    names: dict[str, Any] = {}
    exec(compile(lines, "card", "exec"), names)
    return names


@pytest.mark.parametrize(("model", "variant"), ALL)
def test_the_cards_lines_load_what_was_trained(
    model: str, variant: str, workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tunable = tuned(workspace, model, **VARIANTS[variant])
    batch = {
        name: value for name, value in workspace.encoded(model).collate([0, 1, 2]).items() if name != "labels"
    }
    want = logits(tunable.net, batch)
    save("adapter", tunable, tmp_path / "out", "# card\n")
    names = run_card(tmp_path / "out", monkeypatch)
    torch.testing.assert_close(logits(names["model"].eval(), batch), want, rtol=1e-4, atol=1e-5)
    assert type(names["tokenizer"]) is type(tunable.base.tokenizer)
    assert (tmp_path / "out" / "load.py").exists() is not is_stock(tunable)
    torch.testing.assert_close(
        logits(load_adapter(tunable.base, tmp_path / "out").net, batch), want, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("model", ["causal", "encoder"])
def test_pefts_own_shorthand_loads_it_as_well(
    model: str, workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tunable = tuned(workspace, model, kind="lora")
    batch = {
        name: value for name, value in workspace.encoded(model).collate([0, 1, 2]).items() if name != "labels"
    }
    want = logits(tunable.net, batch)
    save("adapter", tunable, tmp_path / "out", "# card\n")
    (line,) = re.findall(r"# in one line: (.*)", (tmp_path / "out" / "README.md").read_text())
    monkeypatch.chdir(tmp_path / "out")
    net = eval(line, {"peft": peft})  # noqa: S307  # our own card's line
    torch.testing.assert_close(logits(net.eval(), batch), want, rtol=1e-4, atol=1e-5)


def test_load_py_needs_no_fedtune_and_peft_only_for_an_adapter_of_its_own() -> None:
    spec = importlib.util.find_spec("fedtune.model.standalone")
    assert spec and spec.origin
    tree = ast.parse(Path(spec.origin).read_text())
    roots = {name.split(".")[0] for node in ast.walk(tree) for name in names_of(node)}
    assert roots <= {
        "__future__",
        "importlib",
        "json",
        "pathlib",
        "typing",
        "torch",
        "transformers",
        "safetensors",
        "peft",
    }
    top = {name.split(".")[0] for node in tree.body for name in names_of(node)}
    assert "peft" not in top and "fedtune" not in roots


def names_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


@pytest.mark.parametrize("model", ["causal", "encoder"])
def test_a_merged_models_card_works(
    model: str, workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tunable = tuned(workspace, model, kind="lora")
    batch = {
        name: value for name, value in workspace.encoded(model).collate([0, 1, 2]).items() if name != "labels"
    }
    want = logits(tunable.net, batch)
    save("merged", tunable, tmp_path / "out", "# card\n")
    torch.testing.assert_close(
        logits(run_card(tmp_path / "out", monkeypatch)["model"].eval(), batch), want, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_other_modules_can_be_trained_whole_and_travel(
    kind: str, workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tunable = tuned(workspace, "causal", kind=kind, modules_to_save=("embed_tokens", "lm_head"))
    assert {
        "base_model.model.model.embed_tokens.weight",
        "base_model.model.lm_head.weight",
    } <= tunable.named.keys()
    batch = {
        name: value
        for name, value in workspace.encoded("causal").collate([0, 1, 2]).items()
        if name != "labels"
    }
    want = logits(tunable.net, batch)
    save("adapter", tunable, tmp_path / "out", "# card\n")
    torch.testing.assert_close(
        logits(run_card(tmp_path / "out", monkeypatch)["model"], batch), want, rtol=1e-4, atol=1e-5
    )


def test_modules_that_are_not_there_or_tied_are_refused(workspace: Any, tmp_path: Path) -> None:
    from fedtune.errors import FedtuneError
    from fedtune.model.base import load
    from fedtune.model.settings import ModelSettings
    from tests import tiny

    with pytest.raises(FedtuneError, match=r"M302.*'nowhere'"):
        attach(workspace.base("causal"), adapter_of(modules_to_save=("nowhere",)), 0)
    base = load(ModelSettings(name=str(tiny.llama(tmp_path, tie=True)), threads=1), "causal-lm", (), 1)
    with pytest.raises(FedtuneError, match=r"M306.*tied to its embeddings"):
        attach(base, adapter_of(modules_to_save=("lm_head",)), 0)
