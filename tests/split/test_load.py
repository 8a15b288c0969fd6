"""Loading one part reads that part alone, and gives what cutting the whole model gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

from fedtune.errors import FedtuneError
from fedtune.split import selftest
from fedtune.split.cut import ROLES, Cut, Side
from fedtune.split.load import load_part
from fedtune.split.parts import Part
from tests.marks import mostly_thorough
from tests.split.families import FAMILIES, LAYERS, WIDTH, batch, make

AUTO = {
    "lm": T.AutoModelForCausalLM,
    "text": T.AutoModelForSequenceClassification,
    "last": T.AutoModelForSequenceClassification,
    "image": T.AutoModelForImageClassification,
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    torch.set_num_threads(1)
    T.logging.set_verbosity_error()
    T.utils.logging.disable_progress_bar()


def size(net: Any) -> int:
    return sum(value.numel() for value in net.parameters())


def check(name: str, folder: Path, k: int = 1, m: int = 3, **saved: Any) -> None:
    whole, inputs = make(name), batch(name)
    whole.save_pretrained(folder, **saved)
    given = {key: value for key, value in inputs.items() if key != "labels"}
    reference, auto = Part(whole, Cut(k, m)), AUTO[FAMILIES[name][0]]
    parts = {role: load_part(str(folder), auto, Cut(k, m), [role]) for role in ROLES}
    tied = (
        whole.get_output_embeddings() is not None
        and whole.get_output_embeddings().weight is whole.get_input_embeddings().weight
    )
    doubled = whole.get_input_embeddings().weight.numel() if tied else 0
    assert sum(size(part.net) for part in parts.values()) == size(whole) + doubled
    for role, part in parts.items():
        wanted = reference.parameters(role)
        got = dict(part.net.named_parameters())
        assert set(got) == set(wanted), role
        assert all(
            torch.equal(got[key], wanted[key]) and not got[key].requires_grad and not got[key].is_meta
            for key in got
        )
        assert not any(value.is_meta for value in part.net.buffers())
        assert type(part.net) is type(whole)
    with torch.no_grad():
        hidden, side = parts["head"].head(given)
        assert torch.equal(hidden, reference.head(given)[0])
        behind = parts["body"].body(hidden, side)
        assert torch.equal(behind, reference.body(hidden, side))
        assert torch.equal(parts["tail"].tail(behind, side)[1], reference.tail(behind, side)[1])
    card = selftest.make(reference)
    for part in parts.values():
        selftest.check(part, card)


@pytest.mark.parametrize(
    "name", mostly_thorough(FAMILIES, ["llama", "gpt2", "bert", "vit", "llama classifier"])
)
def test_every_part_is_loaded_alone(name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


@pytest.mark.parametrize(("k", "m"), [(0, LAYERS), (1, LAYERS)])
@pytest.mark.parametrize("name", mostly_thorough(["llama", "bert", "vit", "gpt2"], ["llama", "bert"]))
def test_parts_without_blocks(name: str, k: int, m: int, tmp_path: Path) -> None:
    check(name, tmp_path, k, m)


@pytest.mark.parametrize("name", ["llama", "vit"])
def test_a_file_in_shards(name: str, tmp_path: Path) -> None:
    check(name, tmp_path, max_shard_size="30KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3


def test_head_and_tail_of_a_client_are_one_network(tmp_path: Path) -> None:
    whole, inputs = make("gpt2"), batch("gpt2")
    whole.save_pretrained(tmp_path)
    client = load_part(str(tmp_path), AUTO["lm"], Cut(1, 3), ["head", "tail"])
    assert client.net.lm_head.weight is client.net.transformer.wte.weight  # tied as in the whole model
    assert size(client.net) == size(whole) - sum(
        v.numel() for v in Part(whole, Cut(1, 3)).parameters("body").values()
    )
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    short = make("gpt2")
    short.transformer.h = torch.nn.ModuleList([short.transformer.h[0], *short.transformer.h[3:]])
    with torch.no_grad():
        assert torch.equal(client.shortcut(given), short(**given).logits)
        assert torch.equal(
            client.net(**given).logits, short(**given).logits
        )  # its plain forward is the shortcut
    with pytest.raises(RuntimeError, match="holds head, tail, not the body"):
        client.body(torch.zeros(1, 2, WIDTH), Side())


def test_a_fresh_head_is_that_of_the_whole_model(tmp_path: Path) -> None:
    """transformers draws a head that the file lacks; the draw may not depend on which parts are loaded."""
    make("bert").bert.save_pretrained(tmp_path)
    config = T.AutoConfig.from_pretrained(tmp_path, num_labels=7)
    one = load_part(str(tmp_path), AUTO["text"], Cut(1, 3), ["tail"], config=config, seed=5)
    all_parts = load_part(str(tmp_path), AUTO["text"], Cut(1, 3), ROLES, config=config, seed=5)
    other = load_part(str(tmp_path), AUTO["text"], Cut(1, 3), ["tail"], config=config, seed=6)
    assert one.net.classifier.weight.shape == (7, WIDTH)
    assert torch.equal(one.net.classifier.weight, all_parts.net.classifier.weight)
    assert not torch.equal(one.net.classifier.weight, other.net.classifier.weight)
    assert one.fresh == {"classifier.weight", "classifier.bias"}
    selftest.check(other, selftest.make(all_parts))  # what is fresh is not compared


def test_a_file_without_blocks_is_refused(tmp_path: Path) -> None:
    """transformers would fill them with noise."""
    make("bert", num_hidden_layers=3).save_pretrained(tmp_path)
    config = T.AutoConfig.from_pretrained(tmp_path, num_hidden_layers=LAYERS)
    load_part(str(tmp_path), AUTO["text"], Cut(1, 3), ["head", "body"], config=config)
    with pytest.raises(FedtuneError, match=r"S702: found files at .* without 'bert.encoder.layer.3"):
        load_part(str(tmp_path), AUTO["text"], Cut(1, 3), ["tail"], config=config)


SCRIPT = """
import sys, psutil, torch, transformers
from fedtune.split.cut import Cut
from fedtune.split.load import load_part
torch.set_num_threads(1)
me = psutil.Process()
load_part(sys.argv[2], transformers.AutoModelForCausalLM, Cut(1, 3), ["tail"])  # warm: imports and caches
before = me.memory_info().rss
part = load_part(sys.argv[1], transformers.AutoModelForCausalLM, Cut(1, 11), sys.argv[3].split(","))
sum(float(v.sum()) for v in part.net.parameters())  # every page is touched
print(sum(v.numel() * 4 for v in part.net.parameters()), me.memory_info().rss - before)
"""


@pytest.mark.thorough
def test_a_client_never_holds_the_body(tmp_path: Path) -> None:
    """12 blocks of 2.9 MB, of which the client keeps two: its memory grows by its own bytes, not by the 35 MB
    of the model."""
    small, large = tmp_path / "small", tmp_path / "large"
    make("llama").save_pretrained(small)
    make(
        "llama", hidden_size=256, intermediate_size=704, num_hidden_layers=12, num_key_value_heads=4
    ).save_pretrained(large)
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(large), str(small), "head,tail"],
        capture_output=True,
        text=True,
        check=True,
    )
    own, grown = (int(number) for number in out.stdout.split())
    total = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert own < total / 5
    assert grown < own + total / 4
