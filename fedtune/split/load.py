"""Loading a part of a model without ever holding the rest.

transformers builds a network on the meta device, where it weighs nothing, and then reads tensors for the
parameters that it finds there, through
its own tables of names (ViT's on disk are not those in memory) and from as many files as there are. So the
class that it is asked to load is one
that takes the foreign modules out while it is being built; buffers that are in no file (rotary frequencies)
are made as for the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch

from fedtune.errors import FedtuneError
from fedtune.hf.draws import own_draws
from fedtune.rng import seed_of
from fedtune.split.anatomy import Anatomy, look
from fedtune.split.cut import Cut, Role
from fedtune.split.partial import Absent, strip
from fedtune.split.parts import Part


def load_part(
    place: str,
    auto: Any,
    cut: Cut,
    holds: Collection[Role],
    *,
    config: Any = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    revision: str | None = None,
) -> Part:
    """Parts of the model at a folder or hub name, frozen and in eval mode.

    auto      transformers.AutoModelForCausalLM, AutoModelForSequenceClassification or
              AutoModelForImageClassification
    config    the model's, with the label set; read from `place` where None
    seed      of a task head that the file lacks: the same as the whole model's

    Raises S701, S702 (weights are missing), S704; what transformers raises for an unusable folder passes
    through.
    """
    import transformers

    known: dict[str, Any] = {"revision": revision} if revision else {}
    config = (
        config
        if config is not None
        else transformers.AutoConfig.from_pretrained(place, trust_remote_code=False, **known)
    )
    net_class = class_of(auto, config)
    anatomy = look(net_class, config)
    cut.check(anatomy.blocks)
    with own_draws(
        seed_of("head", seed)
    ):  # transformers draws a missing head from torch's generator, on the CPU
        net, info = partial_class(net_class, anatomy, cut, holds).from_pretrained(
            place,
            config=copy.deepcopy(config),
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes="Classification"
            in net_class.__name__,  # a head of another label set is replaced
            output_loading_info=True,
            **known,
        )
    net.__class__ = net_class
    fresh = fresh_names(net, info, anatomy, place)
    drop_doubles(net)
    net.requires_grad_(False).eval().to(device)
    return Part(net, cut, holds, anatomy, fresh)


def class_of(auto: Any, config: Any) -> Any:
    """The class that an Auto class stands for; where it knows several for one configuration, the one that
    wrote the file, or the first."""
    known = auto._model_mapping[type(config)]
    several = known if isinstance(known, tuple) else (known,)
    return next((one for one in several if one.__name__ in (config.architectures or ())), several[0])


def partial_class(net_class: Any, anatomy: Anatomy, cut: Cut, holds: Collection[Role]) -> Any:
    """The class of a network that loses foreign modules at birth. It bears the name of the original, by which
    transformers finds its tables."""

    def born(self: Any, config: Any, *args: Any, **named: Any) -> None:
        net_class.__init__(self, config, *args, **named)
        strip(self, anatomy, cut, holds)

    return type(
        net_class.__name__,
        (net_class,),
        {"__init__": born, "__module__": net_class.__module__, "__qualname__": net_class.__qualname__},
    )


def fresh_names(net: Any, info: Mapping[str, Any], anatomy: Anatomy, place: str) -> frozenset[str]:
    """Parameters of the part that the file lacks, or has for another label set: a task head or pooler may be
    fresh, nothing else (S702)."""
    lacking = set(info["missing_keys"]) | {
        entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]
    }
    fresh = frozenset(lacking & dict(net.named_parameters()).keys())
    heads = (
        [path for path in anatomy.rear if not path.startswith(anatomy.base + ".")]
        if net.get_output_embeddings() is None
        else []
    )
    lost = sorted(
        name
        for name in fresh
        if ".pooler." not in name and not any(name.startswith(path + ".") for path in heads)
    )
    if lost:
        raise FedtuneError(
            "S702",
            f"files at {place} without '{lost[0]}' ({len(lost)} parameters of this part)",
            "all pretrained weights of the part",
            "use a complete folder of the same architecture",
        )
    return fresh


def drop_doubles(net: Any) -> None:
    """A tail's output layer was read under the embeddings' name; from here on it is the output layer
    alone."""
    for module in net.modules():
        if isinstance(module, Absent) and "weight" in module._parameters:
            del module._parameters["weight"]
    names = dict(net.named_parameters(remove_duplicate=False))
    net.all_tied_weights_keys = {
        target: source for target, source in net.all_tied_weights_keys.items() if source in names
    }
