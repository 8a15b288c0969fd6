"""LT-SFT: clients vote on which weights to train, once, and train those and no others.

Ansell, Ponti, Korhonen and Vulić 2022, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer"
(arXiv:2110.07560): train all weights, take the k that moved most as a mask, go back to the base, train under
the mask. Here each client of the first round trains all weights by itself and answers with a vote for the k
that moved most, and no value of them (ballots.py); the coordinator makes one mask of the votes, which belongs
to the run. From then on up go the values under the mask, without positions, so that they add up as tensors
do; down go the values and the mask, a bit a weight. The task head is trained whole and travels with them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from fedtune.aggregate import Rule
from fedtune.errors import ClientFailed, FedtuneError
from fedtune.methods import ballots
from fedtune.methods.base import AdapterCosts, AdapterMethod, AdapterTable, figures
from fedtune.methods.head_start import kept_until_started
from fedtune.methods.interface import Capabilities, Facts, Verb
from fedtune.methods.one_client import OneClient
from fedtune.methods.weights import weight_of
from fedtune.model.adapters import AdapterSettings, Full
from fedtune.model.settings import TrainSettings, whole_run
from fedtune.rng import seed_of
from fedtune.schema import Schema
from fedtune.types import Client, Round, State, Sums, Tensors, Update

if TYPE_CHECKING:
    from fedtune.model.encode import Encoded
    from fedtune.model.memory_plan import Plan
    from fedtune.model.tunable import TunableModel

VOTE = "vote"  # the verb
VOTES = "votes."  # and the width: the name of a ballot
# given with the question: a tensor (weights, 0) without a number, whose shape says how long a ballot is
BALLOT = "ltsft.ballot"
MASK, VALUES = "ltsft.mask", "ltsft.values"  # in the state: bits of the mask, and the values under it
MARK = "ltsft/open"  # in what the server keeps, until there is a mask


class LTSFTTable(AdapterTable):
    """[method] type = "ltsft": lottery ticket sparse fine-tuning (Ansell et al. 2022, arXiv:2110.07560).
    Clients vote once for the weights that move most when all are trained; only the winners are trained."""

    type: Literal["ltsft"] = "ltsft"
    adapter: AdapterSettings = Full()
    """Which weights can be voted for: all of the model's, or those of `only` and `band`. The task head is
    trained in any case."""
    density: float = Field(0.05, gt=0, le=1)
    """Share of these weights that each client votes for, and that the mask has at most."""
    elect: Literal["union", "threshold"] = "union"
    """Which of the weights that have votes win. union: all, those with the most votes first; threshold: those
    for which a `share` of the voters are, which may be fewer than `density`."""
    share: float = Field(0.5, gt=0, le=1)
    """elect = "threshold": share of the voters."""
    vote_steps: int = Field(0, ge=0)
    """Optimiser steps of the training behind a vote; 0: as many as a round's."""

    @property
    def trains(self) -> str:
        return "lift"  # few weights, which stand ten times the rate of all: docs/tuning.md, Votes

    def build(self, rounds: int, rule: Rule) -> LTSFT:
        return LTSFT(self, rounds)

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        yield from super().conflicts(recipe)
        here = "with method.type = 'ltsft'"
        if not isinstance(self.adapter, Full):
            found = f"method.adapter.kind = '{self.adapter.kind}' {here}"
            yield found, "kind = 'full': the model's own weights", "remove method.adapter.kind"
        if "share" in self.model_fields_set and self.elect != "threshold":
            yield f"method.share {here} and elect = '{self.elect}'", "elect = 'threshold'", "remove it"
        if self.train.weight_decay:
            expected = "none: it would move the weights outside the mask"
            yield f"method.train.weight_decay {here}", expected, "remove it"
        if self.train.private.max_grad_norm:
            expected = "votes that tell of rows, which no noise covers"
            yield f"method.train.private {here}", expected, "set method.type = 'fedpeft', or remove it"
        if spending := [step.step for step in recipe.chain if step.spends]:
            found = f"[[chain]] step = '{spending[0]}' {here}"
            yield found, "votes, which no noise covers", "set method.type = 'fedpeft', or remove the step"
        if recipe.aggregate.rule != "mean":
            yield f"aggregate.rule = '{recipe.aggregate.rule}' {here}", "mean", "remove [aggregate]"
        if recipe.downlink.lossy or recipe.downlink.remembers:
            yield (
                f"downlink.step = '{recipe.downlink.step}' {here}",
                "no [downlink]: the mask must arrive as it is",
                "remove [downlink]",
            )


class LTSFT(AdapterMethod):
    """State: the mask as words of 32 bits (shared), the values under it in their order, zeros behind the
    last, (k,), and the task head."""

    settings: LTSFTTable

    def __init__(self, settings: LTSFTTable, rounds: int) -> None:
        super().__init__(settings, rounds)
        self.started: TunableModel | None = None  # whose base has the first values

    # --- on the server

    def start(self, tunable: TunableModel) -> State:
        self.started = tunable
        nothing = np.zeros(0, np.int64)
        head = {name: tunable.read_one(name) for name in sorted(tunable.of_head)}
        kept = kept_until_started(self.head_start, tunable, self.head_noise)
        told = self.told(tunable, nothing, np.zeros(0, np.float32))
        return State({**told, **head}, {**kept, MARK: np.zeros(1, np.float32)})

    def begin(self, state: State, cohort: Sums) -> State:
        state = super().begin(state, cohort)
        if MARK not in state.kept:
            return state
        if self.started is None:
            raise RuntimeError("a state begins after `start`, which keeps the model whose weights it takes")
        return self.masked(state, cohort, self.started)

    def masked(self, state: State, cohort: Sums, tunable: TunableModel) -> State:
        """The state with the mask that clients vote for, and the base's values under it. Raises R414 where
        the votes are not what they should be, or elect nothing."""
        from fedtune.model.masked_weights import base_values

        count, most = self.sizes(tunable)
        given = {**head_of(state.shared), BALLOT: np.zeros((count, 0), np.float32)}
        said = cohort.sum(VOTE, given)
        ((name, words),), voters = said.tensors.items(), round(said.weight)
        votes = ballots.counted(words, count, int(name.removeprefix(VOTES)))
        if int(votes.sum()) != voters * most:
            found = f"{int(votes.sum()):,} votes of {voters} clients"
            do = "look for a client that runs another program, and leave it out (sampling.without)"
            raise FedtuneError("R414", found, f"{most:,} of each", do)
        wanted = math.ceil(self.settings.share * voters - 1e-9)  # 0.7 x 10 is a little more than 7
        least = wanted if self.settings.elect == "threshold" else 1
        positions = ballots.elected(votes, least, most)
        if not positions.size:
            found = f"no weight for which {least} of {voters} clients are"
            raise FedtuneError("R414", found, "one at least", "lower method.share, or raise method.density")
        kept = {key: value for key, value in state.kept.items() if key != MARK}
        told = self.told(tunable, positions, base_values(tunable, positions))
        return State({**state.shared, **told}, kept)

    def told(self, tunable: TunableModel, positions: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        """Mask and values, as they stand in the state."""
        count, most = self.sizes(tunable)
        bits = np.zeros(32 * -(-count // 32), np.uint8)
        bits[positions] = 1
        return {
            MASK: np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32),
            VALUES: np.pad(values, (0, most - values.size)),
        }

    def install(self, state: State, tunable: TunableModel) -> None:
        self.write(tunable, state.shared)

    def write(self, tunable: TunableModel, tensors: Tensors) -> np.ndarray:
        """Put a state into the tunable model; the positions under its mask. Raises ClientFailed W607 for a
        mask with more of them than there are values."""
        from fedtune.model.masked_weights import write_at
        from fedtune.model.open_tensors import write_into

        count, _ = self.sizes(tunable)
        bits = np.unpackbits(tensors[MASK].astype("<u4").view(np.uint8), count=count, bitorder="little")
        positions, most = np.flatnonzero(bits), tensors[VALUES].size
        if positions.size > most:
            found, do = f"a mask of {positions.size:,} weights", "ask the coordinator's operator"
            raise ClientFailed("W607", found, f"at most {most:,}, which have values", do)
        write_at(tunable, positions, tensors[VALUES][: positions.size])
        write_into(tunable.named, head_of(tensors))
        return positions

    # --- schemas

    def sizes(self, tunable: TunableModel | Plan) -> tuple[int, int]:
        """How many weights can be voted for, and how many a client votes for. Raises M306 where there are
        none."""
        names = tunable.named.keys() - tunable.of_head
        count = sum(math.prod(tunable.named[name].shape) for name in names)
        if not count:
            found, do = "method.adapter.only, which matches the task head alone", "widen it"
            raise FedtuneError("M306", found, "weights of the model's body, to vote for", do)
        return count, max(1, round(self.settings.density * count))

    def head(self, tunable: TunableModel | Plan) -> list[tuple[str, tuple[int, ...]]]:
        return [(name, tuple(tunable.named[name].shape)) for name in sorted(tunable.of_head)]

    @property
    def verbs(self) -> Mapping[str, Verb]:
        known = super().verbs
        train = replace(
            known["train"],
            given=self.given,
            answer=lambda given, now: Schema(tuple(entry for entry in given.entries if entry[0] != MASK)),
        )
        return {**known, "train": train, VOTE: self.vote_verb()}

    def given(self, tunable: Any, client: int, now: Round) -> Schema:
        count, most = self.sizes(tunable)
        return Schema(tuple(sorted([*self.head(tunable), (MASK, (-(-count // 32),)), (VALUES, (most,))])))

    def vote_verb(self) -> Verb:
        """The question, asked once."""

        def given(tunable: Any, client: int, now: Round) -> Schema:
            count, _ = self.sizes(tunable)
            return Schema(tuple(sorted([*self.head(tunable), (BALLOT, (count, 0))])))

        def answer(given: Schema, now: Round) -> Schema:
            width = ballots.width_for(len(now.members))
            name, words = f"{VOTES}{width}", ballots.words_for(given.shapes[BALLOT][0], width)
            return Schema(((name, (words,)),), ((name, "int64", ballots.most_of(width)),))

        shows = (
            "a bit for each weight: whether it is among those that moved most in a training by itself; not "
            "how far, nor in which direction"
        )
        return Verb(self.vote, given, answer, whole=True, once=True, shows=shows)

    # --- on each client

    def vote(self, client: Client, given: Tensors, now: Round) -> Update:
        """A ballot, from a training of all weights, whose values stay here."""
        from fedtune.model.fit import fit
        from fedtune.model.masked_weights import most_moved, write_at
        from fedtune.model.open_tensors import write_into

        tunable: TunableModel = client.model
        nothing = np.zeros(0, np.int64)
        write_at(tunable, nothing, np.zeros(0, np.float32))
        write_into(tunable.named, head_of(given))
        fit(tunable, client.data, self.before_voting, seed_of("vote", now.seed, now.number, client.id))
        count, most = self.sizes(tunable)
        width = ballots.width_for(len(now.members))
        words = ballots.packed(most_moved(tunable, most), count, width)
        return Update({f"{VOTES}{width}": words}, 1.0)

    @property
    def before_voting(self) -> TrainSettings:
        """How clients train for their vote."""
        s = self.settings
        return s.train.model_copy(update={"steps": s.vote_steps}) if s.vote_steps else s.train

    def train(self, client: Client, given: Tensors, now: Round) -> Update:
        from fedtune.model.fit import fit
        from fedtune.model.masked_weights import read_at, training_at

        tunable: TunableModel = client.model
        positions = self.write(tunable, given)
        seed = seed_of("train", now.seed, now.number, client.id)
        turn = (now.number - 1, self.rounds)
        with training_at(tunable, positions):
            report = fit(tunable, client.data, self.settings.train, seed, progress=turn)
        values = np.array(given[VALUES])
        values[: positions.size] = read_at(tunable, positions)
        head = {name: tunable.read_one(name) for name in head_of(given)}
        weight = weight_of(self.settings.weight, client, report.loss)
        return Update.of({VALUES: values, **head}, weight, figures(self.settings, report))

    # --- around a run

    def alone(self, tunable: TunableModel, data: Encoded, state: State, seed: int) -> None:
        """A run of one client, which votes by itself."""
        from fedtune.model.fit import fit
        from fedtune.model.masked_weights import training_at

        self.started = tunable
        begun = self.begin(state, OneClient(self.verbs, Client(0, "alone", tunable, data), seed))
        positions = self.write(tunable, begun.shared)
        with training_at(tunable, positions):
            fit(tunable, data, whole_run(self.settings.train, self.rounds), seed, progress=(0, 1))

    @property
    def facts(self) -> Facts:
        s, known = self.settings, super().facts
        return replace(known, title=f"ltsft / {100 * s.density:g} % of the weights, {s.elect} of votes")

    @property
    def capabilities(self) -> Capabilities:
        return replace(super().capabilities, costs=LTSFTCosts(self.settings, self))


class LTSFTCosts(AdapterCosts):
    """Of ordinary training of all weights that can be voted for: masked ones have gradients and moments."""

    def __init__(self, settings: LTSFTTable, method: LTSFT) -> None:
        super().__init__(settings)
        self.method = method

    def remarks(self, recipe: Any, labels: int, rows: float) -> list[str]:
        count, most = self.method.sizes(self.plan(recipe.model, recipe.data.task, labels))
        return [f"mask      {most:,} of {count:,} weights; each client of the first round votes for so many"]


def head_of(tensors: Tensors) -> dict[str, np.ndarray]:
    """The task head's tensors of a state, or of what is given with a vote."""
    return {name: value for name, value in tensors.items() if name not in (MASK, VALUES, BALLOT)}
