"""The linear layers of a network's body, and what of it is a task head."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.types import LM_TASKS


def heads(net: Any, task: str, fresh: Collection[str]) -> tuple[str, ...]:
    """Modules that start fresh: the children of a classifier beside its backbone, and a pooler that the
    pretrained file lacks, one of whose parameters is in `fresh`.

    Whatever is fresh is trained and travels; a frozen random layer would be lost in an export.
    """
    children = [] if task in LM_TASKS else list(net.named_children())
    beside = [
        name
        for name, module in children
        if name != net.base_model_prefix and any(True for _ in module.parameters())
    ]
    missing = sorted(
        {".".join(name.split(".")[:2]) for name in fresh if name.partition(".")[0] not in beside}
    )
    return (*beside, *missing)


def within(name: str, modules: Sequence[str]) -> bool:
    """Whether a module or parameter of this name is one of the modules, or in one."""
    return any(name == module or name.startswith(module + ".") for module in modules)


def body_linears(net: Any, head: Sequence[str]) -> list[str]:
    """Names of the linear layers that peft adapts (quantised ones as well), without the task head and the
    output layer.

    torch's own attention module reads the weights of its output layer without calling it, so what is put in
    the place of that layer would never be called.
    """
    output = net.get_output_embeddings()
    uncalled = {id(module.out_proj) for module in net.modules() if isinstance(module, nn.MultiheadAttention)}
    return [
        name
        for name, module in net.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
        and module is not output
        and id(module) not in uncalled
        and not within(name, head)
    ]
