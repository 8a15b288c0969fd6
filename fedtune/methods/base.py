"""What most methods do alike: a state that is the tunable model's tensors, one verb `train`, ordinary local
training. Override what yours does otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from fedtune.methods.head_start import (
    HeadNoise,
    HeadStart,
    features_verbs,
    kept_until_started,
    noise_conflicts,
    start_conflicts,
    started,
)
from fedtune.methods.interface import Capabilities, Facts, MethodTable, Verb
from fedtune.methods.one_client import begin_alone
from fedtune.methods.weights import TELLS, Weight, weight_of
from fedtune.model.adapters import Adapter, AdapterSettings, Lora
from fedtune.model.rates import rate_conflicts, rates_of, with_rates
from fedtune.model.settings import (
    ModelSettings,
    TrainSettings,
    adapter_conflicts,
    at_once,
    float16_conflicts,
    whole_run,
)
from fedtune.privacy.releases import Release
from fedtune.rng import seed_of
from fedtune.schema import Schema
from fedtune.types import Client, Cohort, Round, State, Sums, Tensors, Update

if TYPE_CHECKING:
    from fedtune.model.base import Base
    from fedtune.model.encode import Encoded
    from fedtune.model.fit import FitReport
    from fedtune.model.memory_plan import Plan
    from fedtune.model.objectives import Objective
    from fedtune.model.tunable import TunableModel


class TrainedTable(MethodTable):
    """[method] of a method whose clients train for some steps or epochs."""

    weight: Weight = "rows"
    """What a client's answer counts for in the mean: its rows; its tokens that carry loss; equal: as much as
    any other; loss-speed: more where its training loss falls slowly (dynamic weight average)."""
    head_start: HeadStart = "auto"
    """How a fresh task head starts: random; or from sums over clients' features, by class, in one question
    before the first round: means (of each class), ridge (a least-squares map) or lda (linear discriminants),
    the last two for (width x width) more numbers. auto: lda for classes, means where the head has no bias or
    is wider than 1,024; what a file has trained stays."""
    train: TrainSettings = TrainSettings()

    @property
    def objective(self) -> Objective:
        return self.train.objective

    @property
    def local_steps(self) -> int | None:
        return self.train.steps or None

    @property
    def together(self) -> int:
        return self.train.together

    @property
    def trains(self) -> str:
        """Kind of adapter that the training is like, for its learning rate."""
        raise NotImplementedError(f"'{self.type}' does not say what it trains")

    def at_once(self, clients: int) -> Self:
        return self.model_copy(update={"train": at_once(self.train, clients)})

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        yield from rate_conflicts(self.train, self.trains, rates_of(self.trains))
        yield from float16_conflicts(recipe)
        yield from start_conflicts(self.head_start, recipe)

    def require(self, base: Base) -> None:
        from fedtune.model.packing import require

        require(self.train, base)

    @property
    def rates_open(self) -> bool:
        return self.train.open

    @property
    def rates(self) -> str:
        return self.train.rates

    def with_rates(self, width: int) -> Self:
        train = with_rates(self.train, rates_of(self.trains), width, self.head_start != "random")
        return self.model_copy(update={"train": train})

    def fitting_rates(self, width: int) -> str:
        return self.model_copy(update={"train": TrainSettings()}).with_rates(width).rates

    def depends_on_rounds(self) -> list[str]:
        return self.train.depends_on_rounds()


class AdapterTable(TrainedTable):
    """[method] of a method that trains an adapter."""

    adapter: AdapterSettings = Lora()
    head_noise: HeadNoise = "off"
    """Makes the class sums of head_start = 'means' private: clients tell the sums of unit features by class
    and nothing beside, under noise of so many times what one row changes them by (1), for
    method.train.private. 0: no noise of their own, where step 'private' or a site's policy covers whole
    answers. off: as they are, with counts and lengths."""

    @property
    def spends(self) -> Release | None:
        return self.train.spends

    @property
    def trains(self) -> str:
        return self.adapter.kind

    def needs_weights(self) -> str:
        return "" if self.adapter.beside else f"method.adapter.kind = '{self.adapter.kind}'"

    def conflicts(self, recipe: Any) -> Iterator[tuple[str, str, str]]:
        yield from super().conflicts(recipe)
        yield from adapter_conflicts(self.train, self.adapter)
        yield from noise_conflicts(self.head_start, self.head_noise, recipe)


def names_of_figures(settings: TrainedTable) -> tuple[str, ...]:
    """Of an answer: private training tells no loss, which no noise would cover."""
    return () if settings.spends else ("loss",)


def figures(settings: TrainedTable, report: FitReport) -> dict[str, float]:
    return dict.fromkeys(names_of_figures(settings), report.loss)


def shown(train: TrainSettings) -> str:
    """What an answer shows of a row, where that is bounded; for the exposure table."""
    p = train.private
    return (
        f"trained privately: no row moves a step's gradient by more than {p.max_grad_norm:g}, under noise of "
        f"{p.noise_multiplier * p.max_grad_norm:g}"
        if train.spends
        else ""
    )


class AveragedTensors:
    """State: the tensors of the tunable model. A round's are the mean of the answers to `train`, and what no
    answer has stays."""

    def __init__(self, head_start: HeadStart, rounds: int, head_noise: HeadNoise = "off") -> None:
        self.head_start, self.rounds, self.head_noise = head_start, rounds, head_noise

    def start(self, tunable: TunableModel) -> State:
        return State(tunable.read(), kept_until_started(self.head_start, tunable, self.head_noise))

    def begin(self, state: State, cohort: Sums) -> State:
        """What is made of questions that are asked once, before the first round's own."""
        return started(self.head_start, state, cohort)

    def round(self, state: State, cohort: Cohort, now: Round) -> State:
        state = self.begin(state, cohort)
        return State({**state.shared, **cohort.sum("train", state.shared).values()}, state.kept)

    def install(self, state: State, tunable: TunableModel) -> None:
        tunable.write(state.shared)


class AdapterMethod(AveragedTensors):
    """FedAvg of an adapter."""

    def __init__(self, settings: AdapterTable, rounds: int) -> None:
        super().__init__(settings.head_start, rounds, settings.head_noise)
        self.settings = settings

    @property
    def facts(self) -> Facts:
        return Facts(
            self.settings.type,
            f"{self.settings.type} / {self.settings.adapter.kind}",
            metrics=names_of_figures(self.settings),
            weight=TELLS[self.settings.weight],
        )

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(costs=AdapterCosts(self.settings), begin=self.begin)

    @property
    def verbs(self) -> Mapping[str, Verb]:
        train = Verb(
            self.train,
            lambda tunable, client, now: Schema.of(tunable.named),
            lambda given, now: given,
            moves=True,
            shows=shown(self.settings.train),
        )
        s = self.settings
        return {"train": train} | features_verbs(s.head_start, noise=s.head_noise)

    def prepare(self, base: Base, seed: int) -> TunableModel:
        return self.attached(base, self.settings.adapter, seed)

    def attached(self, base: Base, adapter: Adapter, seed: int) -> TunableModel:
        """An adapter on a base, as a run of this seed draws it."""
        from fedtune.model.kept_front import attach_tried

        return attach_tried(base, adapter, seed_of("adapter", seed))

    def train(self, client: Client, given: Tensors, now: Round) -> Update:
        from fedtune.model.fit import fit

        tunable: TunableModel = client.model
        tunable.write(given)
        seed = seed_of("train", now.seed, now.number, client.id)
        report = fit(tunable, client.data, self.settings.train, seed, progress=(now.number - 1, self.rounds))
        weight = weight_of(self.settings.weight, client, report.loss)
        return Update.of(tunable.read(), weight, figures(self.settings, report))

    def alone(self, tunable: TunableModel, data: Encoded, state: State, seed: int) -> None:
        from fedtune.model.fit import fit

        begin_alone(self, tunable, data, state, seed)
        fit(tunable, data, whole_run(self.settings.train, self.rounds), seed, progress=(0, 1))

    def export(
        self, form: str, state: State, tunable: TunableModel, folder: Path, card: str, seed: int
    ) -> None:
        from fedtune.model.export import save

        save(form, tunable, folder, card)


class AdapterCosts:
    """Ordinary training of an adapter: plan and memory from config.json."""

    def __init__(self, settings: AdapterTable) -> None:
        self.settings = settings

    def plan(self, model: ModelSettings, task: str, labels: int) -> Plan:
        from fedtune.model.memory_plan import plan

        return plan(model, self.settings.adapter, task, labels)

    def memory(self, plan: Plan, length: int) -> Mapping[str, int]:
        from fedtune.model.memory_plan import training_bytes

        return training_bytes(plan, self.settings.train, length)

    def remarks(self, recipe: object, labels: int, rows: float) -> list[str]:
        return []
