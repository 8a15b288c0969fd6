"""Bases in 4 and 8 bits: the codes are the papers', gradients are those of the weights that the codes stand
for, and a base is known by its checkpoint."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fedtune.errors import FedtuneError
from fedtune.model import quantised as q
from fedtune.model.base import Base, load
from fedtune.model.export import load_adapter, save_adapter, save_merged
from fedtune.model.fit import fit
from fedtune.model.generate import Question, generated
from fedtune.model.memory_plan import plan, weightless
from fedtune.model.quantised import quantised
from fedtune.model.score import score
from fedtune.model.settings import ModelSettings, TrainSettings
from fedtune.model.tunable import TunableModel, attach, detach
from tests import small, tiny
from tests.tables import adapter_of

LOADS = ("4bit", "8bit")


# --- the codes ---


def nf4(weight: np.ndarray) -> np.ndarray:
    """QLoRA's numbers, as its paper says: by distance to each level, number by number."""
    made = np.empty(weight.size, np.float32)
    flat = weight.reshape(-1)
    levels = q.LEVELS.numpy()
    for start in range(0, flat.size, 64):
        block = flat[start : start + 64]
        scale = torch.tensor(np.abs(block).max()).bfloat16().float().item()
        nearest = [min(range(16), key=lambda i, x=x: abs(float(x) / scale - float(levels[i]))) for x in block]
        made[start : start + 64] = levels[nearest] * np.float32(scale)
    return made.reshape(weight.shape)


def int8(weight: np.ndarray) -> np.ndarray:
    rows = np.abs(weight).max(1, keepdims=True) / np.float32(127)
    return (np.rint(weight / rows) * rows).astype(np.float32)


@pytest.mark.parametrize(("bits", "oracle"), [(4, nf4), (8, int8)])
@pytest.mark.parametrize("shape", [(8, 16), (5, 13), (3, 64)])
def test_weights_are_the_papers(bits: int, oracle: Any, shape: tuple[int, int]) -> None:
    weight = torch.from_numpy(np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32))
    layer = torch.nn.Linear(shape[1], shape[0])
    layer.weight.data = weight
    made = q.QuantisedLinear(layer, bits, torch.float32, torch.device("cpu")).dequantize()
    assert made.dtype == torch.float32 and np.array_equal(made.numpy(), oracle(weight.numpy()))


def test_the_levels_are_quantiles_of_a_normal_distribution() -> None:
    """QLoRA, appendix E: 8 levels below zero and 9 above, zero shared, ends at an offset's quantile."""
    from statistics import NormalDist

    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = [NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    below = [-NormalDist().inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    levels = np.sort([*above, 0.0, *below])
    assert np.allclose(levels / levels.max(), q.LEVELS.numpy(), atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_cannot_be_divided_stays(bits: int) -> None:
    layer = torch.nn.Linear(80, 3)
    layer.weight.data.zero_()
    layer.weight.data[1] = 1.0
    made = q.QuantisedLinear(layer, bits, torch.float32, torch.device("cpu"))
    assert torch.equal(made.dequantize()[0], torch.zeros(80)) and torch.equal(
        made.dequantize()[1], torch.ones(80)
    )


# --- a base in so many bits ---


def bytes_of(base: Base) -> str:
    """Of all that a base holds, codes and scales as well."""
    total = hashlib.sha256()
    tensors = {**dict(base.net.named_parameters()), **dict(base.net.named_buffers())}
    for name, value in sorted(tensors.items()):
        total.update(
            name.encode() + value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return total.hexdigest()


def dequantised(base: Base) -> Base:
    """The same base with the weights that its codes stand for in ordinary layers."""
    for name, layer in quantised(base.net).items():
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight.data, plain.bias = layer.dequantize(torch.float32), layer.bias
        base.net.set_submodule(name, plain)
    base.net.requires_grad_(False)
    base.__post_init__()
    return base


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize("model", ["causal", "encoder"])
def test_linear_layers_are_rounded_and_nothing_else(workspace: Any, model: str, how: str) -> None:
    base, whole = workspace.load(model, load=how), workspace.base(model)
    layers = quantised(base.net)
    assert len(layers) == (14 if model == "causal" else 13)  # two blocks; and BERT's pooler
    assert base.size == whole.size and base.load == how and base.fresh == whole.fresh
    for name, value in whole.weights.items():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            assert torch.equal(base.weights[name], value)
        else:
            far = (layer.dequantize() - value).abs().max() / value.abs().max()
            assert 0 < far < (0.16 if how == "4bit" else 0.005)


@pytest.mark.parametrize("how", LOADS)
@pytest.mark.parametrize(
    ("model", "more"), [("causal", {}), ("encoder", {}), ("causal", {"dora": True, "rslora": True})]
)
def test_gradients_are_those_of_the_weights_that_the_codes_stand_for(
    workspace: Any, model: str, more: dict[str, Any], how: str
) -> None:
    encoded = workspace.encoded(model)
    adapter = adapter_of(kind="lora", rank=2, **more)
    found = []
    for base in (workspace.load(model, load=how), dequantised(workspace.load(model, load=how))):
        tunable = attach(base, adapter, 3)
        draw = np.random.default_rng(1)
        tunable.write(
            {n: v + draw.normal(0, 0.1, v.shape).astype(np.float32) for n, v in tunable.read().items()}
        )
        out = tunable.net(**encoded.collate([0, 1, 2]))
        out.loss.backward()
        found.append((out.loss.item(), {name: value.grad for name, value in tunable.named.items()}))
    (one, grads), (other, wanted) = found
    assert one == pytest.approx(other, rel=1e-6) and grads.keys() == wanted.keys()
    for name, value in wanted.items():
        assert value is not None and torch.allclose(
            grads[name], value, rtol=1e-4, atol=1e-4 * value.abs().max()
        )


TAKEN = {
    "causal": ("lora", "ia3", "prompt", "prefix", "p-tuning", "adapter", "layernorm", "head"),
    "encoder": ("lora", "ia3", "prompt", "adapter", "layernorm", "head"),
}


@pytest.mark.parametrize(
    ("model", "kind"), [(model, kind) for model, kinds in TAKEN.items() for kind in kinds]
)
def test_kinds_beside_the_base_train_and_leave_its_bytes(workspace: Any, model: str, kind: str) -> None:
    base, encoded = workspace.load(model, load="4bit"), workspace.encoded(model)
    before = bytes_of(base)
    tunable = attach(base, adapter_of(kind=kind), 3)
    first = tunable.read()
    fit(tunable, encoded, TrainSettings(lr=0.01, steps=2, batch=4), seed=5)
    assert any(not np.array_equal(value, first[name]) for name, value in tunable.read().items())
    assert np.isfinite(score(tunable, encoded, 4).loss)
    detach(tunable)
    assert bytes_of(base) == before


def test_every_kind_that_touches_weights_is_refused(tiny_bert: Path, data: Path) -> None:
    from fedtune.model.adapters import ADAPTERS

    beside = {kind for kind, adapter in ADAPTERS.items() if adapter.beside}
    assert beside == {kind for kinds in TAKEN.values() for kind in kinds}
    for kind in sorted(ADAPTERS.keys() - beside):
        with pytest.raises(
            FedtuneError, match=f"C104.*model.load = '4bit' with method.adapter.kind = '{kind}'"
        ):
            small.recipe(tiny_bert, data, model__load="4bit", method__adapter={"kind": kind})


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"method": {"type": "fedkseed", "size": 64, "steps": 2, "batch": 2, "lr": 1e-3}},
            "method.type = 'fedkseed'",
        ),
        ({"method": {"type": "sfprompt", "prompts": 3}}, "method.type = 'sfprompt'"),
        ({"method": {"type": "offsite", "first": 1, "last": 0, "keep": 1.0}}, "method.type = 'offsite'"),
        ({"method__lora_start": "pissa"}, "method.lora_start = 'pissa'"),
        ({"method__lora_start": "olora"}, "method.lora_start = 'olora'"),
    ],
)
def test_what_needs_the_weights_is_refused(
    tiny_bert: Path, data: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(
        FedtuneError, match=f"C104.*model.load = '8bit' with {named}.*set model.load = 'full'"
    ):
        small.recipe(tiny_bert, data, model__load="8bit", **changes)


def test_a_module_of_rounded_weights_is_not_trained_whole(workspace: Any) -> None:
    base = workspace.load("causal", load="8bit")
    with pytest.raises(FedtuneError, match=r"M306.*modules_to_save = 'down_proj'.*which rounds its weights"):
        attach(base, adapter_of(kind="lora", targets=("q_proj",), modules_to_save=("down_proj",)), 0)
    attach(base, adapter_of(kind="lora", targets=("q_proj",), modules_to_save=("lm_head",)), 0)


# --- who it is ---


def stored(folder: Path, place: Path, dtype: torch.dtype) -> Path:
    """The same model with its numbers in a type."""
    shutil.copytree(folder, place)
    net = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    net.save_pretrained(place)
    return place


@pytest.mark.parametrize("type_of_file", [torch.float32, torch.bfloat16])
def test_a_base_is_its_checkpoint_whatever_it_is_held_in(
    tiny_llama: Path, tmp_path: Path, type_of_file: torch.dtype
) -> None:
    name = str(stored(tiny_llama, tmp_path / "model", type_of_file))

    def held(**how: Any) -> Base:
        return load(ModelSettings(name=name, threads=1, device="cpu", **how), "causal-lm", (), 0)

    bases = [held(), held(dtype="bfloat16"), held(load="8bit"), held(load="4bit", dtype="bfloat16")]
    assert len({base.fingerprint for base in bases}) == 1
    assert len({bytes_of(base) for base in bases}) == 4
    rounded = type_of_file == torch.float32
    assert bases[0].fingerprint == bases[0].held_fingerprint
    assert (bases[0].held_fingerprint != bases[1].held_fingerprint) == rounded
    assert all(base.is_called(bases[0].fingerprint) for base in bases)
    typed = bases[1].typed_fingerprint
    assert bases[1].is_called(typed) and not bases[0].is_called(typed)


def test_codes_do_not_depend_on_the_type_of_the_rest(workspace: Any) -> None:
    one, other = (
        workspace.load("causal", load="4bit"),
        workspace.load("causal", load="4bit", dtype="bfloat16"),
    )
    assert one.net.lm_head.weight.dtype == torch.float32 and other.net.lm_head.weight.dtype == torch.bfloat16
    for name, layer in quantised(one.net).items():
        same = quantised(other.net)[name]
        assert torch.equal(layer.weight, same.weight) and torch.equal(layer.scales, same.scales)


def test_a_checkpoint_that_is_quantised_already_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    place = shutil.copytree(tiny_llama, tmp_path / "gptq")
    about = json.loads((place / "config.json").read_text())
    about["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (place / "config.json").write_text(json.dumps(about))
    with pytest.raises(FedtuneError, match=r"M301.*quantised already \(gptq\).*model.load = '4bit'"):
        load(ModelSettings(name=str(place), threads=1), "causal-lm", (), 0)


# --- around it ---


def test_auto_takes_the_most_bits_that_fit(workspace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sum(value.numel() for value in workspace.base("causal").weights.values()) * 4
    for memory, wanted in ((2 * whole, "full"), (2 * whole - 2, "8bit"), (whole, "4bit"), (10, "4bit")):
        monkeypatch.setattr(q, "memory_of", lambda device, memory=memory: memory)
        assert workspace.load("causal", load="auto").load == wanted
        assert weightless(workspace.settings("causal", load="auto"), "causal-lm", 0).load == wanted


@pytest.mark.parametrize("how", ["full", *LOADS])
def test_the_plan_knows_the_bytes(workspace: Any, how: str) -> None:
    base = workspace.load("causal", load=how)
    held = [*base.net.parameters(), *(layer.scales for layer in quantised(base.net).values())]
    planned = plan(workspace.settings("causal", load=how), adapter_of(kind="lora", rank=2), "causal-lm", 0)
    assert planned.weights_bytes == sum(value.numel() * value.element_size() for value in held)
    tunable = attach(base, adapter_of(kind="lora", rank=2), 0)
    assert (planned.trainable, planned.total) == (tunable.trainable, tunable.total)
    assert planned.peak(TrainSettings(), 4, 16) and planned.peak(None, 4, 16)


def test_a_merged_model_is_made_on_the_whole_checkpoint(workspace: Any, tmp_path: Path) -> None:
    tunables = [attach(base, adapter_of(kind="lora", rank=2), 3) for base in both(workspace)]
    draw = np.random.default_rng(1)
    values = {
        name: draw.normal(0, 0.1, value.shape).astype(np.float32)
        for name, value in tunables[0].read().items()
    }
    nets = []
    for number, tunable in enumerate(tunables):
        tunable.write(values)
        before = bytes_of(tunable.base)
        save_merged(tunable, tmp_path / str(number), "card")
        assert bytes_of(tunable.base) == before
        nets.append(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / str(number)))
    for (name, one), other in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other), name


def both(workspace: Any) -> list[Base]:
    return [workspace.load("causal", load="full"), workspace.load("causal", load="4bit")]


def test_an_adapter_moves_between_loads(workspace: Any, tmp_path: Path) -> None:
    whole, four = both(workspace)
    made = attach(four, adapter_of(kind="lora", rank=2), 3)
    fit(made, workspace.encoded("causal"), TrainSettings(lr=0.01, steps=1, batch=4), seed=5)
    save_adapter(made, tmp_path / "adapter", "base", "card")
    values = made.read()
    for base in (whole, four):
        read = load_adapter(base, tmp_path / "adapter").read()
        assert read.keys() == values.keys() and all(np.array_equal(read[n], v) for n, v in values.items())


def test_a_generative_model_writes(workspace: Any) -> None:
    tunable: TunableModel = attach(workspace.load("instruct", load="4bit"), adapter_of(kind="lora"), 0)
    asked = Question(tunable.base.tokenizer("the red fox")["input_ids"], "runs")
    assert len(generated(tunable, [asked], 4)) == 1


def test_gpt2s_layers_are_turned_round(tmp_path: Path) -> None:
    """Its Conv1D holds columns before rows."""
    fast = transformers.AutoTokenizer.from_pretrained(tiny.llama(tmp_path / "tokens"))
    fast.save_pretrained(tmp_path / "gpt2")
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 1}
    name = tiny.save(
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(vocab_size=len(fast), **shape),
        tmp_path / "gpt2",
    )
    whole, eight = (
        load(ModelSettings(name=str(name), threads=1, load=how), "causal-lm", (), 0)
        for how in ("full", "8bit")
    )
    layer, own = eight.net.transformer.h[0].attn.c_attn, whole.net.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (16, 48)
    assert torch.allclose(layer.dequantize(), own.weight.T, atol=float(own.weight.abs().max()) / 250)
    shapes = [
        {n: v.shape for n, v in attach(one, adapter_of(kind="lora"), 0).named.items()}
        for one in (whole, eight)
    ]
    assert shapes[0] == shapes[1]
