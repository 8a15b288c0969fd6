"""A script as a site's operator may write it: a Trainer of its own on a tiny model, with LoRA by peft.

`text` is such a script, for fedtune client --trainer: it knows its model's folder by itself, as the site's
environment does not reach it, and writes where it was started.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

import fedtune

LORA = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "init_lora_weights": True}
ROWS = [{"input_ids": [5, 9, 20 + n, 7, 30 + n], "labels": [-100, 9, 20 + n, 7, 30 + n]} for n in range(8)]


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


class Counted(transformers.TrainerCallback):
    """Notes that a training has ended, beside what it writes."""

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        with open(os.path.join(args.output_dir + ".rounds"), "a") as file:
            file.write(f"{state.global_step}\n")


def trainer(model: str, out: str, alpha: float = 4.0) -> transformers.Trainer:
    transformers.utils.logging.disable_progress_bar()
    net = transformers.AutoModelForCausalLM.from_pretrained(model)
    net = peft.get_peft_model(net, peft.LoraConfig(lora_alpha=alpha, **LORA))
    args = transformers.TrainingArguments(
        out, per_device_train_batch_size=4, max_steps=2, learning_rate=0.01, lr_scheduler_type="constant",
        report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    return transformers.Trainer(net, args, train_dataset=ROWS, data_collator=collate, callbacks=[Counted()])  # type: ignore[arg-type]


def run(model: str, alpha: float = 4.0) -> None:
    """Until fedtune client ends it."""
    mine = trainer(model, "out", alpha)
    fedtune.patch(mine)
    mine.train()


def text(model: Path, alpha: float = 4.0) -> str:
    return f"from tests.deploy import script\nscript.run({str(model)!r}, {alpha})\n"
