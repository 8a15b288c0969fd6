"""The pretrained model and its tokenizer, loaded once a process and never changed: adapters are attached by
`tunable`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from fedtune.errors import FedtuneError
from fedtune.hf.config import AUTO, load_config, locate, position_limit, width_of
from fedtune.hf.draws import own_draws
from fedtune.hf.labels import LabelSet, redraw
from fedtune.hf.pooling import Pooling, choose_pooling, set_pooling
from fedtune.hf.probe import is_causal, padding_side, refuse_conflict
from fedtune.hf.statistics import saved_buffers
from fedtune.hf.tokenizer import fit_tokenizer, load_tokenizer
from fedtune.model.objectives import Preference
from fedtune.model.settings import ModelSettings
from fedtune.panics import panics_as_errors
from fedtune.rng import seed_of
from fedtune.threads import threads_for
from fedtune.types import LM_TASKS

CPU = Path("/proc/cpuinfo")


@dataclass(eq=False)
class Base:
    """A frozen network. `tokenizer` is an image processor for image-classify; `context` is in tokens, None
    for images."""

    net: Any
    tokenizer: Any
    task: str
    labels: tuple[str, ...]
    device: torch.device
    name: str
    context: int | None
    fresh: frozenset[str]  # names of parameters that were not in the pretrained file: the task head
    notes: tuple[str, ...] = ()  # what was decided while loading and should be said
    pad_side: str = "right"  # where batches are padded
    kept_head: bool = False  # the task head came trained from the file
    pooling: Pooling = "own"  # how the task head's vector is made
    causal: bool | None = (
        # whether a text's first tokens are computed without its last ones; None: not tried (images, no
        # weights)
        None
    )
    logits_apart: bool | None = None  # as fedtune.model.loss_pieces found it; None: not asked yet
    fits: dict[str, int] = field(default_factory=dict)  # kept by fedtune.model.device_memory
    attached: Any = None  # the TunableModel that now sits on this base, if any
    part: Any = None  # fedtune.split.parts.Part, where this process holds no more of the network than that
    judge: Preference | None = None  # the loss by which pairs of responses are scored
    weights: dict[str, torch.Tensor] = field(
        init=False, repr=False
    )  # name -> pristine parameter, tied ones once
    buffers: dict[str, torch.Tensor] = field(
        init=False, repr=False
    )  # name -> buffer that the model's file holds, such as running statistics

    def __post_init__(self) -> None:
        self.weights = dict(self.net.named_parameters())
        self.buffers = saved_buffers(self.net)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the pretrained weights (not the fresh head), the buffers of the file and the
        tokenizer, as hex. Computed at first use."""
        total = hashlib.sha256()
        for name in sorted(self.weights.keys() - self.fresh):
            value = self.weights[name].detach().cpu().contiguous()
            total.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
            total.update(value.reshape(-1).view(torch.uint8).numpy().data)
        for name, value in sorted(self.buffers.items()):
            total.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
            total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        total.update(tokenizer_text(self.tokenizer).encode())
        if self.pooling != "own":
            total.update(f"pooling: {self.pooling}".encode())
        return total.hexdigest()

    @cached_property
    def size(self) -> int:
        """Number of parameters of the pristine network, tied ones once."""
        return sum(value.numel() for value in self.weights.values())


def load(settings: ModelSettings, task: str, labels: Sequence[str], seed: int) -> Base:
    """Load model and tokenizer, frozen and in eval mode. A fresh head depends on `seed` only.

    safetensors only and no remote code: nothing from a hub is executed. Raises M301 (not found), M303
    (tokenizer and model do not fit) and
    M306 (an architecture that cannot do the task, or on whose answers padding has an influence).
    """
    prepare_torch(settings)
    device = pick_device(settings.device)
    place = locate(settings.name)
    known: dict[str, Any] = {"revision": settings.revision} if settings.revision else {}
    with (
        reading(settings.name),
        own_draws(seed_of("head", seed)),
    ):  # transformers draws the missing head from torch's generator, on the CPU
        tokenizer = load_tokenizer(place, task, known)
        config, chosen = load_config(place, task, labels, known)
        net, info = AUTO[task].from_pretrained(
            place,
            config=config,
            dtype=dtype_of(settings),
            use_safetensors=True,
            ignore_mismatched_sizes=task not in LM_TASKS,  # a classifier of another label set is replaced
            output_loading_info=True,
            **known,
        )
    fresh = fresh_names(net, info, settings.name)
    if not chosen.kept:
        fresh = redraw_head(net, fresh, seed)
    net.requires_grad_(False).eval().to(device)
    with reading(settings.name):
        pooling, note = choose_pooling(settings.pooling, place, task, chosen.kept, **known)
    said = (*said_of(chosen), *((note,) if note else ()))
    if task == "image-classify" and net.main_input_name != "pixel_values":
        found = f"a {type(net).__name__}, which reads images as {net.main_input_name}"
        raise FedtuneError("M306", found, "a model of pixels, such as ViT or ResNet", "choose another model")
    base = Base(
        net, tokenizer, task, chosen.labels, device, settings.name, None, fresh,
        notes=said, kept_head=chosen.kept, pooling=pooling,
    )  # fmt: skip
    if task != "image-classify":
        fit_text(base, settings.name)
    set_pooling(net, pooling)  # last: the probes look at single tokens
    return base


def fit_text(base: Base, name: str) -> None:
    """Fit tokenizer and network to one another, and try how texts are padded and read. Raises M303, M306."""
    net, tokenizer, task = base.net, base.tokenizer, base.task
    stated = net.config.get_text_config().pad_token_id
    fit_tokenizer(net, tokenizer, name)
    base.context = context_of(net, tokenizer)
    with reading(name):
        refuse_conflict(net, tokenizer, stated, task, base.context, name)
        base.pad_side = padding_side(net, tokenizer, task, base.context, name)
        base.causal = task in LM_TASKS or is_causal(net, tokenizer, base.context)


def redraw_head(net: Any, fresh: frozenset[str], seed: int) -> frozenset[str]:
    """Start those parts of the task head afresh that came from the file; returns the names of all fresh
    parameters."""
    old = {name.partition(".")[0] for name, _ in net.named_parameters() if name not in fresh}
    return fresh | redraw(net, sorted(head_children(net) & old), seed_of("head", seed))


def said_of(chosen: LabelSet) -> tuple[str, ...]:
    return (chosen.note,) if chosen.note else ()


def head_children(net: Any) -> set[str]:
    """The children of a classifier beside its backbone that have parameters; none of a language model."""
    if net.get_output_embeddings() is not None:
        return set()
    return {
        name
        for name, child in net.named_children()
        if name != net.base_model_prefix and any(True for _ in child.parameters())
    }


def fresh_names(net: Any, info: dict[str, Any], name: str) -> frozenset[str]:
    """Parameters that the pretrained file lacks (or has for another label set): a head or pooler may be
    fresh, a backbone may not (M301)."""
    lacking = set(info["missing_keys"]) | {
        entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]
    }
    fresh = frozenset(lacking & dict(net.named_parameters()).keys())
    heads = head_children(net)
    lost = sorted(key for key in fresh if key.partition(".")[0] not in heads and ".pooler." not in key)
    if lost:
        raise FedtuneError(
            "M301",
            f"a model file of {name} without '{lost[0]}' ({len(lost)} parameters)",
            "all weights of the pretrained network",
            "use a complete file of the same architecture",
        )
    return fresh


def context_of(net: Any, tokenizer: Any = None) -> int | None:
    """Longest input in tokens by configuration, tables of positions and tokenizer (where there is one); None
    where nothing limits it."""
    stated = (
        getattr(net.config.get_text_config(), "max_position_embeddings", None),
        position_limit(net),
        getattr(tokenizer, "model_max_length", None),
    )
    return min((int(number) for number in stated if number and 0 < number < 10**9), default=None)


def tokenizer_text(tokenizer: Any) -> str:
    """What the tokenizer is, as canonical JSON: without the padding and truncation state that calls leave
    behind."""
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        known = json.loads(tokenizer.backend_tokenizer.to_str())
        known["truncation"] = known["padding"] = None
        known["chat_template"] = tokenizer.chat_template
    elif hasattr(tokenizer, "get_vocab"):
        known = {"vocabulary": tokenizer.get_vocab(), "chat_template": tokenizer.chat_template}
    else:
        known = {
            name: value
            for name, value in tokenizer.to_dict().items()
            if name not in ("transformers_version", "_processor_class")
        }
    return json.dumps(known, sort_keys=True, default=str)


def pick_device(name: str) -> torch.device:
    """auto means CUDA where there is one. Raises M301 for a device that is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        known = device.type == "cpu" or (
            device.type == "cuda" and (device.index or 0) < torch.cuda.device_count()
        )
    except RuntimeError:
        known = False
    if not known:
        raise FedtuneError(
            "M301",
            f"model.device = '{name}'",
            "auto, cpu, or a CUDA device that this machine has, such as cuda:0",
            "change model.device",
        )
    return device


def dtype_of(settings: ModelSettings) -> torch.dtype:
    """Type of the frozen base. Raises M301 for a device that is not there."""
    if settings.dtype == "auto":
        return torch.bfloat16 if has_bfloat16(pick_device(settings.device)) else torch.float32
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return dtype


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes with bfloat16 itself. Where it does not, a step was 20 times slower than with
    float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    with suppress(OSError):  # another system than Linux
        return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(CPU.read_text().split()))
    return False


def prepare_torch(settings: ModelSettings) -> None:
    """Threads and, on the CPU, deterministic kernels.

    The number of threads is always set: Ray would leave its actors one, and bits depend on the number.
    """
    torch.set_num_threads(threads_for(settings.threads)[0])
    if pick_device(settings.device).type == "cpu":
        torch.set_deterministic_debug_mode("error")  # use_deterministic_algorithms imports torch's compiler
        torch.utils.deterministic.fill_uninitialized_memory = (
            False  # costs time and nothing here reads such memory
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def width_at(model: ModelSettings, task: str) -> int:
    """Width of the hidden states of a model whose weights are not read. Raises M301, M306."""
    known = {"revision": model.revision} if model.revision else {}
    with reading(model.name):
        return width_of(load_config(locate(model.name), task, None, known)[0])


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Transformers without its bars and reports; whatever it raises becomes one sentence, M301."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        with panics_as_errors():
            yield
    except FedtuneError:
        raise
    except Exception as error:  # safetensors, tokenizers and hub clients each raise their own kinds
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise FedtuneError(
            "M301",
            f"no usable model at '{name}' ({first[:200]})",
            "a local folder or hub name with config.json, tokenizer files and *.safetensors",
            "check model.name, or download the model where there is a network",
        ) from error
