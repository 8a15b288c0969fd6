"""A model's configuration: where it lies, whether its architecture can do the task, and which classes it
has."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers.utils.peft_utils import find_adapter_config_file

from fedtune.errors import FedtuneError
from fedtune.hf.code import refuse_code
from fedtune.hf.gguf import is_gguf, unpacked
from fedtune.hf.labels import LabelSet, choose_labels
from fedtune.types import LM_TASKS

AUTO = {
    "classify": transformers.AutoModelForSequenceClassification,
    "causal-lm": transformers.AutoModelForCausalLM,
    "instruct": transformers.AutoModelForCausalLM,
    "preference": transformers.AutoModelForCausalLM,
    "image-classify": transformers.AutoModelForImageClassification,
}
PACKAGE = "package:"  # begins the name of a model that an installed package carries


def locate(name: str) -> str:
    """A folder or hub name. `package:NAME/FOLDER` is a folder inside an installed package, which is not
    imported; a GGUF file, of a package too, is the folder that it is unpacked into. Raises M301."""
    if is_gguf(name):
        return str(unpacked(in_package(name) if name.startswith(PACKAGE) else Path(name).expanduser()))
    if name.startswith("~"):
        return str(Path(name).expanduser())
    return str(in_package(name)) if name.startswith(PACKAGE) else name


def in_package(name: str) -> Path:
    """The folder or file that `package:NAME/PATH` means. Raises M301."""
    package, _, path = name.removeprefix(PACKAGE).partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    for root in (spec.submodule_search_locations or []) if spec else []:
        if (Path(root) / path).exists():
            return Path(root) / path
    raise FedtuneError(
        "M301",
        f"no '{path}' in an installed package '{package}'",
        "an installed package that contains the model",
        "install it (the built-in one comes with: pip install 'fedtune[demo]') or set model.name to a local "
        "folder",
    )


def load_config(
    place: str, task: str, labels: Sequence[str] | None, known: dict[str, Any]
) -> tuple[Any, LabelSet]:
    """The configuration, with the label set where the task has one, and what was decided about its labels. No
    weights are read.

    Raises M301 (an adapter lies beside the model, or its settings name code) and M306 (an architecture that
    cannot do the task).
    """
    refuse_code(place, known)
    refuse_adapter(place, known)
    config = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False, **known)
    refuse_quantised(config, place)
    refuse_architecture(config, place, task)
    if task in LM_TASKS or labels is None:  # None: whoever loads needs no task head
        return config, LabelSet((), kept=True)
    chosen = choose_labels(config, labels)
    config.num_labels = len(chosen.labels)
    config.id2label = dict(enumerate(chosen.labels))
    config.label2id = {label: number for number, label in enumerate(chosen.labels)}
    config.problem_type = None
    return config, chosen


def refuse_adapter(place: str, known: dict[str, Any]) -> None:
    """transformers would attach an adapter that lies beside the weights by itself; nobody would know what is
    trained on what."""
    try:
        found = find_adapter_config_file(place, **known)
    except OSError:  # no such place: reading the configuration says so
        found = None
    if found is not None:
        raise FedtuneError(
            "M301",
            f"an adapter (adapter_config.json) in the model folder '{place}'",
            "the files of a base model alone",
            "merge the adapter into its base first (peft: merge_and_unload, or fedtune export --as merged), "
            "or move it to a folder of its own",
        )


def refuse_quantised(config: Any, place: str) -> None:
    """Raises M301 for a checkpoint that somebody has quantised: what it was made from is rounded here, so
    that all sites know their base by the same file."""
    told = getattr(config, "quantization_config", None)
    if told:
        how = told.get("quant_method") if isinstance(told, dict) else getattr(told, "quant_method", None)
        raise FedtuneError(
            "M301",
            f"a checkpoint that is quantised already ({getattr(how, 'value', how) or 'quantization_config'}) "
            f"at '{place}'",
            "the model that it was made from, with its weights in 16 or 32 bits",
            "give that one, and set model.load = '4bit' or '8bit'",
        )


def refuse_missing_weights(place: str) -> None:
    """Raises M301 for a local folder without weights in a format that is read; what a hub holds is known when
    it is loaded."""
    folder = Path(place)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        other = sorted(
            path.name
            for path in folder.iterdir()
            if path.suffix in (".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf")
        )
        found = f"no *.safetensors in '{place}'" + (f" beside {other[0]}" if other else "")
        raise FedtuneError(
            "M301",
            found,
            "the model's weights as safetensors",
            "convert or download them: pickled weights are never read",
        )


def require_model(name: str) -> None:
    """Raises M301, or what transformers raises, where a name leads to no model: one without config.json, or
    without weights. Reads none of them."""
    place = locate(name)
    refuse_code(place, {})
    transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
    refuse_missing_weights(place)


def refuse_architecture(config: Any, place: str, task: str) -> None:
    """Raises M306 where transformers has no such head for the architecture, or one that would not be trained
    as the task says."""
    kind = config.model_type
    if type(config) not in AUTO[task]._model_mapping:
        several = [name for name in AUTO if type(config) in AUTO[name]._model_mapping]
        able = (
            f"data.task = {' or '.join(repr(name) for name in several)} with this model, or another model"
            if several
            else "another model"
        )
        raise FedtuneError(
            "M306",
            f"a '{kind}' model ({place}) with data.task = '{task}'",
            f"an architecture with a head for '{task}'",
            f"choose {able}",
        )
    if task in LM_TASKS and getattr(config, "is_encoder_decoder", False):
        raise FedtuneError(
            "M306",
            f"the encoder-decoder '{kind}' ({place}) with data.task = '{task}'",
            "a decoder-only language model, such as Llama, Qwen or GPT-2",
            "choose another model; encoder-decoders are supported for data.task = 'classify'",
        )


def position_limit(net: Any) -> int | None:
    """Most positions that the network's tables of learned positions have, None where it has no such table.

    RoBERTa's kind counts positions from behind the padding index, BART's and OPT's from an offset, so a table
    has fewer places than rows.
    """
    limits = []
    for name, module in net.named_modules():
        last = name.rpartition(".")[2]
        weight = getattr(module, "weight", None)
        table = weight is not None and weight.ndim == 2 and hasattr(module, "padding_idx")
        if (
            not table
            or not ("position" in last or last == "wpe")
            or any(word in last for word in ("relative", "rel_", "distance"))
        ):
            continue
        behind = getattr(module, "padding_idx", None)
        offset = int(getattr(module, "offset", 0) or 0)
        limits.append(int(module.weight.shape[0]) - max(0 if behind is None else int(behind) + 1, offset))
    return min(limits, default=None)


def width_of(config: Any) -> int:
    """Width of the hidden states behind the last block: of the text model, where there are several; 0 where
    the configuration does not say."""
    text = config.get_text_config()
    if named := getattr(text, "hidden_size", None):  # under whatever name, as in GPT-2
        return int(named)
    known = text.to_dict() | config.to_dict()
    stages = next((known[key] for key in ("hidden_sizes", "embed_dims") if known.get(key)), [0])
    return int(stages[-1])
