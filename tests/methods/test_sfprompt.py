"""SFPrompt on tiny real models: split training is training, whatever the wire; what is measured at the cut is
what the formula says."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.cli import main
from fedtune.config import Recipe
from fedtune.errors import FedtuneError
from fedtune.events import ClientDone
from fedtune.methods.sfprompt import load
from fedtune.model.adapters.wrap import file_name
from fedtune.model.fit import step_batches
from fedtune.model.loss import summed_loss
from fedtune.rng import seed_of, stream
from fedtune.runtime.workspace import Workspace
from fedtune.schema import digest
from fedtune.types import Tensors
from tests import small, tiny
from tests.marks import mostly_thorough
from tests.methods.sfprompt_data import write_images, write_sentences

TRAIN = {"lr": 0.01, "steps": 2, "batch": 4, "accumulate": 2}
SPLIT = {"type": "sfprompt", "prompts": 3, "prompt_lr": 0.05, "codec": "fp32", "train": TRAIN}
IMAGES = {"data__source": "images", "data__task": "image-classify", "data__client_test_share": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentences(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def recipe_of(model: Path, data: Path, changes: dict[str, Any] | None = None, **more: Any) -> Recipe:
    if data.is_dir():
        more = {**IMAGES, **more}
    return small.recipe(model, data, method={**SPLIT, **(changes or {})}, **more)


# --- the same numbers as without a cut ---


CUTS = [
    {"slim": "auto"},
    {"slim": "off"},
    {"position": "input", "head": 0},
    {"head": 0, "tail": 1},
    {"lora_rank": 2},
    {"lora_rank": 2, "head": 0, "tail": 1},
]


@pytest.mark.parametrize("changes", mostly_thorough(CUTS, CUTS[::2]), ids=str)
def test_one_client_is_ordinary_training_of_the_uncut_model_to_the_bit(
    changes: dict[str, Any], tiny_vit: Path, images: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_vit, images, {"head": 1, **changes}, partition__clients=1)
    _, result, _ = small.play(recipe, tmp_path)
    assert result["state_sha256"] == digest(plain_training(recipe))


def plain_training(recipe: Any) -> Tensors:
    """The whole ViT, prompts put in by a hook in front of block k, AdamW made anew every round: no cut, no
    messages, nothing of fedtune.split."""
    workspace, _ = small.workspace_of(recipe)
    first = workspace.tunable.read()
    vit = tiny_vit_of(recipe, workspace)
    prompts = torch.nn.Parameter(torch.from_numpy(first["prompts"]))
    with_prompts(vit, recipe.method.head, prompts)
    if recipe.method.lora_rank:
        vit = with_lora(vit, first)
    named = {
        "prompts": prompts,
        **{
            file_name(name): value
            for name, value in vit.named_parameters()
            if file_name(name) in first and "original_module" not in name
        },
    }
    assert named.keys() == first.keys()
    with torch.no_grad():
        for name, value in named.items():
            value.copy_(torch.from_numpy(first[name]))
    for value in vit.parameters():
        value.requires_grad_(any(value is one for one in named.values()))
    encoded, train = workspace.train(0), recipe.method.train
    for number in range(1, recipe.rounds + 1):
        seed = seed_of("split training", seed_of("train", recipe.seed, number, 0))
        tail = [named[name] for name in sorted(named) if name != "prompts"]
        optimizer = torch.optim.AdamW(
            [{"params": tail, "lr": train.lr}, {"params": [prompts], "lr": recipe.method.prompt_lr}],
            weight_decay=0.0,
        )
        for micro in step_batches(len(encoded), train, seed):
            optimizer.zero_grad()
            batches = [encoded.collate(numbers) for numbers in micro]
            for batch in batches:
                logits = vit(pixel_values=batch["pixel_values"]).logits
                (
                    torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
                    / sum(len(one["labels"]) for one in batches)
                ).backward()
            optimizer.step()
    return {name: named[name].detach().numpy() for name in sorted(named)}


def tiny_vit_of(recipe: Recipe, workspace: Workspace) -> Any:
    """The model as transformers gives it, with the head that the run's seed makes."""
    import transformers

    torch.manual_seed(seed_of("head", recipe.seed))
    vit = transformers.ViTForImageClassification.from_pretrained(recipe.model.name, num_labels=2).eval()
    np.testing.assert_array_equal(
        vit.classifier.weight.detach().numpy(),
        next(v for n, v in workspace.tunable.read().items() if n.endswith("classifier.weight")),
    )
    return vit


def with_lora(vit: Any, first: Tensors) -> Any:
    """Plain peft on the whole model, where the tensors' names say."""
    import peft

    modules = [
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        for name in first
        if name.endswith(".lora_A.weight")
    ]
    return peft.get_peft_model(
        vit, peft.LoraConfig(r=2, lora_alpha=4, target_modules=modules, modules_to_save=["classifier"])
    ).eval()


def with_prompts(vit: Any, k: int, prompts: Any) -> None:
    def insert(module: Any, args: Any) -> Any:
        return (
            torch.cat([args[0][:, :1], prompts.expand(len(args[0]), -1, -1), args[0][:, 1:]], 1),
            *args[1:],
        )

    vit.base_model.layers[k].register_forward_pre_hook(insert)


def test_texts_with_padding_learn_the_same_slim_or_not(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """BERT's rows of a class token alone; only the order of float32 sums differs."""
    slim, whole = (
        small.play(recipe_of(tiny_bert, data, {"slim": s}), tmp_path / s)[0] for s in ("auto", "off")
    )
    assert farthest(state_of(slim), state_of(whole)) < 1e-5


def farthest(a: Tensors, b: Tensors) -> float:
    return max(float(np.abs(a[name] - b[name]).max()) for name in a.keys() | b.keys())


def state_of(folder: Any, number: int = 3) -> Tensors:
    from fedtune.runtime.checkpoints import load_state

    return load_state(folder, number, "")[0].shared


def test_a_language_model_sends_only_rows_with_labels_down_and_learns_the_same(
    tiny_llama: Path, tmp_path: Path
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": text, "response": text[:12]}) + "\n" for text in tiny.SENTENCES * 4)
    )
    told, states = {}, {}
    for slim in ("auto", "off"):
        recipe = recipe_of(
            tiny_llama, path, {"slim": slim, "codec": "fp32"}, data__task="instruct", data__max_length=40
        )
        folder, _, events = small.play(recipe, tmp_path / slim)
        told[slim] = [e.metrics for e in events if isinstance(e, ClientDone)]
        states[slim] = state_of(folder)
    assert farthest(states["auto"], states["off"]) < 1e-5
    assert all(
        a["cut_down_bytes"] < 0.4 * b["cut_down_bytes"]
        for a, b in zip(told["auto"], told["off"], strict=True)
    )


def test_a_tied_vocabulary_stays_frozen(tmp_path: Path) -> None:
    """It is the frozen head's embeddings too."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny.SENTENCES * 4))
    (tmp_path / "tied").mkdir()
    workspace, _ = small.workspace_of(
        recipe_of(tiny.llama(tmp_path / "tied", tie=True), path, data__task="causal-lm")
    )
    assert sorted(workspace.tunable.named) == ["model.norm.weight", "prompts"]


def test_the_installed_bench_is_the_uncut_model_with_prompts(tiny_vit: Path, images: Path) -> None:
    workspace, _ = small.workspace_of(recipe_of(tiny_vit, images, {"head": 1}))
    vit = copy.deepcopy(tiny_vit_of(workspace.recipe, workspace))
    with_prompts(vit, 1, workspace.tunable.named["prompts"])
    batch = workspace.train(0).collate(range(5))
    with torch.no_grad():
        want = vit(pixel_values=batch["pixel_values"]).logits
        assert torch.equal(summed_loss(workspace.tunable, batch)[1], want)


# --- the body elsewhere ---


def methods_round(recipe: Recipe) -> Any:
    from fedtune.types import Round

    return Round(1, recipe.seed, (0,))


# --- bytes ---


def through_cut(recipe: Recipe, root: Path) -> list[tuple[int, float, float]]:
    """(round, up, down) of client 0."""
    _, _, events = small.play(recipe, root)
    return [
        (e.round, e.metrics["cut_up_bytes"], e.metrics["cut_down_bytes"])
        for e in events
        if isinstance(e, ClientDone) and e.client == 0
    ]


# --- phases ---


def test_the_papers_phases_are_named_and_measured(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_bert, data, {"preset": "sfprompt-paper"})
    s: Any = recipe.method
    assert (s.head, s.local_update, s.pruning, s.keep) == (1, 2, "el2n", 0.5)
    assert type(s).model_validate_json(s.model_dump_json()) == s  # resolved, it means the same
    method = s.build(3, recipe.aggregate)
    assert (
        method.facts.title
        == "sfprompt / k = 1, 0 in the tail, 3 prompts / local update x2, el2n 0.5, split training"
    )
    _, _, events = small.play(recipe, tmp_path)
    told = [e.metrics for e in events if isinstance(e, ClientDone)]
    assert all(set(one) == set(method.facts.metrics) and -1 <= one["el2n_rank"] <= 1 for one in told)
    assert all(one["body_loss_before"] != one["body_loss_after"] for one in told)


def test_losses_through_the_body_are_those_of_the_uncut_model(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """Before phase 1 of round 1 the model is the first state; of a client with 24 examples, eight are the
    probe."""
    recipe = recipe_of(tiny_bert, data, {"local_update": 1})
    workspace, link = small.workspace_of(recipe)
    drawn = (
        stream("split probe", seed_of("train", recipe.seed, 1, 1))
        .permutation(len(workspace.train(1)))[:8]
        .tolist()
    )
    with torch.no_grad():
        want = float(summed_loss(workspace.tunable, workspace.train(1).collate(drawn))[0]) / 8
    update = link.method.verbs["train"].work(
        workspace.client_with(1, {}), link.method.start(workspace.tunable).shared, methods_round(recipe)
    )
    assert update.metrics["body_loss_before"] / update.weight == pytest.approx(want, rel=1e-5)


def test_pruning_sends_fewer_examples(tiny_vit: Path, images: Path, tmp_path: Path) -> None:
    train = {"lr": 0.01, "steps": 0, "epochs": 1, "batch": 4}
    whole, half = (
        through_cut(
            recipe_of(tiny_vit, images, {"head": 1, "train": train, **more}), tmp_path / str(len(more))
        )[0][1]
        for more in ({}, {"pruning": "random", "keep": 0.5})
    )
    assert 0.45 < half / whole < 0.6


# --- around a run ---


def test_prompts_and_tail_come_back_from_an_export(
    tiny_vit: Path, images: Path, tmp_path: Path, tiny_bert: Path, data: Path
) -> None:
    recipe = recipe_of(tiny_vit, images, {"head": 1})
    folder, _, _ = small.play(recipe, tmp_path)
    workspace, link = small.workspace_of(recipe)
    batch = workspace.train(0).collate(range(4))
    first = summed_loss(workspace.tunable, batch)[1].detach()
    tunable = load(workspace.base, folder.adapter)
    logits = summed_loss(tunable, batch)[1].detach()
    assert not torch.equal(first, logits)
    link.method.install(replace(link.method.start(tunable), shared=state_of(folder)), tunable)
    assert torch.equal(summed_loss(tunable, batch)[1], logits)
    other, _ = small.workspace_of(recipe_of(tiny_bert, data))
    with pytest.raises(FedtuneError, match="M304"):
        load(other.base, folder.adapter)


def test_training_alone_is_the_training_of_a_single_client(tiny_vit: Path, images: Path) -> None:
    workspace, link = small.workspace_of(recipe_of(tiny_vit, images, {"head": 1}))
    start = link.method.start(workspace.tunable)
    results = []
    for _ in range(2):
        link.method.alone(workspace.tunable, workspace.train(0), start, 5)
        results.append(digest(workspace.tunable.read()))
    assert results[0] == results[1] != digest(start.shared)


def test_leak_test_prints_what_was_recovered(
    tiny_vit: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import tomli_w

    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(small.tree(tiny_vit, images, method={**SPLIT, "codec": "fp16"}, **IMAGES)))
    assert main(["leak-test", str(path), "--examples", "2", "--steps", "200"]) == 0
    told = capsys.readouterr().out
    assert told.count("gradient descent on pixels: recovered") == 2 and "of 2 images" in told
    assert "not from the body's operator" in told
    assert main(["leak-test", str(path), "--client", "9"]) == 2
    assert "C103" in capsys.readouterr().err
