"""SFPrompt: clients hold the two ends of a model, somebody else's machine runs the blocks between, and
prompts and tail are learned together.

Cao et al. 2024, "SFPrompt: Communication-Efficient Split Federated Fine-Tuning for Large Pre-Trained Models
over Resource-Limited Devices"
(arXiv:2407.17533). Up and down per client and round: prompts and tail, once each. Through the cut, for every
micro-batch: what the frozen head says
of it, the rows of the body's output that the tail reads, and gradients back; data and labels stay with the
client, but whoever runs the body can
reconstruct the data from what the head says (`fedtune leak-test`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedtune.aggregate import Rule
from fedtune.errors import FedtuneError
from fedtune.methods.base import AveragedTensors
from fedtune.methods.head_start import features_verbs, needs_moments
from fedtune.methods.interface import Capabilities, Facts, Verb
from fedtune.methods.one_client import begin_alone
from fedtune.methods.sfprompt_parties import SFPromptCosts, SplitModel
from fedtune.methods.sfprompt_settings import SFPromptSettings, figures_of
from fedtune.methods.weights import TELLS, weight_of
from fedtune.rng import seed_of
from fedtune.schema import Schema
from fedtune.types import Client, Round, State, Tensors, Update

if TYPE_CHECKING:
    from fedtune.model.base import Base
    from fedtune.model.encode import Encoded
    from fedtune.model.tunable import TunableModel

TENSORS, SIDECAR = "fedtune_adapter.safetensors", "fedtune.json"


class SFPrompt(AveragedTensors):
    """State: prompts and tail (shared). Clients remember which of their examples the body service may hold,
    where it may."""

    def __init__(self, settings: SFPromptSettings, rounds: int) -> None:
        super().__init__(settings.head_start, rounds)
        self.settings = settings

    def prepare(self, base: Base, seed: int) -> TunableModel:
        from fedtune.methods.sfprompt_net import cut_bench

        return cut_bench(base, self.settings, seed)

    # --- on each client ---

    @property
    def verbs(self) -> Mapping[str, Verb]:
        train = Verb(
            self.train,
            lambda tunable, client, now: Schema.of(tunable.named),
            lambda given, now: given,
            moves=True,
        )
        return {"train": train} | features_verbs(self.settings.head_start, self.tell_features)

    def tell_features(self, client: Client, given: Tensors, now: Round) -> Update:
        from fedtune.methods.sfprompt_work import features

        tunable: TunableModel = client.model
        body, turn = client.body or tunable.net.own_body, (now.number, client.id)
        moments = needs_moments(self.settings.head_start, len(given))
        sums = features(tunable, client.data, self.settings, body, turn, moments)
        return Update.of(sums, float(len(client.data)))

    def train(self, client: Client, given: Tensors, now: Round) -> Update:
        """The body is where `client.body` leads, and in this process where it leads nowhere; what is computed
        and sent is the same."""
        from fedtune.methods.sfprompt_work import one_turn

        tunable: TunableModel = client.model
        tunable.write(given)
        seed, progress = seed_of("train", now.seed, now.number, client.id), (now.number - 1, self.rounds)
        body = client.body or tunable.net.own_body
        figures = one_turn(
            tunable, client.data, self.settings, body, (now.number, client.id), seed, progress, client.state
        )
        return Update.of(tunable.read(), weight_of(self.settings.weight, client, figures["loss"]), figures)

    # --- around a run ---

    @property
    def facts(self) -> Facts:
        s = self.settings
        lora = f", LoRA {s.lora_rank}" if s.lora_rank else ""
        title = (
            f"sfprompt / k = {s.head}, {s.tail} in the tail, {s.prompts} prompts{lora} / "
            f"{', '.join(s.phases)}"
        )
        return Facts("sfprompt", title, ("adapter",), figures_of(s), TELLS[s.weight])

    @property
    def capabilities(self) -> Capabilities:
        body = (
            "whoever runs it sees hidden states of every example and can reconstruct the inputs from them "
            "(fedtune leak-test): "
            "split training keeps data from other clients and from disks, not from the body's operator"
        )
        return Capabilities(
            costs=SFPromptCosts(self.settings), split=SplitModel(self.settings), also_see={"body": body}
        )

    def alone(self, tunable: TunableModel, data: Encoded, state: State, seed: int) -> None:
        from fedtune.methods.sfprompt_work import one_turn

        body = partial(replace, tunable.net.own_body, run=f"alone {seed}")
        begin_alone(self, tunable, data, state, seed, body())
        client_state: dict[str, Any] = {}
        for number in range(1, self.rounds + 1):
            one_turn(
                tunable,
                data,
                self.settings,
                body(),
                (number, 0),
                seed_of("train", seed, number),
                (number - 1, self.rounds),
                client_state,
            )

    def export(
        self, form: str, state: State, tunable: TunableModel, folder: Path, card: str, seed: int
    ) -> None:
        """Prompts and tail under the network's own names, and fedtune.json: peft has no form for prompts at a
        cut. `load` reads it."""
        from safetensors.numpy import save_file

        base = tunable.base
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tunable.read(), str(folder / TENSORS))
        about = {
            "format": 1,
            "base": base.name,
            "base_fingerprint": base.fingerprint,
            "task": base.task,
            "labels": list(base.labels),
        }
        about["method"] = self.settings.model_dump(mode="json")
        (folder / SIDECAR).write_text(json.dumps(about, indent=2, sort_keys=True) + "\n")
        (folder / "README.md").write_text(card)


class SFPromptTable(SFPromptSettings):
    """[method] type = "sfprompt"."""

    def build(self, rounds: int, rule: Rule) -> SFPrompt:
        return SFPrompt(self, rounds)  # the mean is the only rule that `conflicts` lets through


def load(base: Base, folder: Path) -> TunableModel:
    """A tunable model with the prompts and tail that `export` wrote. Raises M304 for another base, or no such
    folder."""
    from pydantic import ValidationError
    from safetensors.numpy import load_file

    try:
        about = json.loads((folder / SIDECAR).read_text())
        settings = SFPromptTable.model_validate_json(json.dumps(about["method"]))
        tensors = load_file(str(folder / TENSORS))
    except (OSError, ValueError, KeyError, ValidationError) as error:
        raise FedtuneError(
            "M304",
            f"no prompts and tail in {folder} ({str(error)[:120]})",
            f"{SIDECAR} and {TENSORS}",
            "give the exported folder",
        ) from error
    if (about["base_fingerprint"], about["task"], about["labels"]) != (
        base.fingerprint,
        base.task,
        list(base.labels),
    ):
        found, expected = (
            f"prompts and a tail for base {about['base_fingerprint'][:12]}, {about['task']}",
            f"base {base.fingerprint[:12]}, {base.task}",
        )
        raise FedtuneError(
            "M304",
            found,
            expected,
            f"load them on the base and labels that they were made for ({about['base']})",
        )
    tunable = SFPrompt(settings, 1).prepare(base, 0)
    tunable.write(tensors)
    return tunable
