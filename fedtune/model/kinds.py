"""One function a kind: puts the adapter on the network and names the tensors that are trained.

peft supplies lora, ia3, prefix, p-tuning, layernorm and the shallow prompt of texts; bias, head, full, the bottleneck and
deep prompts are ours (see `blocks`). Names are peft's file names, or the network's own.
"""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.errors import FedtuneError
from fedtune.hf.config import LM_TASKS
from fedtune.model import blocks
from fedtune.model.base import Base
from fedtune.model.settings import AdapterSettings

Named = dict[str, nn.Parameter]
PEFT_TASK = {"classify": "SEQ_CLS", "causal-lm": "CAUSAL_LM", "instruct": "CAUSAL_LM", "image-classify": None}
KEYS_AND_VALUES = ("key", "k_proj", "value", "v_proj", "query_key_value", "c_attn", "qkv", "Wqkv")


def lora(base: Base, s: AdapterSettings) -> tuple[Any, Named]:
    """Hu et al. 2021. A is Kaiming-uniform from the seed, B is zero: the first state is the base itself."""
    return with_peft(
        base,
        peft.LoraConfig(
            r=s.rank,
            lora_alpha=s.alpha,
            lora_dropout=s.dropout,
            target_modules=targets(base, s),
            use_rslora=s.rslora,
            use_dora=s.dora,
            **common(base, s.modules_to_save),
        ),
    )


def ia3(base: Base, s: AdapterSettings) -> tuple[Any, Named]:
    """Liu et al. 2022: scales on keys, values and the inner activation of the feed-forward part.

    all-linear means just those; a linear that narrows outside the attention is taken for the second half of a feed-forward part.
    """
    wanted = [name for name in targets(base, s) if s.targets != ("all-linear",) or name.rpartition(".")[2] in KEYS_AND_VALUES or narrows(base, name)]
    if not wanted:
        raise FedtuneError(
            "M306", f"no key, value or feed-forward layer that 'ia3' knows in {base.name}", "names of layers to scale", "set method.adapter.targets"
        )
    return with_peft(
        base, peft.IA3Config(target_modules=wanted, feedforward_modules=[name for name in wanted if narrows(base, name)], **common(base, s.modules_to_save))
    )


def layernorm(base: Base, s: AdapterSettings) -> tuple[Any, Named]:
    """Zhao et al. 2023: gains and offsets of every normalisation layer."""
    norms = [name for name, module in base.net.named_modules() if re.search(r"(Layer|RMS)Norm$", type(module).__name__) and not in_head(base, name)]
    if not norms:
        raise FedtuneError("M306", f"no normalisation layer in {base.name}", "a model with LayerNorm or RMSNorm", "choose another method.adapter.kind")
    return with_peft(base, peft.LNTuningConfig(target_modules=norms, **common(base)))


def prompt(base: Base, s: AdapterSettings) -> tuple[Any, Named]:
    """Lester et al. 2021 through peft, started from rows of the vocabulary; or our own prompts (deep, images, generative classifiers).

    A generative classifier reads the last token that is not padding, which peft's prompts hide from it (they replace ids by embeddings).
    """
    if s.deep or base.task == "image-classify" or (base.task == "classify" and not blocks.is_encoder(base)):
        return base.net, blocks.add_prompts(base, s.tokens, s.deep) | head_parameters(base)
    return with_peft(base, peft.PromptTuningConfig(num_virtual_tokens=s.tokens, prompt_tuning_init="SAMPLE_VOCAB", **sizes(base), **common(base)))


def p_tuning(base: Base, s: AdapterSettings) -> tuple[Any, Named]:
    """Liu et al. 2021: prompts from a small network; the network travels while training, its output alone is exported."""
    if base.task == "image-classify" or (base.task == "classify" and not blocks.is_encoder(base)):
        raise unfit(base, "p-tuning", "a text encoder or a causal language model", 'choose kind = "prompt"')
    width = sizes(base)["token_dim"]
    return with_peft(base, peft.PromptEncoderConfig(num_virtual_tokens=s.tokens, encoder_hidden_size=width, **sizes(base), **common(base)))


def prefix(base: Base, s: AdapterSettings) -> tuple[Any, Named]:
    """Li and Liang 2021: keys and values before every block's own; needs a model that takes a cache."""
    if base.task == "image-classify" or blocks.is_encoder(base):
        raise unfit(base, "prefix", "a decoder, which takes a cache of keys and values", 'choose kind = "prompt" with deep = true')
    return with_peft(base, peft.PrefixTuningConfig(num_virtual_tokens=s.tokens, **common(base)))


def bias(base: Base, s: AdapterSettings) -> tuple[Any, Named]:
    """BitFit (Ben Zaken et al. 2021): every parameter named bias, and the task head."""
    own = {name for name in base.weights if name.rpartition(".")[2] == "bias" and not in_head(base, name)}
    if not own:
        raise unfit(base, "bias", "a model whose layers have biases", "choose another method.adapter.kind")
    named = opened(base, own) | head_parameters(base)
    for module in base.net.modules():  # a norm wants gain and offset in one type; a linear's are brought together by autocast
        gain = module._parameters.get("weight")
        if gain is not None and gain.ndim == 1 and module._parameters.get("bias") is not None:
            module._parameters["weight"] = nn.Parameter(gain.detach().float(), requires_grad=False)
    return base.net, named


def head(base: Base, s: AdapterSettings) -> tuple[Any, Named]:
    """The task head alone; for language models the output layer, if it is not tied to the embeddings."""
    if base.task not in LM_TASKS:
        return base.net, head_parameters(base)
    output = base.net.get_output_embeddings()
    if output.weight is base.net.get_input_embeddings().weight:
        raise unfit(base, "head", "an output layer of its own (here it is tied to the embeddings)", "choose another method.adapter.kind")
    own = {id(value) for value in output.parameters()}
    return base.net, opened(base, {name for name, value in base.weights.items() if id(value) in own})


def full(base: Base, s: AdapterSettings) -> tuple[Any, Named]:
    """Every parameter, or those that a pattern names, tied ones once; costs a float32 copy of them while attached. Raises M302."""
    for pattern in s.only:
        if not fnmatch.filter(base.weights, pattern):
            some = ", ".join(sorted(base.weights)[:3])
            raise FedtuneError("M302", f"the pattern '{pattern}', which no parameter of {base.name} fits", f"names such as {some}", "correct the pattern")
    chosen = {name for name in base.weights if not s.only or in_head(base, name) or any(fnmatch.fnmatchcase(name, pattern) for pattern in s.only)}
    return base.net, opened(base, chosen)


def adapter(base: Base, s: AdapterSettings) -> tuple[Any, Named]:
    """Houlsby et al. 2019, as in FedPEFT's code: one bottleneck after every block, shared by all blocks or one each."""
    return base.net, blocks.add_bottleneck(base.net, s.reduction, s.shared, base.device) | head_parameters(base)


BUILD: dict[str, Callable[[Base, AdapterSettings], tuple[Any, Named]]] = {
    "lora": lora,
    "ia3": ia3,
    "layernorm": layernorm,
    "prompt": prompt,
    "p-tuning": p_tuning,
    "prefix": prefix,
    "bias": bias,
    "head": head,
    "full": full,
    "adapter": adapter,
}


# --- what the kinds share ---------------------------------------------------------------------------------------


def common(base: Base, whole: tuple[str, ...] = ()) -> dict[str, Any]:
    """Settings of every peft config: the task, the head that travels with the adapter, and other modules that are trained whole. Raises M302, M306."""
    for name in whole:
        found = [path for path, _ in base.net.named_modules() if path == name or path.endswith("." + name)]
        if not found:
            some = ", ".join(sorted({path.rpartition(".")[2] for path, _ in base.net.named_modules() if path})[:8])
            raise FedtuneError("M302", f"the module '{name}' to save, which {base.name} does not have", f"names such as {some}", "correct modules_to_save")
        tied = base.net.get_output_embeddings()
        embeddings = base.net.get_input_embeddings()
        if tied is not None and tied.weight is embeddings.weight and any(base.net.get_submodule(path) in (tied, embeddings) for path in found):
            found_ = f"modules_to_save = '{name}' with {base.name}, whose output layer is tied to its embeddings"
            raise FedtuneError("M306", found_, "a module with weights of its own", 'leave it out, or choose kind = "full"')
    return {"task_type": PEFT_TASK[base.task], "modules_to_save": [*heads(base), *whole] or None}


def sizes(base: Base) -> dict[str, int]:
    """What peft's prompts ask of a model; it guesses them for some models only (not for DistilBERT)."""
    text = base.net.config.get_text_config()
    return {"token_dim": base.net.get_input_embeddings().weight.shape[1], "num_layers": text.num_hidden_layers, "num_attention_heads": text.num_attention_heads}


def with_peft(base: Base, config: Any) -> tuple[Any, Named]:
    """Wrap the network with peft; names are those of peft's own adapter file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about inference with a fresh head, which the federation trains
        net = peft.get_peft_model(base.net, config)
    named = {file_name(name): value for name, value in net.named_parameters() if value.requires_grad}
    if isinstance(config, (peft.PromptTuningConfig, peft.PrefixTuningConfig)):  # p-tuning's file holds what its network says, not the network
        named["prompt_embeddings"] = named.pop("prompt_encoder.embedding.weight")
    return net, named


def file_name(name: str) -> str:
    """peft's parameter name -> the key in its adapter_model.safetensors.

    >>> file_name("base_model.model.classifier.modules_to_save.default.weight")
    'base_model.model.classifier.weight'
    >>> file_name("base_model.model.q_proj.lora_A.default.weight")
    'base_model.model.q_proj.lora_A.weight'
    """
    name = name.replace(".modules_to_save.default", "").replace("prompt_encoder.default.", "prompt_encoder.")
    name = re.sub(r"\.lora_magnitude_vector\.default\.weight$", ".lora_magnitude_vector", name)
    return re.sub(r"\.default(?=\.[^.]+$|$)", "", name)


def plain(name: str) -> str:
    """The network's own name for a tensor that peft copied, so that copies are not counted as additions."""
    return re.sub(r"^base_model\.(model\.(?=.*\.))?", "", name).replace(".ln_tuning_layers", "")


def heads(base: Base) -> tuple[str, ...]:
    """Modules that start fresh: the children of a classifier beside its backbone, and a pooler that the pretrained file lacks.

    Whatever is fresh is trained and travels; a frozen random layer would be lost in an export.
    """
    children = [] if base.task in LM_TASKS else list(base.net.named_children())
    beside = [name for name, module in children if name != base.net.base_model_prefix and any(True for _ in module.parameters())]
    missing = sorted({".".join(name.split(".")[:2]) for name in base.fresh if name.partition(".")[0] not in beside})
    return (*beside, *missing)


def in_head(base: Base, name: str) -> bool:
    return any(name == head or name.startswith(head + ".") for head in heads(base))


def head_parameters(base: Base) -> Named:
    """The task head, opened for training."""
    return opened(base, {name for name in base.weights if in_head(base, name)})


def opened(base: Base, names: set[str]) -> Named:
    """Replace parameters by float32 copies to train, everywhere they are tied; the base's own stay untouched."""
    copies = {id(base.weights[name]): nn.Parameter(base.weights[name].detach().to(torch.float32, copy=True)) for name in names}
    for module in base.net.modules():
        for key, value in module._parameters.items():
            if id(value) in copies:
                module._parameters[key] = copies[id(value)]
    return {name: copies[id(base.weights[name])] for name in names}


def linears(base: Base) -> list[str]:
    """Names of the linear layers that peft adapts (quantised ones as well), without the task head and the output layer.

    torch's own attention module reads the weights of its output layer without calling it, so an adapter there would never be seen.
    """
    output = base.net.get_output_embeddings()
    uncalled = {id(module.out_proj) for module in base.net.modules() if isinstance(module, nn.MultiheadAttention)}
    found = [(name, module) for name, module in base.net.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    return [name for name, module in found if module is not output and id(module) not in uncalled and not in_head(base, name)]


def targets(base: Base, s: AdapterSettings) -> list[str]:
    """Full names of the modules that the settings mean: all-linear or endings of names, in the last blocks or all. Raises M302."""
    known = [name for name in linears(base) if not any(name == whole or name.endswith("." + whole) for whole in s.modules_to_save)]
    if not known:
        raise unfit(base, s.kind, "a model with linear layers (torch's Linear, or GPT-2's Conv1D) outside its task head", "choose another method.adapter.kind")
    found: set[str] = set()
    for target in s.targets:
        hits = known if target == "all-linear" else [name for name in known if name == target or name.endswith("." + target)]
        if not hits:
            have = sorted({name.rpartition(".")[2] for name in known})
            raise FedtuneError(
                "M302",
                f"the target '{target}', which no linear layer of {base.name} is called",
                f"names such as {', '.join(have[:8])}",
                'correct method.adapter.targets or use ["all-linear"]',
            )
        found |= set(hits)
    blocks_of = {name: int(number.group(1)) for name in known if (number := re.search(r"\.(\d+)\.", name))}
    count = max(blocks_of.values(), default=-1) + 1
    if s.last > count:
        raise FedtuneError("M302", f"method.adapter.last = {s.last}", f"at most the {count} blocks of {base.name}", "lower it, or 0 for all")
    first = count - s.last if s.last else 0
    return [name for name in known if name in found and blocks_of.get(name, 0 if not s.last else -1) >= first]


def narrows(base: Base, name: str) -> bool:
    """Whether a linear layer outside the attention has more inputs than outputs: the second half of a feed-forward part."""
    layer = base.net.get_submodule(name)
    if isinstance(layer, Conv1D):
        columns, rows = layer.weight.shape  # (in, out)
    else:
        rows, columns = layer.out_features, layer.in_features  # a quantised weight has another shape
    return bool(columns > rows) and not re.search(r"attn|attention", name)


def unfit(base: Base, kind: str, expected: str, do: str) -> FedtuneError:
    return FedtuneError("M306", f"kind '{kind}' with a {type(base.net).__name__}", expected, do)
