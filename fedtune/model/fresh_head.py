"""The task head of a classifier: which parameters are its own, and which of them start afresh."""

from __future__ import annotations

from typing import Any

from fedtune.errors import FedtuneError
from fedtune.hf.labels import redraw
from fedtune.rng import seed_of


def redraw_head(net: Any, fresh: frozenset[str], seed: int) -> frozenset[str]:
    """Start those parts of the task head afresh that came from the file; returns the names of all fresh
    parameters."""
    old = {name.partition(".")[0] for name, _ in net.named_parameters() if name not in fresh}
    return fresh | redraw(net, sorted(head_children(net) & old), seed_of("head", seed))


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
