"""Loading: the same head everywhere, a fingerprint of what was pretrained, and one sentence for what cannot
be loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fedtune.errors import FedtuneError
from fedtune.model import base, device
from fedtune.model.base import load
from fedtune.model.settings import ModelSettings
from tests import tiny


def test_a_fresh_head_depends_on_the_seed_alone(workspace: Any) -> None:
    first = workspace.load("encoder", seed=5)
    torch.rand(3)  # whatever ran before
    again, other = workspace.load("encoder", seed=5), workspace.load("encoder", seed=6)
    assert first.fresh == {"classifier.weight", "classifier.bias"}
    assert torch.equal(first.weights["classifier.weight"], again.weights["classifier.weight"])
    assert not torch.equal(first.weights["classifier.weight"], other.weights["classifier.weight"])


def test_the_fingerprint_names_the_pretrained_part(workspace: Any, tmp_path: Path) -> None:
    base = workspace.load("encoder", seed=5)
    assert base.fingerprint == workspace.load("encoder", seed=6).fingerprint  # another head, the same base
    assert len(base.fingerprint) == 64
    changed = tmp_path / "changed"
    shutil.copytree(workspace.folders["encoder"], changed)
    net = transformers.AutoModel.from_pretrained(changed)
    with torch.no_grad():
        net.encoder.layer[1].output.dense.weight[0, 0] += 1e-3
    net.save_pretrained(changed)
    assert (
        load(ModelSettings(name=str(changed), threads=1), "classify", ("a", "b"), 5).fingerprint
        != base.fingerprint
    )


def test_the_fingerprint_sees_the_tokenizer_but_not_its_last_call(workspace: Any) -> None:
    base = workspace.load("encoder", seed=5)
    base.tokenizer(
        ["the red fox"], truncation=True, max_length=2, padding="max_length"
    )  # leaves its state in the tokenizer
    assert base.fingerprint == workspace.base("encoder").fingerprint
    other = workspace.load("encoder", seed=5)
    other.tokenizer.add_tokens(["zebra"])
    assert other.fingerprint != base.fingerprint


def test_everything_is_frozen_and_the_context_known(workspace: Any) -> None:
    for name, context in (("causal", 64), ("encoder", 32), ("images", None)):
        base = workspace.load(name)  # the shared one may have been trained by another test
        assert base.context == context
        assert not any(value.requires_grad for value in base.net.parameters())
        assert not base.net.training
    assert (
        workspace.base("causal").tokenizer.pad_token_id
        == workspace.base("causal").net.config.pad_token_id
        == 1
    )  # no padding token: end of text


def test_a_classifier_for_other_labels_is_replaced(workspace: Any, tmp_path: Path) -> None:
    five = transformers.AutoModelForSequenceClassification.from_pretrained(
        workspace.folders["encoder"], num_labels=5
    )
    five.save_pretrained(tmp_path)
    workspace.base("encoder").tokenizer.save_pretrained(tmp_path)
    base = load(ModelSettings(name=str(tmp_path), threads=1), "classify", ("a", "b"), 1)
    assert base.net.classifier.weight.shape == (2, 32)
    assert base.fresh == {"classifier.weight", "classifier.bias"}
    assert base.fingerprint == workspace.base("encoder").fingerprint


@pytest.mark.parametrize(
    "name", ["no/such-model", "package:no_such_package/model", "package:json/nowhere", "/nowhere/at/all"]
)
def test_a_model_that_is_not_there_is_one_sentence(name: str) -> None:
    with pytest.raises(FedtuneError, match="M301") as caught:
        load(ModelSettings(name=name, threads=1), "classify", ("a", "b"), 1)
    assert "\n" not in str(caught.value)


def test_a_package_can_carry_a_model(workspace: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carrier_of_bert"
    shutil.copytree(workspace.folders["encoder"], package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    base = load(ModelSettings(name="package:carrier_of_bert/model", threads=1), "classify", ("a", "b"), 1)
    assert base.fingerprint == workspace.base("encoder").fingerprint


def test_a_tokenizer_of_another_model_is_refused(workspace: Any, tmp_path: Path) -> None:
    shutil.copytree(workspace.folders["encoder"], tmp_path / "mixed")
    transformers.AutoTokenizer.from_pretrained(workspace.folders["causal"]).save_pretrained(
        tmp_path / "mixed"
    )
    with pytest.raises(FedtuneError, match="M303"):
        load(ModelSettings(name=str(tmp_path / "mixed"), threads=1), "classify", ("a", "b"), 1)


def test_a_language_model_without_its_output_layer_is_refused(workspace: Any, tmp_path: Path) -> None:
    shutil.copytree(workspace.folders["causal"], tmp_path / "half")
    transformers.AutoModel.from_pretrained(tmp_path / "half").save_pretrained(tmp_path / "half")
    with pytest.raises(FedtuneError, match=r"M301.*lm_head"):
        load(ModelSettings(name=str(tmp_path / "half"), threads=1), "causal-lm", (), 1)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_files_are_one_sentence(workspace: Any, tmp_path: Path, file: str) -> None:
    shutil.copytree(workspace.folders["encoder"], tmp_path / "damaged")
    whole = (tmp_path / "damaged" / file).read_bytes()
    (tmp_path / "damaged" / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(FedtuneError, match="M301") as caught:
        load(ModelSettings(name=str(tmp_path / "damaged"), threads=1), "classify", ("a", "b"), 1)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_refused(workspace: Any, tmp_path: Path) -> None:
    tiny.bert(tmp_path)
    net = transformers.AutoModel.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(FedtuneError, match="M301"):
        load(ModelSettings(name=str(tmp_path), threads=1), "classify", ("a", "b"), 1)


@pytest.mark.parametrize(("own", "computes", "wanted"), [
    (torch.bfloat16, True, torch.bfloat16),
    (torch.bfloat16, False, torch.float32),
    (torch.float16, True, torch.float32),
    (torch.float32, True, torch.float32),
])  # fmt: skip
def test_a_type_left_open_rounds_nothing(
    own: torch.dtype, computes: bool, wanted: torch.dtype, tiny_bert: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    shutil.copytree(tiny_bert, tmp_path / "model")
    transformers.AutoModel.from_pretrained(tiny_bert, dtype=own).save_pretrained(tmp_path / "model")
    monkeypatch.setattr(base, "pick_device", torch.device)
    monkeypatch.setattr(base, "has_bfloat16", lambda device: computes)
    settings = ModelSettings(name=str(tmp_path / "model"))
    assert settings.dtype == "auto"
    assert base.dtype_of(settings.model_copy(update={"device": "cuda"})) == wanted
    assert base.dtype_of(settings.model_copy(update={"device": "cpu"})) == torch.float32


def test_of_a_checkpoint_that_is_not_here_yet_the_configuration_says_the_type(
    tiny_bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "folder_of", lambda place, revision: None)
    assert base.own_type(ModelSettings(name=str(tiny_bert))) == torch.float32


@pytest.mark.parametrize(("flags", "computes"), [("sse2 avx512_bf16", True), ("sse2 avx2", False)])
def test_what_a_processor_computes_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, computes: bool
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(device, "CPU", tmp_path / "cpuinfo")
    assert device.has_bfloat16(torch.device("cpu")) == computes
    monkeypatch.setattr(device, "CPU", tmp_path / "nothing")
    assert not device.has_bfloat16(torch.device("cpu"))


def test_half_precision_that_rounds_nothing_is_the_same_base(tiny_bert: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "model")
    net = transformers.AutoModel.from_pretrained(tiny_bert, dtype=torch.bfloat16)
    net.save_pretrained(tmp_path / "model")
    settings = [
        ModelSettings(name=str(tmp_path / "model"), dtype=d, threads=1) for d in ("float32", "bfloat16")
    ]
    wide, half = (load(one, "classify", ("a", "b"), 5) for one in settings)
    assert wide.held_fingerprint == half.held_fingerprint == half.fingerprint
    assert half.typed_fingerprint != half.held_fingerprint  # what earlier versions wrote
    assert half.is_called(half.typed_fingerprint)
