"""A model whose state dict is its adapter, as FLARE's example for language models does."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from task import build


class AdapterModel(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = build()

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", **more: Any) -> Any:
        out = {} if destination is None else destination
        out.update(
            {prefix + name: value.detach() for name, value in get_peft_model_state_dict(self.model).items()}
        )
        return out

    def load_state_dict(self, state: Any, *args: Any, **more: Any) -> None:
        set_peft_model_state_dict(self.model, {name: torch.as_tensor(value) for name, value in state.items()})
