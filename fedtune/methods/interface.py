"""What a federated method is: a table of settings that builds it, both halves of the algorithm, and what else
it can do.

Both halves stand in one class: `round` runs on the server, the work of a verb on each client. A method that
averages one number:

    >>> import numpy as np
    >>> from fedtune.methods.interface import Capabilities, Facts, Verb
    >>> from fedtune.schema import Schema
    >>> from fedtune.types import Client, Round, State, Update
    >>> class Average:
    ...     facts = Facts("average", "average / one number", forms=(), metrics=())
    ...     capabilities = Capabilities()
    ...     @property
    ...     def verbs(self):  # what clients can be asked
    ...         given = lambda tunable, client, now: Schema.of(tunable)
    ...         return {"tell": Verb(self.tell, given, lambda given, now: given)}
    ...     def tell(self, client, given, now):  # the client's half
    ...         return Update.of({"x": np.float32([client.data])}, weight=1.0)
    ...     def start(self, tunable):
    ...         return State(tunable)
    ...     def round(self, state, cohort, now):  # the server's half: it sees the sum only
    ...         return State(cohort.sum("tell", state.shared).values())

Asked by a cohort that adds up what its clients say, it finds their mean:

    >>> class Cohort:
    ...     def sum(self, verb, given):
    ...         clients = [Client(number, f"client-{number}", None, number) for number in range(4)]
    ...         first, *others = (method.verbs[verb].work(client, given, now) for client in clients)
    ...         return sum(others, first)
    >>> method, now = Average(), Round(1, seed=1, members=(0, 1, 2, 3))
    >>> method.round(method.start({"x": np.float32([0])}), Cohort(), now).shared["x"].tolist()
    [1.5]

The runtime asks a method for nothing beside what stands here: no attribute is looked up by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fedtune.errors import ClientFailed
from fedtune.privacy.releases import Release
from fedtune.schema import Schema
from fedtune.settings import Settings
from fedtune.types import Client, Cohort, Round, State, Sums, Tensors, Update

if TYPE_CHECKING:
    from fedtune.aggregate import Rule
    from fedtune.methods.split import Split
    from fedtune.model.base import Base
    from fedtune.model.memory_plan import Plan
    from fedtune.model.objectives import Objective
    from fedtune.model.settings import ModelSettings


class Together(Protocol):
    """The same for several clients at once: an answer or a failure for each, in their order."""

    def __call__(
        self, clients: Sequence[Client], given: Sequence[Tensors], now: Round
    ) -> Sequence[Update | ClientFailed]: ...


class Work(Protocol):
    """A client's half of a verb: what it does when asked."""

    def __call__(self, client: Client, given: Tensors, now: Round) -> Update: ...


@dataclass(frozen=True)
class Verb:
    """One question that clients can be asked.

    work        the client's half
    given       tunable model, client's number, round -> the schema of what this client is given, so that it
                can refuse anything else before it allocates
    late        it is asked in a run's last rounds, in the place of others: no part of an ordinary round
    otherwise   the same arguments -> other schemas of what a client may be given in the place of `given`,
                where the recipe alone does not say how large that is; a message names one by its fingerprint
    answer      schema given, round -> the schema of the answer, for the same reason on the server
    reads_each  the server reads single answers, not only their sum
    by_group    the server adds up answers group by group (`Cohort.sum_groups`), and sees each group's sum
    moves       the answer is the given tensors, moved: under a chain, the difference travels, and the
                downlink may be lossy
    holds       clients keep the whole numbers that they are given, so that later only changes need travel
    whole       answers are whole numbers, exact at any weight
    directed    only the direction of an answer counts, and nothing else is in it: whatever length it is
                given, and noise on it, change no more than that
    spends      what an answer gives away of a row, where noise at the client bounds it
    shows       what an answer shows of a client's data, where that is more than a trained model does
    once        a client is asked it once in a run: before the first round's own question, or when it is
                first needed; its answer goes through no code
    together    so many clients at most can be asked at once, and how; (1, None) where each is asked alone
    applies     tunable model or plan -> whether it is asked of such a model
    """

    work: Work
    given: Callable[[Any, int, Round], Schema]
    answer: Callable[[Schema, Round], Schema]
    reads_each: bool = False
    by_group: bool = False
    moves: bool = False
    holds: bool = False
    whole: bool = False
    directed: bool = False
    spends: Release | None = None
    shows: str = ""
    once: bool = False
    together: tuple[int, Together | None] = (1, None)
    applies: Callable[[Any], bool] = lambda tunable: True
    late: bool = False
    otherwise: Callable[[Any, int, Round], Iterable[Schema]] | None = None


@dataclass(frozen=True)
class Facts:
    """What reports say of a method.

    type     as in the recipe
    title    type and what is trained
    forms    in which a state can be exported; a run leaves the first
    metrics  names of the figures that an answer carries
    weight   what the weight of an answer tells of its client
    """

    type: str
    title: str
    forms: tuple[str, ...] = ("adapter", "merged")
    metrics: tuple[str, ...] = ("loss",)
    weight: str = "the number of its rows or tokens, or 1"


class Costs(Protocol):
    """What `fedtune check` and the fit of a device need to know, from config.json alone: no weights are
    read."""

    def plan(self, model: ModelSettings, task: str, labels: int) -> Plan:
        """What would be trained."""

    def memory(self, plan: Plan, length: int) -> Mapping[str, int]:
        """What a client at work needs, in bytes, by what for; `length` is that of the longest input."""

    def remarks(self, recipe: Any, labels: int, rows: float) -> list[str]:
        """Further lines for `fedtune check`; `rows` is the mean number of training rows of a client."""


class Ranks(Protocol):
    """Clients whose adapters differ in rank."""

    def of(self, client: int) -> int:
        """The rank of a client, by its number."""

    def trained(self, plan: Plan, client: int) -> int:
        """How many values a client trains."""


@dataclass(frozen=True)
class RunEnd:
    """What a run has when it is through.

    start    the state before the first round
    state    the one that is kept
    tunable  the model that clients and server share in this process
    pooled   gives all clients' training rows in one place, encoded
    seed     for a training beside the run
    """

    start: State
    state: State
    tunable: Any
    pooled: Callable[[], Any]
    seed: int


@dataclass(frozen=True)
class Capabilities:
    """What only some methods can do; None where a method cannot.

    costs     memory and bytes before a run
    ranks     clients of different ranks
    shrink    state, tunable, rank -> the best adapter of that rank in the tunable model; returns the
              share of the norm that is lost
    split     the model is held in parts by different parties
    begin     state, cohort -> the state behind what is asked once, before the first round's own question
    verify    refuse to install a state that was made from another start (M304)
    also_see  who sees more of clients' data, or of the model, than the server sees of an answer -> what
    also_scored  models that say what the run's own is worth, for the test set -> how each is made of a run
              that is through. The method of one place that has all rows is asked
    """

    costs: Costs | None = None
    ranks: Ranks | None = None
    shrink: Callable[[State, Any, int], float] | None = None
    split: Split | None = None
    begin: Callable[[State, Sums], State] | None = None
    verify: Callable[[State, Any], None] | None = None
    also_see: Mapping[str, str] = field(default_factory=dict)
    also_scored: Mapping[str, Callable[[RunEnd], Any]] = field(default_factory=dict)


class Method(Protocol):
    """Both halves of a federated algorithm. methods/base.py has the ordinary answers for whoever wants
    them."""

    @property
    def facts(self) -> Facts: ...

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def verbs(self) -> Mapping[str, Verb]: ...

    def prepare(self, base: Any, seed: int) -> Any:
        """Base model -> the tunable model that clients and server share in this process."""

    def start(self, tunable: Any) -> State:
        """The state before the first round."""

    def round(self, state: State, cohort: Cohort, now: Round) -> State:
        """The server's half of one round."""

    def install(self, state: State, tunable: Any) -> None:
        """Put a state into the tunable model, to evaluate or to export it."""

    def alone(self, tunable: Any, data: Any, state: State, seed: int) -> None:
        """Train from a state on one client's data, for the steps of a client that takes part in every round;
        the result stays in the tunable model."""

    def export(self, form: str, state: State, tunable: Any, folder: Path, card: str, seed: int) -> None:
        """Write an installed state in one of the forms, with its card; `seed` is the run's."""


class MethodTable(Settings):
    """[method]: which method, and its settings. A method is registered by its table's place in
    `MethodSettings`."""

    type: str
    own_loop: ClassVar[bool] = False
    """Whether clients train by the local loop and nothing else, so that a site's own may stand in for it."""

    @property
    def residual(self) -> str:
        """The setting under which a residual stands beside the adapter from the start; "" for none."""
        return ""

    def build(self, rounds: int, rule: Rule) -> Method:
        """The method for a run of so many rounds, under an aggregation rule."""
        raise NotImplementedError(f"'{self.type}' builds no method")

    def at_once(self, clients: int) -> MethodTable | None:
        """The settings of one place each of whose steps takes the batches of so many clients; None where
        steps cannot, and it makes as many times more of them."""
        return None

    @property
    def spends(self) -> Release | None:
        """What one answer gives away of a row, where training bounds it."""
        return None

    @property
    def objective(self) -> Objective | None:
        """What clients train by; None where no recipe chooses that."""
        return None

    @property
    def local_steps(self) -> int | None:
        """Of a client in a round; None where epochs count, or where no recipe says."""
        return None

    @property
    def public(self) -> str:
        """A file or folder of rows, in the form of [data], with which the model's owner prepares it; "" where
        there are none."""
        return ""

    @property
    def together(self) -> int:
        """So many clients may go through the model in one pass."""
        return 1

    @property
    def takes_turns(self) -> bool:
        """Whether an adapter may have tensors that are trained in some rounds only (`Adapter.turn`)."""
        return False

    def trains_alone(self, rule: Any) -> str:
        """What keeps several clients from being trained in one pass, as a setting; "" where nothing does."""
        return f"method.type = '{self.type}'"

    def rounds_well(self, rule: Any) -> bool:
        """Whether the state loses nothing that shows when it travels to clients in 8 bits."""
        return False

    def needs_weights(self) -> str:
        """What needs the base's own weights as they are in its file, rather than in 4 or 8 bits, as a
        setting; "" where nothing does."""
        return f"method.type = '{self.type}'"

    @property
    def undecided(self) -> str:
        """What has to be known of the clients before the run begins, as a key; "" where the table says
        everything."""
        return ""

    def decided(
        self, recipe: Any, memory: Sequence[int] = (), labels: int | None = None, least: bool = False
    ) -> MethodTable:
        """The table with everything said, as somebody could have written it by hand.

        memory  bytes that each client has for training, by client number, as they reported it; () where they
                did not
        labels  size of the label set; None reads the data for it
        least   a client in whose memory nothing fits is given the least that there is; otherwise that is
                refused (M308)
        """
        return self

    def require(self, base: Base) -> None:
        """Raises C104 or M306 where the model, with its tokenizer, lacks what the table needs."""

    @property
    def rates_open(self) -> bool:
        """Whether a learning rate says "auto"."""
        return False

    @property
    def rates(self) -> str:
        """The learning rates, in words."""
        return ""

    def with_rates(self, width: int) -> MethodTable:
        """The table with numbers for "auto", for a model whose hidden states are so wide."""
        return self

    def fitting_rates(self, width: int) -> str:
        """What the learning rates would be if they all said "auto", in words; "" where nobody knows."""
        return ""

    @property
    def provisional(self) -> MethodTable:
        """The table as the server itself is, where clients are undecided: enough to plan with."""
        return self

    def explain(self, recipe: Any, names: Sequence[str], plan: Plan) -> tuple[MethodTable, list[str]]:
        """For `fedtune check`: the decided table, and why, in lines."""
        return self, []

    def depends_on_rounds(self) -> list[str]:
        """Settings that look at the number of rounds while they train, so that a longer run is another run
        from its first round on."""
        return []
