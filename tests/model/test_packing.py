"""Packed rows: the same losses and gradients as texts that are padded, in every family that heeds them; all
others are refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fedtune.errors import ClientFailed, FedtuneError
from fedtune.hf.packing import arguments
from fedtune.model import fit as fitting
from fedtune.model.base import Base, load
from fedtune.model.collate import collation
from fedtune.model.encode import Encoded
from fedtune.model.fit import fit
from fedtune.model.input_changes import INPUT_CHANGES
from fedtune.model.loss import carries, inputs_of, logits_of, summed_loss, tokens_in
from fedtune.model.objectives import OBJECTIVES
from fedtune.model.objectives.base import IGNORED
from fedtune.model.packing import OWNERS, in_rows, lengths_of, packed, rows_of, texts_apart, way
from fedtune.model.settings import ModelSettings, TrainSettings
from fedtune.model.together import Trainee, fit_together
from fedtune.model.tunable import TunableModel, attach
from fedtune.rng import stream
from fedtune.types import TOKEN_TASKS
from tests import small, tiny
from tests.models.families import FAMILIES
from tests.models.folders import make
from tests.tables import adapter_of

LENGTHS = (11, 3, 7, 2, 12, 5)
HEEDED = {  # how each of them is told
    "Llama": "positions",
    "GPT-2": "positions",
    "Mistral": "positions",  # windows of 6 tokens
    "Gemma 2": "positions",
    "Mixtral": "positions",
    "GPT-J": "positions",  # attention that is written out
    "BERT": "mask",
    "OPT": "mask",
    "Falcon": "mask",
    "XGLM": "mask",
}
REFUSED = ("BLOOM", "Mamba", "Mamba 2", "RWKV")


def base_of(family: str, folder: Path) -> Base:
    if family == "BERT":  # as a language model
        place = tiny.bert(folder / "bert")
        config = transformers.BertConfig.from_pretrained(place, is_decoder=True)
        tiny.save(transformers.BertLMHeadModel, config, place)
    else:
        place = make(FAMILIES[family], folder / "model")
    return load(ModelSettings(name=str(place), threads=1, device="cpu"), "causal-lm", (), 1)


def texts_of(base: Base, lengths: Sequence[int] = LENGTHS) -> Encoded:
    """Examples of these lengths, of random tokens; the first third of each carries no loss."""
    draw = stream("packing", len(lengths))
    made = []
    for length in lengths:
        ids = draw.integers(4, base.net.config.get_text_config().vocab_size, length).astype(np.int32)
        labels = np.where(np.arange(length) < length // 3, IGNORED, ids).astype(np.int32)
        made.append({"input_ids": ids, "labels": labels})
    return Encoded(made, collation(made, base), 1, max_length=24)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TunableModel:
    place = tiny.llama(tmp_path_factory.mktemp("packed") / "llama")
    base = load(ModelSettings(name=str(place), threads=1, device="cpu"), "causal-lm", (), 1)
    return attach(base, adapter_of(kind="lora", rank=2), 1)


@pytest.mark.parametrize("family", HEEDED)
def test_packed_is_unpacked(family: str, tmp_path: Path) -> None:
    """Logits, loss and gradients, to the last digits of float32."""
    base = base_of(family, tmp_path)
    tunable = attach(base, adapter_of(kind="full"), 1)
    encoded = texts_of(base)
    plain, rows = encoded.collate(range(6)), in_rows(encoded).collate(range(6))
    assert way(base) == HEEDED[family]
    assert rows["input_ids"].numel() < plain["input_ids"].numel() and len(rows["input_ids"]) < 6
    assert carries("causal-lm", plain) == carries("causal-lm", rows) and tokens_in(plain) == tokens_in(rows)
    found = []
    for batch in (plain, rows):
        loss, logits, labels = summed_loss(tunable, batch)
        assert logits is not None
        loss.backward()
        found.append((loss, logits, labels, [value.grad for value in tunable.parameters()]))
        for value in tunable.parameters():
            value.grad = None
    (one, here, wanted, gradients), (other, there, labels, packed_gradients) = found
    labels, logits = texts_apart(rows[OWNERS], labels, there)
    assert torch.equal(labels, wanted)
    target = labels != IGNORED
    close(logits[target], here[target])
    close(other, one)
    scale = max(float(value.abs().max()) for value in gradients if value is not None)
    for got, want in zip(packed_gradients, gradients, strict=True):
        assert (got is None) == (want is None)
        if want is not None and got is not None:
            assert float((got - want).abs().max()) <= 2e-6 * scale


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    assert float((one - other).abs().max()) <= 2e-6 * float(other.abs().max())


@pytest.mark.parametrize("family", [name for name in HEEDED if name != "Mixtral"])
def test_a_text_does_not_move_when_its_neighbours_change(family: str, tmp_path: Path) -> None:
    """Not by a bit: what a mask hides weighs exactly nothing."""
    base = base_of(family, tmp_path)
    batch = packed(texts_of(base).collate(range(6)), [[0, 1, 2], [3, 4, 5]])
    tunable = attach(base, adapter_of(kind="full"), 1)
    before = logits_of(tunable, *inputs_of(tunable, batch))[0]
    for text in (1, 4):
        mine = batch[OWNERS] == text
        ids = torch.where(mine, batch["input_ids"], (batch["input_ids"] + 7) % 30 + 4)
        after = logits_of(tunable, *inputs_of(tunable, batch | {"input_ids": ids}))[0]
        assert torch.equal(after[mine[:, :-1]], before[mine[:, :-1]])
        assert not torch.equal(after, before)


@pytest.mark.parametrize("family", REFUSED)
def test_what_heeds_no_packing_is_refused(family: str, tmp_path: Path) -> None:
    base = base_of(family, tmp_path)
    tunable = attach(base, adapter_of(kind="full"), 1)
    with pytest.raises(FedtuneError, match=r"M306: found method\.train\.packing with a .*packing = false"):
        fit(tunable, texts_of(base), TrainSettings(packing=True, lr=0.1, steps=1), 1)


SETTINGS: dict[str, Any] = {
    "steps": 3,
    "lr": 0.05,
    "batch": 5,
    "optimizer": "sgd",
    "accumulate": 2,
    "clip": 0.5,
}
ALTERED: dict[str, dict[str, Any]] = {
    **{
        f"loss {name}": {"objective": {"loss": name}}
        for name, one in OBJECTIVES.items()
        if one().tasks & set(TOKEN_TASKS)
    },
    **{
        f"input {name}": {
            "inputs": ({"input": name} | ({"token": "random"} if name == "masked-thought" else {}),)
        }
        for name in INPUT_CHANGES
    },
    "uds": {"uds": {"keep": 0.6}},
    "checkpointing": {"checkpointing": True},
    "prox": {"prox": 0.3},
}


def trained(tunable: TunableModel, encoded: Encoded, **more: Any) -> tuple[Any, dict[str, np.ndarray]]:
    before = tunable.read()
    try:
        return fit(tunable, encoded, TrainSettings(**{**SETTINGS, **more}), 9, (1, 2)), tunable.read()
    finally:
        tunable.write(before)


@pytest.mark.parametrize("name", ALTERED)
def test_whatever_else_a_client_trains_by(name: str, llama: TunableModel) -> None:
    encoded = texts_of(llama.base, (11, 3, 7, 2, 12, 5, 9, 4, 6))
    one, wanted = trained(llama, encoded, **ALTERED[name])
    other, got = trained(llama, encoded, packing=True, **ALTERED[name])
    assert (one.steps, one.examples, one.tokens) == (other.steps, other.examples, other.tokens)
    assert other.loss == pytest.approx(one.loss, rel=2e-6)
    for key, value in wanted.items():
        moved = np.abs(value - llama.read()[key]).max()
        np.testing.assert_allclose(got[key], value, rtol=3e-7, atol=1e-5 * moved, err_msg=key)


def test_packed_batches_are_trained_on(llama: TunableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And their rows are those of the examples that a step has without."""
    seen: list[dict[str, torch.Tensor]] = []
    real = fitting.here

    def look(tunable: Any, batches: Any, *rest: Any) -> float:
        seen.extend(batches)
        return real(tunable, batches, *rest)

    monkeypatch.setattr(fitting, "here", look)
    encoded = texts_of(llama.base)
    trained(llama, encoded, packing=True)
    assert all(OWNERS in batch or len(batch["labels"]) == 1 for batch in seen)
    rows, seen[:] = list(seen), []
    trained(llama, encoded)
    assert [lengths_of(batch) for batch in seen] == [
        torch.bincount(batch[OWNERS].flatten() + 1)[1:].tolist() if OWNERS in batch else lengths_of(batch)
        for batch in rows
    ]


def test_halves_are_packed_too(llama: TunableModel, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, real, tried = texts_of(llama.base), fitting.here, list[list[int]]()

    def small(tunable: Any, batches: Any, *rest: Any) -> float:
        tried.append(
            [int(batch[OWNERS].max()) + 1 if OWNERS in batch else len(batch["labels"]) for batch in batches]
        )
        if max(tried[-1]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(tunable, batches, *rest)

    _, wanted = trained(llama, encoded, packing=True, steps=1)
    monkeypatch.setattr(fitting, "here", small)
    try:
        _, got = trained(llama, encoded, packing=True, steps=1)
    finally:
        llama.base.fits.clear()
    assert tried == [[5, 1], [3, 2, 1]]
    for key, value in wanted.items():
        np.testing.assert_allclose(got[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("objective", [{}, {"loss": "asft"}, {"loss": "balanced"}], ids=str)
def test_clients_in_one_pass(objective: dict[str, str], llama: TunableModel) -> None:
    """Each ends where it ends alone, without packing."""
    settings = TrainSettings(
        **SETTINGS,
        packing=True,
        **({"objective": objective} if objective else {}),  # type: ignore[arg-type]
    )
    draw = np.random.default_rng(3)
    start = llama.read()
    trainees = []
    for place, lengths in enumerate([(11, 3, 7, 2), (12, 5, 2, 2, 3, 4, 6), (4,)]):
        noise = {n: (v + 0.05 * draw.standard_normal(v.shape)).astype(np.float32) for n, v in start.items()}
        trainees.append(Trainee(texts_of(llama.base, lengths), noise, 40 + place))
    found = fit_together(llama, trainees, settings, frozenset(llama.named))
    for one, got in zip(trainees, found, strict=True):
        assert not isinstance(got, ClientFailed)
        llama.write(one.start)
        alone = fit(llama, one.encoded, settings.model_copy(update={"packing": False}), one.seed)
        assert (got[0].steps, got[0].examples, got[0].tokens) == (alone.steps, alone.examples, alone.tokens)
        assert got[0].loss == pytest.approx(alone.loss, rel=1e-5)
        for name, value in llama.read().items():
            moved = np.abs(value - one.start[name]).max()
            np.testing.assert_allclose(got[1][name], value, rtol=1e-5, atol=1e-5 * moved + 1e-7, err_msg=name)
    llama.write(start)


def test_no_more_places_than_padding_takes() -> None:
    """Every text once, as many rows for each group, none too full; and little of it is padding."""
    draw, shares = np.random.default_rng(0), []
    for _ in range(200):
        most = int(draw.integers(8, 65))
        groups = [
            draw.integers(1, most + 1, draw.integers(1, 20)).tolist() for _ in range(draw.integers(1, 4))
        ]
        plans = rows_of(groups, most)
        padded = max(map(len, groups)) * max(map(max, groups))
        if plans is None:
            continue
        assert len({len(rows) for rows in plans}) == 1
        for lengths, rows in zip(groups, plans, strict=True):
            assert sorted(text for row in rows for text in row) == list(range(len(lengths)))
        width = max(
            sum(g[text] for text in row) for g, rows in zip(groups, plans, strict=True) for row in rows
        )
        assert width <= most and len(plans[0]) * width <= padded
        if len(groups) == 1 and len(groups[0]) >= 8:
            shares.append(1 - sum(groups[0]) / (len(plans[0]) * width))
    assert len(shares) > 20 and np.mean(shares) < 0.1


def test_texts_without_padding_stay_as_they_are(llama: TunableModel) -> None:
    encoded = texts_of(llama.base, (6, 6, 6))
    one, other = encoded.collate([0, 1, 2]), in_rows(encoded).collate([0, 1, 2])
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_positions_begin_anew_and_padding_has_none() -> None:
    owners = torch.tensor([[0, 0, 0, 2, 3, 3], [1, 1, 4, -1, -1, -1]])
    said = arguments(owners, "mask", torch.float32)
    assert said["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 0, 0, 0]]
    seen = said["attention_mask"][:, 0] == 0
    assert seen[0].sum(1).tolist() == [1, 2, 3, 1, 1, 2] and seen[1].sum(1).tolist() == [1, 2, 1, 1, 2, 3]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "data.task = 'classify'"),
        ({"data__task": "causal-lm", "method__adapter": {"kind": "prefix"}}, "kind = 'prefix'"),
        (
            {
                "data__task": "causal-lm",
                "method__train__private": {"max_grad_norm": 1.0, "noise_multiplier": 4.0, "sample_rate": 0.1},
            },
            "method.train.private",
        ),
        (
            {"data__task": "causal-lm", "method": {"type": "sfprompt", "train": {"packing": True}}},
            "split model",
        ),
    ],
)
def test_recipes_that_cannot_pack(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    tree = small.tree(tmp_path, tmp_path / "rows.jsonl", **changes)
    tree["method"]["train"]["packing"] = True
    with pytest.raises(FedtuneError, match=r"C104: found .*packing") as refused:
        small.config.parse(tree)
    assert said in str(refused.value)


def test_a_run_says_so_before_its_first_round(data: Path, tmp_path: Path) -> None:
    model = make(FAMILIES["Mamba"], tmp_path / "model")
    recipe = small.recipe(
        model, data, data__task="causal-lm", method__adapter={"kind": "full"}, method__train__packing=True
    )
    with pytest.raises(FedtuneError, match=r"M306: found method\.train\.packing with a MambaForCausalLM"):
        small.workspace_of(recipe)


def test_encoded_rows_know_the_longest_that_they_could_be(workspace: Any) -> None:
    assert workspace.encoded("instruct").max_length == 16
    assert replace(workspace.encoded("causal"), tokens=1).max_length == 16
