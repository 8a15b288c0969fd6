"""The [method] table of type = "sfprompt", and which of its settings cannot go together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from fedtune.methods.base import TrainedTable
from fedtune.methods.head_start import HeadStart
from fedtune.model.rates import rates_of, with_rates

# Every phase of the paper. What its text leaves open (epochs of phase 1, the share) is as in the only public
# re-implementation, or mild.
PAPER: dict[str, Any] = {"head": 1, "local_update": 2, "pruning": "el2n", "keep": 0.5}


class SFPromptSettings(TrainedTable):
    """[method] type = "sfprompt"."""

    type: Literal["sfprompt"] = "sfprompt"
    preset: Literal["", "sfprompt-paper"] = ""
    """sfprompt-paper switches all phases of the paper on where the table says nothing else: head 1,
    local_update 2, pruning el2n, keep 0.5."""
    head: int = Field(1, ge=0)
    """k: blocks that the client runs in front of the cut, frozen; 0 is the embeddings alone."""
    tail: int = Field(0, ge=0)
    """Blocks that the client runs and trains behind the body, before the last norm and the task head."""
    prompts: int = Field(8, ge=0, le=4096)
    """P: soft prompts; 0 trains the tail alone."""
    lora_rank: int = Field(0, ge=0)
    """LoRA of this rank (alpha twice it) in the client's blocks, whose own weights and last norm then stay
    frozen; 0 trains the tail itself.

    With LoRA in a head, whole gradients come down to it, and nothing of it can be cached."""
    position: Literal["cut", "input"] = "cut"
    """Where prompts enter: at the cut, so that the head's answer to an example never changes and stays small
    to send; or behind the embeddings."""
    prompt_lr: float = Field(1e-2, gt=0)
    """Learning rate of the prompts; the tail's is method.train.lr."""
    matrix_lr: Literal["auto"] | Annotated[float, Field(gt=0, le=100)] = "auto"
    """With tail = 0: learning rate of pretrained matrices behind the last block, such as a pooler or a
    vocabulary's own. auto: as full tuning's where method.train.lr is auto, which then fits the last norm;
    method.train.lr where that is a number."""
    local_update: int = Field(0, ge=0)
    """Phase 1: epochs of training straight from head to tail, without the body; 0 leaves it out. Each round
    says what it did to the loss through the body."""
    pruning: Literal["none", "random", "el2n"] = "none"
    """Phase 2: which examples go through the cut: all, a random share, or those that the shortcut finds
    hardest (not always better than random)."""
    keep: float = Field(1.0, gt=0, le=1)
    """Share of the examples that pruning keeps."""
    slim: Literal["auto", "off"] = "auto"
    """auto: only rows that the tail reads come down, and the prompts' gradient comes summed; off: whole
    hidden states both ways. Same gradients."""
    cache_smashed: bool = False
    """Let the body service hold the head's answers, in memory, so that each goes up once."""
    codec: Literal["fp16", "fp32", "bf16", "int8"] = "fp16"
    """Numbers on the stream; a tensor that suffers too much is sent in the next finer one."""
    window: int = Field(8, ge=1, le=256)
    """Micro-batches in flight; those of one optimiser step are method.train.accumulate."""
    merge: bool = False
    """On real sites: let the body service take micro-batches of several clients in one pass. Faster, but the
    last bits of a result then depend on
    who was served together."""
    head_start: HeadStart = "auto"
    """As for fedpeft. The features come through the body,
    once more than training needs."""

    @model_validator(mode="before")
    @classmethod
    def of_preset(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("preset") == "sfprompt-paper":
            return PAPER | given
        return given

    @property
    def trains(self) -> str:
        """What kind of adapter the tail's training is like, for its learning rate."""
        return "lora" if self.lora_rank else "full" if self.tail else "prompt"

    def with_rates(self, width: int) -> Self:
        rated = super().with_rates(width)
        if self.matrix_lr != "auto" or self.train.lr != "auto" or self.trains != "prompt":
            return rated
        full = with_rates(self.train, rates_of("full"), width)
        return rated.model_copy(update={"matrix_lr": full.lr})

    @property
    def head_learns(self) -> bool:
        return bool(self.lora_rank and self.head)

    @property
    def shortcut(self) -> bool:
        """Whether something is computed straight from head to tail."""
        return bool(self.local_update) or self.pruning == "el2n"

    @property
    def phases(self) -> tuple[str, ...]:
        """What a round consists of, in order."""
        share = f"{self.pruning} {self.keep:g}" if self.pruning != "none" else ""
        return tuple(
            filter(
                None,
                (f"local update x{self.local_update}" if self.local_update else "", share, "split training"),
            )
        )

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        yield from super().conflicts(recipe)
        if recipe.data.task == "preference":
            yield (
                "data.task = 'preference' with a split model",
                "a client that holds the model, as a loss on pairs needs",
                "set method.type = 'fedpeft'",
            )
        if not self.train.objective.plain:
            yield (
                f"method.train.objective.loss = '{self.train.objective.loss}' with a split model",
                "cross-entropy",
                "remove [method.train.objective]",
            )
        for key in [*self.train.reads_otherwise, *["packing"] * self.train.packing]:
            yield f"method.train.{key} with a split model", "training on rows as they are", "remove it"
        if reads := [one.by for one in recipe.select if one.reads]:
            yield (
                f"[[select]] by = '{reads[0]}' with a split model",
                "clients that hold the whole model",
                "remove it",
            )
        if self.pruning == "none" and self.keep < 1:
            yield (
                f"method.keep = {self.keep} with method.pruning = 'none'",
                "keep = 1",
                "set method.pruning = 'random'",
            )
        if self.pruning != "none" and self.keep == 1:
            yield (
                f"method.pruning = '{self.pruning}' with method.keep = 1",
                "a share below 1",
                "set method.keep, or pruning = 'none'",
            )
        if self.lora_rank and not self.head and not self.tail:
            yield (
                f"method.lora_rank = {self.lora_rank} with head = 0 and tail = 0",
                "a block on the client's side",
                "set method.head or method.tail",
            )
        if self.head_learns and self.cache_smashed:
            yield (
                "method.cache_smashed with LoRA in the head",
                "a head that does not change",
                "set method.head = 0 or cache_smashed = false",
            )
        if self.position == "input" and self.cache_smashed:
            yield (
                "method.cache_smashed with method.position = 'input'",
                "position = 'cut', where prompts do not change what the head says",
                "change one",
            )
        if self.slim == "off" and self.cache_smashed:
            yield "method.cache_smashed with method.slim = 'off'", "slim = 'auto'", "remove one of them"
        if "prompt_lr" in self.model_fields_set and not self.prompts:
            yield (
                "method.prompt_lr with method.prompts = 0",
                "at least one prompt",
                "remove it, or set method.prompts",
            )
        if "matrix_lr" in self.model_fields_set and self.trains != "prompt":
            other = f"tail = {self.tail}" if self.tail else f"lora_rank = {self.lora_rank}"
            yield (
                f"method.matrix_lr with {other}",
                "tail = 0 without LoRA, whose other weights are vectors",
                "set method.train.lr instead",
            )
        if self.train.checkpointing:
            yield (
                "method.train.checkpointing with method.type = 'sfprompt'",
                "no checkpointing, because the body recomputes anyway and the tail is small",
                "remove it",
            )
        if recipe.aggregate.rule != "mean":
            yield (
                f"aggregate.rule = '{recipe.aggregate.rule}' with method.type = 'sfprompt'",
                "mean",
                "remove [aggregate]",
            )


def figures_of(s: SFPromptSettings) -> tuple[str, ...]:
    """Names of what a client tells of its round."""
    local = ("body_loss_before", "body_loss_after") if s.local_update else ()
    return (
        "loss",
        "cut_up_bytes",
        "cut_down_bytes",
        *local,
        *(("el2n_rank",) if s.pruning == "el2n" else ()),
    )
