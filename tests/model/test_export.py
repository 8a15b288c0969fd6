"""What is exported is what was trained: equal logits through stock peft, stock transformers, and our own
loader."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.numpy
import torch
import transformers

from fedtune.errors import FedtuneError
from fedtune.model.base import load
from fedtune.model.encode import encode
from fedtune.model.export import is_stock, load_adapter, save_adapter, save_merged
from fedtune.model.fit import fit
from fedtune.model.loss import summed_loss
from fedtune.model.settings import ModelSettings, TrainSettings
from fedtune.model.sparse_support import INDICES, PLACES
from fedtune.model.tunable import attach
from fedtune.schema import digest
from tests import tiny
from tests.model.cases import ALL, VARIANTS
from tests.tables import adapter_of

AUTO = {
    "causal": transformers.AutoModelForCausalLM,
    "decoder": transformers.AutoModelForSequenceClassification,
    "encoder": transformers.AutoModelForSequenceClassification,
    "images": transformers.AutoModelForImageClassification,
}


def logits_of(net: Any, batch: dict[str, torch.Tensor], causal: bool) -> torch.Tensor:
    labels = batch["labels"]
    with torch.no_grad():
        logits = net.eval()(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return logits[:, -labels.shape[1] : -1] if causal else logits


def trained(workspace: Any, model: str, variant: str) -> tuple[Any, Any, torch.Tensor]:
    tunable, encoded = (
        attach(workspace.base(model), adapter_of(**VARIANTS[variant]), 3),
        workspace.encoded(model),
    )
    fit(tunable, encoded, TrainSettings(steps=4, lr=1e-2, batch=6), 5)
    batch = encoded.collate(range(3))
    with torch.no_grad():
        return tunable, batch, summed_loss(tunable, batch)[1]


@pytest.mark.parametrize(("model", "variant"), ALL)
def test_round_trips(workspace: Any, model: str, variant: str, tmp_path: Path) -> None:
    tunable, batch, want = trained(workspace, model, variant)
    state, causal = tunable.read(), model == "causal"
    folder = tmp_path / "adapter"
    save_adapter(tunable, folder, str(workspace.folders[model]), "# a card\n")
    assert digest(tunable.read()) == digest(state)
    assert (folder / "README.md").read_text().startswith("# a card\n")

    if is_stock(tunable):
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
            workspace.folders[model]
        )
        if variant != "p-tuning":  # its network travels, what the network says is exported
            held = safetensors.numpy.load_file(folder / "adapter_model.safetensors").keys()
            indices = {name for name in held if tunable.settings.sparse and name.endswith((INDICES, PLACES))}
            assert held - indices == state.keys()
        torch.manual_seed(99)  # the stock model's own fresh head is another one
        net = AUTO[model].from_pretrained(workspace.folders[model], **({} if causal else {"num_labels": 2}))
        net.config.pad_token_id = (
            workspace.base(model).net.config.pad_token_id if model == "decoder" else None
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stock = peft.PeftModel.from_pretrained(net, str(folder))
        assert torch.equal(logits_of(stock, batch, causal), want)
    else:
        assert not (folder / "adapter_config.json").exists()

    if tunable.settings.merges:
        save_merged(tunable, tmp_path / "merged", "# a card\n")
        merged = AUTO[model].from_pretrained(tmp_path / "merged")
        assert torch.allclose(logits_of(merged, batch, causal), want, atol=2e-5)
        assert (
            not causal
            or transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").get_vocab()
            == workspace.base(model).tokenizer.get_vocab()
        )
    else:
        with pytest.raises(FedtuneError, match="M306"):
            save_merged(tunable, tmp_path / "merged", "")
        assert not (tmp_path / "merged").exists()

    elsewhere = workspace.load(model, seed=77)  # another head, as another run would have
    again = load_adapter(elsewhere, folder)
    assert digest(again.read()) == digest(state)
    with torch.no_grad():
        assert torch.equal(summed_loss(again, batch)[1], want)


def test_a_fresh_pooler_travels_with_the_head(tmp_path: Path) -> None:
    """A masked language model has no pooler: the classifier's is random, so it must be trained and
    exported."""
    folder = tiny.bert(tmp_path / "base")
    bert = transformers.BertForMaskedLM(transformers.AutoConfig.from_pretrained(folder))
    bert.save_pretrained(folder)
    base = load(ModelSettings(name=str(folder), threads=1), "classify", ("a", "b"), 1)
    assert "bert.pooler.dense.weight" in base.fresh
    tunable, encoded = attach(base, adapter_of(), 1), encode(tiny.texts(), base, max_length=16)
    assert "base_model.model.bert.pooler.dense.weight" in tunable.named
    assert not any("pooler" in name and "lora" in name for name in tunable.named)
    fit(tunable, encoded, TrainSettings(steps=2), 1)
    batch = encoded.collate(range(4))
    with torch.no_grad():
        want = summed_loss(tunable, batch)[1]
    save_adapter(tunable, tmp_path / "out", str(folder), "")
    torch.manual_seed(5)
    stock = peft.PeftModel.from_pretrained(
        transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2),
        str(tmp_path / "out"),
    )
    assert torch.equal(logits_of(stock, batch, False), want)


def test_an_adapter_of_another_base_is_refused(workspace: Any, tmp_path: Path) -> None:
    tunable, _, _ = trained(workspace, "encoder", "lora")
    save_adapter(tunable, tmp_path / "a", "x", "")
    other = tiny.bert(tmp_path / "other")
    net = transformers.AutoModel.from_pretrained(other)
    with torch.no_grad():
        net.pooler.dense.bias += 1
    net.save_pretrained(other)
    with pytest.raises(FedtuneError, match=r"M304.*base model"):
        load_adapter(
            load(ModelSettings(name=str(other), threads=1), "classify", ("a", "b"), 1), tmp_path / "a"
        )
    with pytest.raises(FedtuneError, match=r"M304.*labels"):
        load_adapter(load(workspace.settings("encoder"), "classify", ("a", "c"), 1), tmp_path / "a")
    with pytest.raises(FedtuneError, match=r"M304.*no adapter"):
        load_adapter(workspace.base("encoder"), tmp_path / "nothing")
