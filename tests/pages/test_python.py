"""Python on the pages runs as it stands, from a folder that holds what the page speaks of: a recipe, rows, a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers

from tests import small, tiny
from tests.experts.test_routers import expert
from tests.marks import mostly_thorough
from tests.pages.blocks import Block, blocks

ELSEWHERE = {  # pages whose Python a test of their own runs, in its order
    "docs/extending.md": "tests/test_extending.py",
    "docs/getting-started.md": "tests/pages/test_getting_started.py",
    "docs/preference.md": "tests/runtime/test_trl.py",
}
RUN = [block for block in blocks() if block.language == "python" and block.page not in ELSEWHERE]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    small.write_recipe(folder / "my.toml", tiny.bert(folder / "model"), small.write_rows(folder))
    return folder


def trainer(place: Path) -> dict[str, Any]:
    """The names of docs/trainer.md: somebody's own script up to its Trainer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "model")
    classes = sorted(small.WORDS)

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
        return {**batch, "labels": torch.tensor([classes.index(row["label"]) for row in rows])}

    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(outputs.logits, labels)

    return {
        "Trainer": transformers.Trainer,
        "model": transformers.AutoModelForSequenceClassification.from_pretrained(
            place / "model", num_labels=3
        ),
        "args": transformers.TrainingArguments(
            "out", max_steps=1, report_to="none", remove_unused_columns=False, disable_tqdm=True, use_cpu=True
        ),
        "rows": datasets.Dataset.from_list(small.rows()),
        "collate": collate,
        "loss": loss,
    }


def routers(place: Path) -> dict[str, Any]:
    """The names of docs/experts.md: a language model, and adapters on it."""
    net = transformers.AutoModelForCausalLM.from_pretrained(tiny.llama(place / "llama")).eval()
    return {"model": net} | {name: expert(net, n) for n, name in enumerate(("law", "care", "general"))}


GIVEN = {"docs/trainer.md": trainer, "docs/experts.md": routers}  # what the text around a block speaks of


@pytest.mark.parametrize(
    "block", mostly_thorough(RUN, [b for b in RUN if b.page != "docs/trainer.md"]), ids=str
)
def test_a_block_runs(block: Block, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    names = GIVEN[block.page](place) if block.page in GIVEN else {}
    exec(compile(block.text, str(block), "exec"), names)
