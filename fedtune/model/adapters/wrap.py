"""How peft puts an adapter on a network, and what it calls the tensors."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fedtune.errors import FedtuneError
from fedtune.model.adapters.layers import heads
from fedtune.model.base import Base
from fedtune.model.quantised import quantised
from fedtune.types import LM_TASKS

Named = dict[str, nn.Parameter]
ASKED = "_get_base_layer_device_and_dtype"  # of a layer, by peft 0.21
PEFT_TASK = {"classify": "SEQ_CLS", "image-classify": None, **dict.fromkeys(LM_TASKS, "CAUSAL_LM")}


def peft_arguments(base: Base, whole: tuple[str, ...] = ()) -> dict[str, Any]:
    """Settings of every peft config: the task, the head that travels with the adapter, and other modules that
    are trained whole. Raises M302, M306."""
    for name in whole:
        found = [path for path, _ in base.net.named_modules() if path == name or path.endswith("." + name)]
        if not found:
            some = ", ".join(
                sorted({path.rpartition(".")[2] for path, _ in base.net.named_modules() if path})[:8]
            )
            raise FedtuneError(
                "M302",
                f"the module '{name}' to save, which {base.name} does not have",
                f"names such as {some}",
                "correct modules_to_save",
            )
        if any(quantised(base.net.get_submodule(path)) for path in found):
            found_ = f"modules_to_save = '{name}' with model.load = '{base.load}', which rounds its weights"
            raise FedtuneError(
                "M306",
                found_,
                "a module without quantised layers",
                "leave it out, or set model.load = 'full'",
            )
        tied = base.net.get_output_embeddings()
        embeddings = base.net.get_input_embeddings()
        if (
            tied is not None
            and tied.weight is embeddings.weight
            and any(base.net.get_submodule(path) in (tied, embeddings) for path in found)
        ):
            found_ = (
                f"modules_to_save = '{name}' with {base.name}, whose output layer is tied to its embeddings"
            )
            raise FedtuneError(
                "M306", found_, "a module with weights of its own", 'leave it out, or choose kind = "full"'
            )
    return {"task_type": PEFT_TASK[base.task], "modules_to_save": [*heads(base), *whole] or None}


def prompt_sizes(base: Base) -> dict[str, int]:
    """What peft's prompts ask of a model; it guesses them for some models only (not for DistilBERT)."""
    text = base.net.config.get_text_config()
    return {
        "token_dim": base.net.get_input_embeddings().weight.shape[1],
        "num_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
    }


def with_peft(base: Base, config: Any) -> tuple[Any, Named]:
    """Wrap the network with peft; names are those of peft's own adapter file."""
    with warnings.catch_warnings(), unrounded():
        warnings.simplefilter("ignore")  # about inference with a fresh head, which the federation trains
        net = peft.get_peft_model(base.net, config)
    named = {file_name(name): value for name, value in net.named_parameters() if value.requires_grad}
    if isinstance(
        config, (peft.PromptTuningConfig, peft.PrefixTuningConfig)
    ):  # p-tuning's file holds what its network says, not the network
        named["prompt_embeddings"] = named.pop("prompt_encoder.embedding.weight")
    return net, named


@contextmanager
def unrounded() -> Iterator[None]:
    """What is drawn keeps its 32 bits on a base in fewer: peft gives an adapter its layer's device and type,
    and then makes float32 of that. Sites whose bases differ in type start from the same adapter. A release of
    peft that asks for the type in another way goes on rounding."""
    before = DRAWN.set(True)
    try:
        spare_the_type()
        yield
    finally:
        DRAWN.reset(before)


DRAWN = ContextVar("an adapter is being drawn", default=False)  # by this thread, whatever others do


@cache
def spare_the_type() -> None:
    """Let peft's layers ask for the device alone while an adapter is drawn."""
    known = getattr(BaseTunerLayer, ASKED, None)
    if known is None:
        return

    def asked(self: Any, layer: Any) -> tuple[Any, Any]:
        device, dtype = known(self, layer)
        return device, None if DRAWN.get() else dtype

    setattr(BaseTunerLayer, ASKED, asked)


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
