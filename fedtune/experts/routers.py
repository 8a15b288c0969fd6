"""Several experts on one model at once, token by token.

At each adapted layer the experts' pairs are one pair of rank K r: A is stacked, the gate scales each expert's
slice of the K r numbers in the middle, and one product with all B follows: nothing of size tokens x K x out
is built. What is always on (the general expert) is a slice that no gate scales. Hooks on the base's layers do
it: `generate` and a cache of keys and values work, and detaching gives the base back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from fedtune.aggregate import Pair, split
from fedtune.errors import FedtuneError
from fedtune.experts.decisions import Decision
from fedtune.experts.feed_forward import blocks, narrows
from fedtune.experts.gates import Below, Gate, arrow, as_tensors, fixed, from_tensors, means
from fedtune.experts.health import Health
from fedtune.experts.reading import Reading
from fedtune.experts.shapes import Per
from fedtune.types import Tensors

SETTINGS, GATES, PREFIX = "gate.json", "gate.safetensors", "base_model.model."
LIVING = "living"  # in gate.json: the experts of each layer, where they are not all
Term = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, tuple[int, ...]], torch.Tensor]


@dataclass(frozen=True)
class Routing:
    """How many experts have a say.

    gate         as in gates.py; trained: by a run's clients, from `means` on
    keep         topk: the k best; topp: the best until their shares are p; dense: all; rank: the k-th alone
    temperature  of the softmax over scores; higher is more even
    per          layer: each decides for itself; block: one decision for a feed-forward block (decisions.py)
    depth        scores are averaged with those of the layers below
    reads        scores are those of all layers together, of a pass without experts that goes ahead
    """

    gate: Literal["arrow", "means", "fixed", "trained"] = "arrow"
    keep: Literal["topk", "topp", "dense", "rank"] = "topk"
    k: int = 2
    p: float = 0.6
    temperature: float = 1.0
    per: Per = "layer"
    depth: bool = False
    reads: bool = False

    def shares(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores (..., K) -> shares that add up to 1."""
        return self.parts(scores)[2]

    def most(self, experts: int) -> int:
        """So many have a say of a token, of so many."""
        return {"topk": min(self.k, experts), "rank": 1}.get(self.keep, experts)

    def parts(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores (..., K) -> shares of all, 1 for those that have a say and 0 for the others, and shares of
        those, which add up to 1 as well."""
        part = torch.softmax(scores / self.temperature, -1)
        if self.keep == "dense":
            return part, torch.ones_like(part), part
        if self.keep in ("topk", "rank"):
            chosen = part.topk(min(self.k, part.shape[-1]), -1).indices
            chosen = chosen[..., -1:] if self.keep == "rank" else chosen
            kept = torch.zeros_like(part).scatter_(-1, chosen, 1.0)
        else:
            best, order = part.sort(-1, descending=True)
            kept = torch.zeros_like(part).scatter_(
                -1, order, ((best.cumsum(-1) - best) < self.p).to(part.dtype)
            )
        some = part * kept
        return part, kept, some / some.sum(-1, keepdim=True)


@dataclass
class Layer:
    """One adapted layer. `who` are the numbers of the experts that live here, `ranks` theirs in that order;
    the first `always` slices are always on. Without any expert there is no gate; layers of a feed-forward
    block share a decision, to which the gate of its first layer leads."""

    A: torch.Tensor
    B: torch.Tensor
    gate: Gate | None
    who: tuple[int, ...]
    ranks: torch.Tensor
    always: int
    decision: Decision | None = None
    last: bool = False  # of its block
    summed: Any = 0.0  # of the prefix: scores, and how many tokens they are of
    tokens: Any = 0.0

    def added(self, x: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> what pairs add, (..., out); shares (..., experts that live here), or more of them
        than x in front."""
        middle = x @ self.A.T
        size = len(self.A) - self.always
        mine = shares.to(middle.dtype).repeat_interleave(self.ranks, -1, output_size=size)
        always = middle.new_ones(*mine.shape[:-1], self.always)
        return (middle * torch.cat([always, mine], -1)) @ self.B.T

    def to(self, device: torch.device) -> None:
        self.A, self.B, self.ranks = self.A.to(device), self.B.to(device), self.ranks.to(device)
        if self.gate is not None and self.gate.weight.device != device:
            moved = {"weight": self.gate.weight.to(device), "bias": self.gate.bias.to(device)}
            self.gate = replace(self.gate, **moved)


@dataclass
class Router:
    """Experts by name on a network, while they are attached. `null` gives a share to nobody: what comes last
    among scores. `also` makes a term of a loss of each layer's shares in a forward pass (all, who has a say,
    which tokens are no padding, whose they are); `extra` holds those of the last one."""

    names: tuple[str, ...]
    routing: Routing
    layers: dict[str, Layer]
    causal: bool
    null: bool = False
    health: Health = field(init=False)
    also: Term | None = None
    extra: list[torch.Tensor] = field(default_factory=list)
    _hooks: list[tuple[nn.Module, int]] = field(default_factory=list)
    _mask: torch.Tensor | None = None
    _below: Below = field(default_factory=Below)
    reading: Reading = field(default_factory=Reading)
    _goes_on: bool = True  # whether more tokens of the same texts may follow, from a cache

    def __post_init__(self) -> None:
        count = len(self.names) + self.null
        self.health = Health(np.zeros(count), np.zeros(count))

    def attach(self, net: nn.Module) -> None:
        """Raises M305 for a layer that the network has not."""
        modules, device = dict(net.named_modules()), next(net.parameters()).device
        for name, layer in self.layers.items():
            if name not in modules:
                raise FedtuneError(
                    "M305",
                    f"experts at layer '{name}'",
                    "layers of this model",
                    "give the base that they are for",
                )
            layer.to(device)
            hook = self._at(layer) if layer.decision is None else self._in_block(layer, layer.decision)
            self._hooks.append((modules[name], modules[name].register_forward_hook(hook).id))
        self._hooks.append((net, net.register_forward_pre_hook(self._begin, with_kwargs=True).id))

    def detach(self) -> None:
        """By number: an adapter that was taken off and put back has the hooks in other dicts, which a hook's
        own handle does not know."""
        while self._hooks:
            module, number = self._hooks.pop()
            for held in (
                module._forward_hooks,
                module._forward_pre_hooks,
                module._forward_pre_hooks_with_kwargs,
            ):
                held.pop(number, None)

    def _begin(self, net: nn.Module, arguments: Any, named: dict[str, Any]) -> None:
        """Before a pass of the whole model: a new text, or the next tokens of one that is in the cache."""
        if self.reading.busy:
            return
        past = named.get("past_key_values")
        if past is None or not past.get_seq_length():
            self.reading = Reading()
            for layer in self.layers.values():
                layer.summed, layer.tokens = 0.0, 0.0
        self._below = Below()
        self._goes_on = named.get("use_cache") is not False
        self.extra.clear()
        mask = named.get("attention_mask")
        self._mask = mask if mask is not None and mask.dim() == 2 else None
        if self.routing.reads:
            self.reading.ahead(net, arguments, named, self.causal and self._goes_on)
            self.reading.scores = self._averaged(self.reading.scores, self.reading)

    def _at(self, layer: Layer) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x = inputs[0].to(layer.A.dtype)
            if self.reading.busy:
                if layer.gate is not None:
                    self.reading.see(layer.gate, x)
                return output
            shares = None if layer.gate is None else self._shares(layer, layer.gate, x)
            mine = x.new_empty(*x.shape[:-1], 0) if shares is None else shares[..., : len(layer.who)]
            return output + layer.added(x, mine).to(output.dtype)

        return hook

    def _in_block(self, layer: Layer, decision: Decision) -> Any:
        """The first layer that is given what came into the block decides for all."""

        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            x = inputs[0].to(layer.A.dtype)
            if not layer.last and decision.x is not inputs[0]:
                head = self.layers[decision.head]
                assert head.gate is not None
                shares = self._shares(head, head.gate, x)
                slots = self.routing.most(shares.shape[-1])
                decision.take(inputs[0], shares, slots, len(layer.who))
            output = output + layer.added(x, decision.picks).to(output.dtype)
            return decision.mixed(output) if layer.last else output

        return hook

    def _shares(self, layer: Layer, gate: Gate, x: torch.Tensor) -> torch.Tensor:
        """(..., experts that live here, and nobody), and what is noted of them."""
        scores = self._scores(layer, gate, x)
        if self.routing.depth:
            scores = self._below.mean_with(scores, self._places(layer.who), len(self.health.shares))
        part, kept, shares = self.routing.parts(scores)
        real = self._seen(x)
        self._note(shares, real, layer.who)
        if self.also is not None:
            self.extra.append(self.also(part, kept, real, layer.who))
        return shares

    def _scores(self, layer: Layer, gate: Gate, x: torch.Tensor) -> torch.Tensor:
        """Of each token or, for a gate that looks at what came before, of the prefix up to it."""
        if self.routing.reads:
            return self.reading.at(x)
        scores = gate(x)
        return self._averaged(scores, layer) if gate.of_prefix and x.dim() == 3 else scores

    def _averaged(self, scores: torch.Tensor, held: Layer | Reading) -> torch.Tensor:
        """Scores (batch, tokens, experts) over the prefix up to each token, with what is held of it."""
        counts = self._seen(scores).double()
        wide = scores.double() * counts
        if not self.causal:
            return (
                (wide.sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp_min(1))
                .expand_as(scores)
                .float()
            )
        run, seen = wide.cumsum(1), counts.cumsum(1)
        if self._goes_on:
            run, seen = run + held.summed, seen + held.tokens
            held.summed, held.tokens = run[:, -1:], seen[:, -1:]
        return (run / seen.clamp_min(1)).float()

    def _places(self, who: tuple[int, ...]) -> list[int]:
        return [*who, *([len(self.names)] if self.null else [])]  # nobody last

    def _seen(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, 1): which of these tokens are no padding."""
        mask = self._mask
        if mask is None or x.dim() != 3 or mask.shape[1] < x.shape[1] or len(mask) != len(x):
            return torch.ones(*x.shape[:-1], 1, device=x.device)
        return mask[:, -x.shape[1] :, None]

    def _note(self, shares: torch.Tensor, real: torch.Tensor, who: tuple[int, ...]) -> None:
        flat = shares.detach().reshape(-1, shares.shape[-1]).double()
        here, places = real.reshape(-1, 1).double(), self._places(who)
        tokens = float(here.sum())
        self.health.shares[places] += (flat * here).sum(0).cpu().numpy()
        self.health.even[places] += tokens / len(places)
        self.health.entropy += float(-(here * flat * flat.clamp_min(1e-30).log()).sum())
        self.health.tokens += tokens

    # --- on disk

    def save(self, folder: Path, **card: Any) -> None:
        """Settings and gates, and what else is known of them (`card`); the experts themselves are in folders
        of their own."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "experts": list(self.names),
            "causal": self.causal,
            "null": self.null,
            "of_prefix": any(gate.of_prefix for gate in self.gates.values()),
            **asdict(self.routing),
            **card,
        }
        if any(len(self.layers[name].who) < len(self.names) for name in self.gates):
            about[LIVING] = {name: [self.names[n] for n in self.layers[name].who] for name in self.gates}
        (folder / SETTINGS).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")
        save_file(as_tensors(self.gates), folder / GATES)

    @property
    def gates(self) -> dict[str, Gate]:
        return {name: layer.gate for name, layer in self.layers.items() if layer.gate is not None}


def router(
    experts: Mapping[str, Tensors],
    always: Tensors,
    routing: Routing,
    causal: bool,
    moments: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    mixture: Mapping[str, float] | None = None,
    null: bool = False,
    gates: Mapping[str, Gate] | None = None,
) -> Router:
    """Over experts whose pairs are at scale 1, by id; `always` (the general expert's pairs, or nothing) has
    no gate.

    moments  by expert and layer, for gate = "means": (mean, mean square) of its inputs
    mixture  for gate = "fixed"
    gates    by layer, for gate = "trained": their scores are of the experts that live there, by their ids
    null     whatever looks like nobody's goes to nobody (gate "means": the mean of all; "arrow": score 0)

    An expert without a pair at a layer does not live there: `trained` and `means` do not ask it, for `arrow`
    its score is 0, and its part of a fixed mixture is zero.
    """
    names = tuple(sorted(experts))
    pairs = {name: plain(experts[name]) for name in names}
    beneath = plain(always)
    sizes = {
        module: (pair.A.shape[1], pair.B.shape[0]) for some in pairs.values() for module, pair in some.items()
    }
    heads, made = blocks(dict(sorted(sizes.items()))) if routing.per == "block" else {}, dict[str, Decision]()
    layers = dict[str, Layer]()
    for module in sorted({module for some in (*pairs.values(), beneath) for module in some}):
        every = routing.gate in ("arrow", "fixed")
        who = tuple(n for n, name in enumerate(names) if every or module in pairs[name])
        here = [names[n] for n in who]
        parts = [pairs[name].get(module) for name in here]
        held = [pair for pair in (beneath.get(module), *parts) if pair is not None]
        width = held[0].A.shape[1]
        if not who or heads.get(module, module) != module:
            gate = None
        elif gates is not None:
            gate = gates[module]
        else:
            gate = gate_of(routing, module, here, parts, moments or {}, mixture or {}, width, null)
        layers[module] = Layer(
            torch.from_numpy(np.concatenate([pair.A for pair in held]).astype(np.float32)),
            torch.from_numpy(np.concatenate([pair.B for pair in held], axis=1).astype(np.float32)),
            gate,
            who,
            torch.tensor([0 if pair is None else pair.rank for pair in parts], dtype=torch.long),
            beneath[module].rank if module in beneath else 0,
            made.setdefault(heads[module], Decision(heads[module])) if module in heads else None,
            module in heads and narrows(sizes[module]),
        )
    return Router(names, routing, layers, causal, null)


def gate_of(
    routing: Routing,
    module: str,
    names: Sequence[str],
    pairs: Sequence[Pair | None],
    moments: Mapping[str, Mapping[str, np.ndarray]],
    mixture: Mapping[str, float],
    width: int,
    null: bool,
) -> Gate:
    """Raises M305 where an expert's owner has not said what its rows look like at this layer."""
    if routing.gate == "fixed":
        shares = [mixture.get(name, 0.0) for name in names]
        return fixed([*shares, *([max(0.0, 1 - sum(shares))] if null else [])], width)
    if routing.gate == "arrow":
        return arrow([*pairs, *([None] if null else [])], width)
    if missing := [name for name in names if module not in moments.get(name, {})]:
        raise FedtuneError(
            "M305",
            f"no mean inputs of expert '{missing[0]}' at layer '{module}'",
            "those of every expert",
            "route by arrow, which needs the adapters alone",
        )
    said = [moments[name][module] for name in names]
    return means([*said, *([np.mean(said, axis=0)] if null else [])])


def loaded(folder: Path, experts: Mapping[str, Tensors], always: Tensors) -> Router:
    """The router that `save` wrote, over its experts. Raises M305 where one is missing."""
    about = json.loads((folder / SETTINGS).read_text())
    names, causal, null, of_prefix = (about[key] for key in ("experts", "causal", "null", "of_prefix"))
    routing = Routing(**{one.name: about[one.name] for one in fields(Routing) if one.name in about})
    if gone := sorted(set(names) - set(experts)):
        raise FedtuneError(
            "M305", f"a router over '{gone[0]}', which is not there", "its experts", "make the router again"
        )
    chosen = {name: experts[name] for name in names}
    gates = from_tensors(load_file(folder / GATES), routing.gate == "arrow", of_prefix)
    return router(chosen, always, routing, causal, null=null, gates=gates)


def plain(tensors: Tensors) -> dict[str, Pair]:
    """Pairs by the layer's name in the base."""
    return {name.removeprefix(PREFIX): pair for name, pair in split(tensors)[0].items()}
