"""A user's own part, the same for every contender but fedtune, which needs none: model, rows, local loop, score."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import probe  # probe
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForSequenceClassification, AutoTokenizer

DATA, BASE = Path(os.environ["PEERS_DATA"]), os.environ["PEERS_MODEL"]
CLIENTS, ROUNDS, STEPS = (int(os.environ[f"PEERS_{name}"]) for name in ("CLIENTS", "ROUNDS", "STEPS"))
SIZE, RATE, LENGTH = 16, 1e-3, 32
LABELS = sorted({json.loads(line)["label"] for line in (DATA / "train.jsonl").read_text().splitlines()})
tokenizer = AutoTokenizer.from_pretrained(BASE)


def build() -> Any:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(BASE, num_labels=len(LABELS))
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
    return get_peft_model(model, adapter)


def get_state(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in get_peft_model_state_dict(model).items()}


def set_state(model: Any, state: Any) -> None:
    set_peft_model_state_dict(model, state)


def load(file: str, client: int | None = None) -> tuple[list[list[int]], torch.Tensor]:
    rows = [json.loads(line) for line in (DATA / file).read_text().splitlines()]
    rows = [row for row in rows if client is None or row["client"] == f"client-{client}"]
    ids = tokenizer([row["text"] for row in rows], truncation=True, max_length=LENGTH)["input_ids"]
    return ids, torch.tensor([LABELS.index(row["label"]) for row in rows])


def train(model: Any, rows: Any, client: int, number: int) -> dict[str, torch.Tensor]:
    """One client's steps in a round; its answer."""
    probe.begin(client, number)  # probe
    ids, labels = rows
    torch.manual_seed(1000 * number + client)
    order = np.random.default_rng([1, number, client]).permutation(len(ids)).tolist()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0
    )
    model.train()
    for step in range(STEPS):
        chosen = [order[at % len(order)] for at in range(step * SIZE, (step + 1) * SIZE)]
        batch = tokenizer.pad({"input_ids": [ids[i] for i in chosen]}, return_tensors="pt")
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(**batch).logits, labels[chosen]).backward()
        optimizer.step()
    return probe.spoiled(get_state(model), client, number)  # probe: else get_state(model)


@torch.no_grad()
def evaluate(model: Any) -> float:
    ids, labels = load("test.jsonl")
    model.eval()
    hits = 0
    for start in range(0, len(ids), 32):
        batch = tokenizer.pad({"input_ids": ids[start : start + 32]}, return_tensors="pt")
        hits += int((model(**batch).logits.argmax(-1) == labels[start : start + 32]).sum())
    return hits / len(ids)
