"""The pretrained model and its tokenizer, loaded once a process and never changed: adapters are attached by
`tunable`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import transformers

from fedtune.errors import FedtuneError
from fedtune.hf.checkpoint import folder_of, stored_type, weight_files
from fedtune.hf.config import AUTO, load_config, locate, position_limit, width_of
from fedtune.hf.draws import own_draws
from fedtune.hf.labels import LabelSet
from fedtune.hf.linears import body_linears, heads
from fedtune.hf.packing import Way
from fedtune.hf.pooling import Pooling, choose_pooling, set_pooling
from fedtune.hf.probe import is_causal, needs_mask, padding_side, refuse_conflict
from fedtune.hf.statistics import saved_buffers
from fedtune.hf.tokenizer import fit_tokenizer, load_tokenizer
from fedtune.model.device import has_bfloat16, pick_device, prepare_torch
from fedtune.model.distil_settings import Public
from fedtune.model.fingerprint import HALF, digest, tokenizer_text
from fedtune.model.fresh_head import fresh_names, redraw_head
from fedtune.model.known_digests import About, about_files, known_or
from fedtune.model.objectives import Preference
from fedtune.model.quantised import fitting, quantise
from fedtune.model.settings import ModelSettings
from fedtune.panics import panics_as_errors
from fedtune.rng import seed_of
from fedtune.types import LM_TASKS


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
    needs_mask: bool = True  # even of batches in which nothing is padded
    logits_apart: bool | None = None  # as fedtune.model.loss_pieces found it; None: not asked yet
    packing: Way | None = None  # as fedtune.model.packing found it; None: not tried yet
    tokenizer_digest: str | None = None  # kept by fedtune.model.token_cache
    fits: dict[str, int] = field(default_factory=dict)  # kept by fedtune.model.device_memory
    attached: Any = None  # the TunableModel that now sits on this base, if any
    load: str = "full"  # full, 8bit or 4bit
    # the checkpoint's weights and buffers once more, where those that are held here do not say them
    checkpoint: Callable[[], tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] | None = None
    whole: Callable[[], Base] | None = None  # the base with all its bits on the CPU, where it lacks some here
    files: tuple[About, ...] = ()  # those that the weights were read from, where they were here before
    part: Any = None  # fedtune.split.parts.Part, where this process holds no more of the network than that
    judge: Preference | None = None  # the loss by which pairs of responses are scored
    public: Public | None = None  # what its owner distils with
    weights: dict[str, torch.Tensor] = field(
        init=False, repr=False
    )  # name -> pristine parameter, tied ones once
    buffers: dict[str, torch.Tensor] = field(
        init=False, repr=False
    )  # name -> buffer that the model's file holds, such as running statistics

    def __post_init__(self) -> None:
        self.weights, self.buffers = tensors_of(self.net)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the checkpoint, as hex: the pretrained weights (not the fresh head) and the buffers of
        the file as float32, whatever they are held in here, and the tokenizer. Computed at first use."""
        return self.printed(held=False)

    @property
    def held_fingerprint(self) -> str:
        """The same over the weights as they are held here, of models that are rebuilt from them to the bit:
        another one where they are rounded."""
        return self.fingerprint if self.checkpoint is None else self.typed_fingerprint

    @cached_property
    def typed_fingerprint(self) -> str:
        """The same over the weights in the type that they are held in."""
        held = {value.dtype for value in (*self.weights.values(), *self.buffers.values())}
        if self.checkpoint is None and held.isdisjoint(HALF):
            return self.fingerprint
        return self.printed(held=True)

    def printed(self, held: bool) -> str:
        """The digest of what is held here, or of the checkpoint as float32; of a large model as it was found
        earlier for the same files."""
        also = tokenizer_text(self.tokenizer)
        if self.pooling != "own":
            also += f"pooling: {self.pooling}"
        here = (self.weights, self.buffers)

        def compute() -> str:
            tensors = self.checkpoint() if self.checkpoint and not held else here
            total = digest(*tensors, besides=self.fresh, as_float32=not held)
            total.update(also.encode())
            return str(total.hexdigest())

        if not self.files:
            return compute()
        named = [[n, str(v.dtype), list(v.shape)] for group in here for n, v in sorted(group.items())]
        about = named if held or not self.checkpoint else [n for n, _, _ in named]
        follows = [
            self.files,
            transformers.__version__,
            type(self.net).__name__,
            sorted(self.fresh),
            about,
            held,
        ]
        return known_or([*follows, also], self.bytes_held, compute)

    @property
    def bytes_held(self) -> int:
        """Of the weights, tied ones once."""
        return sum(value.numel() * value.element_size() for value in self.weights.values())

    def is_called(self, fingerprint: str | None) -> bool:
        """Whether it is this base's, as this or an earlier version made it."""
        return fingerprint == self.fingerprint or fingerprint == self.typed_fingerprint

    @cached_property
    def size(self) -> int:
        """Number of parameters of the pristine network, tied ones once; of a quantised one, what `load`
        counted."""
        return sum(value.numel() for value in self.weights.values())


@dataclass(frozen=True)
class Found:
    """A network on the CPU as it was read, and what came with it."""

    net: Any
    tokenizer: Any
    fresh: frozenset[str]
    chosen: LabelSet


def load(settings: ModelSettings, task: str, labels: Sequence[str], seed: int) -> Base:
    """Load model and tokenizer, frozen and in eval mode. A fresh head depends on `seed` only.

    safetensors only and no remote code: nothing from a hub is executed. Raises M301 (not found), M303
    (tokenizer and model do not fit) and
    M306 (an architecture that cannot do the task, or on whose answers padding has an influence).
    """
    prepare_torch(settings)
    device, dtype = pick_device(settings.device), dtype_of(settings)
    again, files = partial(read, settings, task, labels, seed), files_of(settings)
    load_as = load_for(settings, task, labels)
    # what is not rounded is not copied: a checkpoint stays mapped until it is, a layer at a time
    lean = load_as != "full" and task in LM_TASKS
    found = again(stored_here(settings) if lean else dtype)
    net, fresh = found.net, found.fresh
    size = sum(value.numel() for value in net.parameters())
    if load_as != "full":
        quantise(net, body_linears(net, heads(net, task, fresh)), load_as, dtype, device)
    net.requires_grad_(False).eval().to(device)
    with reading(settings.name):
        known: dict[str, Any] = {"revision": settings.revision} if settings.revision else {}
        pooling, note = choose_pooling(
            settings.pooling, locate(settings.name), task, found.chosen.kept, **known
        )
    said = (*said_of(found.chosen), *((note,) if note else ()))
    if task == "image-classify" and net.main_input_name != "pixel_values":
        wrong = f"a {type(net).__name__}, which reads images as {net.main_input_name}"
        raise FedtuneError("M306", wrong, "a model of pixels, such as ViT or ResNet", "choose another model")
    base = Base(
        net, found.tokenizer, task, found.chosen.labels, device, settings.name, None, fresh,
        notes=said, kept_head=found.chosen.kept, pooling=pooling, load=load_as, files=files,
    )  # fmt: skip
    base.size = size
    if load_as != "full":
        whole = settings.model_copy(update={"load": "full", "device": "cpu"})
        base.whole = partial(load, whole, task, labels, seed)
    if base.whole or (dtype != torch.float32 and stored_here(settings) != dtype):
        base.checkpoint = lambda: tensors_of(again(stored_here(settings)).net)
    if task != "image-classify":
        fit_text(base, settings.name)
    set_pooling(net, pooling)  # last: the probes look at single tokens
    return base


def read(settings: ModelSettings, task: str, labels: Sequence[str], seed: int, dtype: torch.dtype) -> Found:
    """Network and tokenizer from their files, on the CPU, with numbers of a type. Raises M301, M306."""
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
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=task not in LM_TASKS,  # a classifier of another label set is replaced
            output_loading_info=True,
            **known,
        )
    fresh = fresh_names(net, info, settings.name)
    if not chosen.kept:
        fresh = redraw_head(net, fresh, seed)
    return Found(net, tokenizer, fresh, chosen)


def tensors_of(net: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters, tied ones once, and buffers that the model's file holds."""
    return dict(net.named_parameters()), saved_buffers(net)


def files_of(settings: ModelSettings) -> tuple[About, ...]:
    """What is known of the checkpoint's files before they are read; () where they are not on this machine
    yet."""
    folder = folder_of(locate(settings.name), settings.revision)
    return about_files(weight_files(folder)) if folder else ()


def stored_here(settings: ModelSettings) -> torch.dtype:
    """The type of the checkpoint's numbers."""
    return stored_type(locate(settings.name), settings.revision)


def load_for(settings: ModelSettings, task: str, labels: Sequence[str] | None) -> str:
    """full, 8bit or 4bit: what model.load means here. Raises M301, M306."""
    if settings.load != "auto":
        return settings.load
    known = {"revision": settings.revision} if settings.revision else {}
    with reading(settings.name):
        config = load_config(locate(settings.name), task, labels, known)[0]
        with torch.device("meta"):
            net = AUTO[task].from_config(config, dtype=dtype_of(settings))
    return fitting(net, body_linears(net, heads(net, task, ())), pick_device(settings.device))


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
        base.needs_mask = needs_mask(net, tokenizer, base.context)


def said_of(chosen: LabelSet) -> tuple[str, ...]:
    return (chosen.note,) if chosen.note else ()


def context_of(net: Any, tokenizer: Any = None) -> int | None:
    """Longest input in tokens by configuration, tables of positions and tokenizer (where there is one); None
    where nothing limits it."""
    stated = (
        getattr(net.config.get_text_config(), "max_position_embeddings", None),
        position_limit(net),
        getattr(tokenizer, "model_max_length", None),
    )
    return min((int(number) for number in stated if number and 0 < number < 10**9), default=None)


def dtype_of(settings: ModelSettings) -> torch.dtype:
    """Type of the frozen base. Raises M301 for a device that is not there.

    auto rounds nothing: it is bfloat16 where the checkpoint is and a GPU computes with that, else float32. On
    a CPU it is float32 whatever that computes with, so that a recipe has the same bits on all of them."""
    if settings.dtype != "auto":
        dtype: torch.dtype = getattr(torch, settings.dtype)
        return dtype
    device = pick_device(settings.device)
    half = device.type == "cuda" and has_bfloat16(device) and own_type(settings) == torch.bfloat16
    return torch.bfloat16 if half else torch.float32


def own_type(settings: ModelSettings) -> torch.dtype:
    """The type of the checkpoint's numbers, or the one that its configuration states where its files are not
    on this machine yet. Raises M301."""
    place = locate(settings.name)
    if folder_of(place, settings.revision):
        return stored_type(place, settings.revision)
    known = {"revision": settings.revision} if settings.revision else {}
    with reading(settings.name):
        config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False, **known)
    return config.dtype or torch.float32


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
