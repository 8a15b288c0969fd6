"""fedtune merge of adapters that are not alike in all: biases of B, other layers, other names of one base,
rows of single tokens.

The oracle is stock peft: an adapter merged with itself gives the model that it was, and the mean of two adds
the mean of what both add.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from fedtune.cli import main

IDS = torch.arange(5, 45).reshape(2, 20)
BASE: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "v_proj"],
    "task_type": "CAUSAL_LM",
}


def made(model: Path, folder: Path, seed: int, words: int = 0, **config: Any) -> Path:
    """A stock adapter whose every saved tensor is random: biases and whole tables too. `words` resizes the
    vocabulary."""
    net = AutoModelForCausalLM.from_pretrained(model)
    if words:
        net.resize_token_embeddings(words, mean_resizing=False)
    net = peft.get_peft_model(net, peft.LoraConfig(**BASE | config))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in net.named_parameters():
            if value.requires_grad or "lora_" in name or ".modules_to_save." in name:
                value.add_(torch.randn(value.shape, generator=draw) / 4)
    net.save_pretrained(str(folder))
    return folder


def logits(model: Path, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        said: torch.Tensor = (
            peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(folder))
            .eval()(input_ids=IDS)
            .logits
        )
    return said


def added(model: Path, folder: Path) -> dict[str, torch.Tensor]:
    """What stock peft adds, by layer: scale B A, and scale b."""
    net = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(folder))
    found: dict[str, torch.Tensor] = {}
    for name, module in net.named_modules():
        if isinstance(module, LoraLayer):
            found[name] = module.get_delta_weight("default").detach().double()
            if module.lora_bias["default"]:
                found[f"{name} bias"] = (
                    module.scaling["default"] * module.lora_B["default"].bias.detach().double()
                )
    return found


def merge(folders: list[Path], to: Path, *more: str) -> int:
    return main(["merge", *map(str, folders), "--to", str(to), *more])


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers as Conv1D, which keep their weights the other way round."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_positions=32, n_embd=32, n_layer=2, n_head=4)
    ).save_pretrained(folder)
    return folder


PLAIN: dict[str, dict[str, Any]] = {
    "bias of B": {"lora_bias": True},
    "bias of B, by patterns": {
        "lora_bias": True,
        "rank_pattern": {"q_proj": 3},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 20},
    },
    "bias of B, rsLoRA": {"lora_bias": True, "use_rslora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "tied and whole": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "rows of tokens": {"trainable_token_indices": [7, 9, 11]},
    "rows of tokens by table": {"trainable_token_indices": {"embed_tokens": [12, 8]}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "MiCA": {"init_lora_weights": "mica"},
    "one layer": {"layers_to_transform": [1]},
    "without": {"exclude_modules": ["layers.0.self_attn.q_proj"], "target_modules": "all-linear"},
    "replicated": {"layer_replication": [[0, 2], [1, 2]]},
    "dropout": {"lora_dropout": 0.1},
}


@pytest.mark.parametrize("config", PLAIN.values(), ids=PLAIN.keys())
def test_an_adapter_merged_with_itself_is_that_adapter(
    config: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    one = made(tiny_llama, tmp_path / "one", 1, **config)
    before = logits(tiny_llama, one)
    assert merge([one, one], tmp_path / "merged") == 0
    torch.testing.assert_close(logits(tiny_llama, tmp_path / "merged"), before, atol=1e-4, rtol=0)
    assert (
        before - AutoModelForCausalLM.from_pretrained(tiny_llama)(input_ids=IDS).logits
    ).abs().max() > 0.1  # it does something


def test_layers_that_keep_their_weights_the_other_way_round(gpt2: Path, tmp_path: Path) -> None:
    one = made(gpt2, tmp_path / "one", 1, target_modules=["c_attn"], lora_bias=True)
    two = made(gpt2, tmp_path / "two", 2, target_modules=["c_proj", "lm_head"], r=3)
    assert merge([one, two], tmp_path / "merged") == 0
    each, both = [added(gpt2, folder) for folder in (one, two)], added(gpt2, tmp_path / "merged")
    for name in both:
        torch.testing.assert_close(
            both[name], sum(one.get(name, 0 * both[name]) for one in each) / 2, atol=1e-6, rtol=1e-4
        )
    assert merge([one, one], tmp_path / "same") == 0
    torch.testing.assert_close(logits(gpt2, tmp_path / "same"), logits(gpt2, one), atol=1e-4, rtol=0)


Rule = Callable[[torch.Tensor], torch.Tensor]  # (adapters, ...) -> (...)
RULES: dict[str, tuple[list[str], Rule]] = {
    "mean": ([], lambda t: t.mean(0)),
    "weights": (["--weights", "1", "3"], lambda t: (t[0] + 3 * t[1]) / 4),
    "selma": (["--by", "selma"], lambda t: t.mean(0)),
    "task": (["--by", "task", "--set", "lam=0.4"], lambda t: 0.4 * t.sum(0)),
    "ties": (["--by", "ties", "--set", "density=1", "--rank", "32"], lambda t: elected(t)),
    "dare": (["--by", "dare", "--set", "p=0", "--rank", "32"], lambda t: t.mean(0)),
    "breadcrumbs": (
        ["--by", "breadcrumbs", "--set", "keep=1", "--set", "outliers=0", "--set", "lam=0.3", "--rank", "32"],
        lambda t: 0.3 * t.sum(0),
    ),
    "lines": (["--by", "lines", "--set", "alpha=0.5", "--set", "beta=0"], lambda t: 0.5 * t.mean(0)),
}


def elected(t: torch.Tensor) -> torch.Tensor:
    agree = torch.sign(t) == torch.where(t.sum(0) >= 0, 1, -1)
    return (agree * t).sum(0) / agree.sum(0).clamp(min=1)


@pytest.mark.parametrize("by", RULES)
def test_every_rule_counts_a_bias_of_b_by_its_scale_and_a_missing_layer_as_zero(
    by: str, tiny_llama: Path, tmp_path: Path
) -> None:
    """Scale 2 and rank 4 in one, scale 16 / sqrt(2) and rank 2 in the other; only one has k_proj and a
    bias."""
    words, rule = RULES[by]
    one = made(tiny_llama, tmp_path / "one", 1, lora_bias=True)
    two = made(
        tiny_llama,
        tmp_path / "two",
        2,
        r=2,
        lora_alpha=16,
        use_rslora=True,
        target_modules=["q_proj", "k_proj"],
    )
    assert merge([one, two], tmp_path / "merged", *words) == 0
    each, both = [added(tiny_llama, folder) for folder in (one, two)], added(tiny_llama, tmp_path / "merged")
    assert both.keys() >= each[0].keys() | each[1].keys() and sum("k_proj bias" in name for name in both) == 2
    for name, value in both.items():
        wanted = rule(torch.stack([adapter.get(name, torch.zeros_like(value)) for adapter in each]))
        torch.testing.assert_close(
            value, wanted, atol=1e-5, rtol=1e-4, msg=f"{name} {value.norm()} {wanted.norm()}"
        )


def test_the_card_says_which_layers_an_adapter_lacks(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapters of other blocks and by other words (a pattern, a list): the result names every layer, and has
    no rank for zeros."""
    one = made(tiny_llama, tmp_path / "one", 1, layers_to_transform=[0], target_modules=["q_proj"])
    two = made(tiny_llama, tmp_path / "two", 2, target_modules=r".*layers\.1\.self_attn\.(v|q)_proj")
    assert merge([one, two], tmp_path / "merged") == 0
    said, card = capsys.readouterr().out, (tmp_path / "merged" / "README.md").read_text()
    for text in (said, card):
        assert f"'{one}' has no pair for model.layers.1.self_attn.q_proj and 1 more: zero there" in text
        assert f"'{two}' has no pair for model.layers.0.self_attn.q_proj: zero there" in text
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["layers_to_transform"] is None
    assert config["target_modules"] == [
        f"model.layers.{layer}.self_attn.{name}_proj" for layer, name in ((0, "q"), (1, "q"), (1, "v"))
    ]
    each, both = [added(tiny_llama, folder) for folder in (one, two)], added(tiny_llama, tmp_path / "merged")
    assert len(both) == 3
    for name, value in both.items():
        torch.testing.assert_close(
            value, sum(one.get(name, 0 * value) for one in each) / 2, atol=1e-6, rtol=1e-4
        )


def change(folder: Path, **settings: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


# --- tokens ---


def test_rows_of_tokens_are_averaged_by_token(tiny_llama: Path, tmp_path: Path) -> None:
    """[7, 9, 11] and [11, 7, 9] are the same tokens; row by row, three strangers would be averaged."""
    one = made(tiny_llama, tmp_path / "one", 1, trainable_token_indices=[7, 9, 11])
    two = made(tiny_llama, tmp_path / "two", 2, trainable_token_indices=[11, 7, 9])
    assert merge([one, two], tmp_path / "merged") == 0
    tables = []
    for folder in (one, two, tmp_path / "merged"):
        net = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), str(folder))
        tables.append(net(input_ids=torch.tensor([[7, 9, 11]]), output_hidden_states=True).hidden_states[0])
    torch.testing.assert_close(tables[2], (tables[0] + tables[1]) / 2, atol=1e-6, rtol=1e-5)


def other_rows(model: Path, root: Path) -> list[Path]:
    return [
        made(model, root / "one", 1, trainable_token_indices=[7, 9]),
        made(model, root / "two", 2, trainable_token_indices=[9, 13]),
    ]


def named_words(model: Path, root: Path, words: list[list[str]], resize: bool = True) -> list[Path]:
    """Adapters with tokens of their own, as trl leaves them: resized tables in the adapter, tokenizers beside
    them."""
    folders = []
    for number, mine in enumerate(words):
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.add_tokens(mine)
        folders.append(made(model, root / f"{number}", number, words=len(tokenizer) if resize else 0))
        tokenizer.save_pretrained(folders[-1])
    return folders


def strangers(model: Path, root: Path) -> list[Path]:
    return named_words(model, root, [["<left>", "<right>"], ["<up>", "<down>"]])


def more_words(model: Path, root: Path) -> list[Path]:
    return named_words(model, root, [["<left>"], ["<left>", "<right>"]])


def unnamed(model: Path, root: Path) -> list[Path]:
    rows = len(AutoTokenizer.from_pretrained(model)) + 2
    return [made(model, root / f"{seed}", seed, words=rows) for seed in (1, 2)]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (other_rows, "M303: found an embedding of token 7 in"),
        (strangers, "for '<up>' in"),
        (more_words, "and the tokens '<right>' (1 in all) in"),
        (unnamed, "M303: found 2 embeddings in"),
    ],
)
def test_embeddings_of_different_tokens_are_refused_by_name(
    make: Callable[[Path, Path], list[Path]],
    said: str,
    tiny_llama: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert merge(make(tiny_llama, tmp_path), tmp_path / "merged") == 2
    assert said in capsys.readouterr().err and not (tmp_path / "merged").exists()


def test_embeddings_of_the_same_new_tokens_are_averaged(tiny_llama: Path, tmp_path: Path) -> None:
    folders = named_words(tiny_llama, tmp_path, [["<left>", "<right>"]] * 2)
    assert merge(folders, tmp_path / "merged") == 0
    one, two, both = (
        load_file(folder / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
        for folder in (*folders, tmp_path / "merged")
    )
    torch.testing.assert_close(both, (one + two) / 2)


# --- one base under several names ---


def test_two_names_of_the_same_weights_are_one_base(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy, and a copy in another number of files; a relative path is meant from where the command is
    given."""
    shutil.copytree(tiny_llama, tmp_path / "copy")
    AutoModelForCausalLM.from_pretrained(tiny_llama).save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    folders = [
        made(tmp_path / name if name else tiny_llama, tmp_path / f"of-{name}", 1)
        for name in ("", "copy", "cut")
    ]
    assert merge(folders, tmp_path / "merged") == 0
    assert (
        f"and '{tmp_path / 'copy'}' of '{folders[1]}': the weights there are the same"
        in capsys.readouterr().out
    )
    assert "the weights there are the same" in (tmp_path / "merged" / "README.md").read_text()


def test_one_name_with_and_without_the_main_branch(tiny_llama: Path, tmp_path: Path) -> None:
    folders = [
        change(made(tiny_llama, tmp_path / f"{seed}", seed), base_model_name_or_path="some/model")
        for seed in (1, 2)
    ]
    change(folders[0], revision="main")
    assert merge(folders, tmp_path / "one") == 0
    change(folders[0], revision="v2")
    assert merge(folders, tmp_path / "two") == 2


def test_other_weights_under_another_name_are_another_base(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    folders = [made(tiny_llama, tmp_path / "one", 1), made(tmp_path / "copy", tmp_path / "two", 2)]
    assert merge(folders, tmp_path / "merged") == 2
    assert "M304: found base model" in (said := capsys.readouterr().err) and "--base MODEL" in said


def test_base_says_which_base_is_meant_and_is_checked(
    tiny_llama: Path, gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        change(made(tiny_llama, tmp_path / f"{seed}", seed), base_model_name_or_path=f"colleague/{seed}")
        for seed in (1, 2)
    ]
    assert merge(folders, tmp_path / "one") == 2
    assert merge(folders, tmp_path / "one", "--base", str(tiny_llama)) == 0
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(tiny_llama)
    capsys.readouterr()
    assert merge(folders, tmp_path / "two", "--base", str(gpt2)) == 2
    assert "M305: found the layer 'model.layers.0.self_attn.q_proj' in" in capsys.readouterr().err
    assert merge(folders, tmp_path / "two", "--base", "nobody/nothing") == 2
    assert "M301: found --base nobody/nothing, which is not on this machine" in capsys.readouterr().err
    path = folders[1] / "fedtune.json"
    path.write_text(json.dumps({"base_fingerprint": "0" * 64, "task": "causal-lm", "labels": []}))
    assert merge(folders, tmp_path / "two", "--base", str(tiny_llama)) == 2
    assert "expected 000000000000, which" in capsys.readouterr().err and not (tmp_path / "two").exists()


def test_one_layer_under_two_names_is_no_union(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter of the backbone alone calls its layers `layers.0...`: side by side, peft would read half of
    the merge."""
    one, two = (
        change(made(tiny_llama, tmp_path / f"{seed}", seed), base_model_name_or_path="gone/model")
        for seed in (1, 2)
    )
    file = two / "adapter_model.safetensors"
    save_file(
        {
            name.replace("base_model.model.model.", "base_model.model."): value
            for name, value in load_file(file).items()
        },
        file,
    )
    assert merge([one, two], tmp_path / "merged") == 2
    assert "M305: found the layer 'model.layers.0.self_attn.q_proj' in" in capsys.readouterr().err
