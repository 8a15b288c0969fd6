"""The attacks of fedtune.model.update_inversion, fedtune.model.membership and, where it is asked for,
fedtune.model.gradient_matching on a recipe's own updates: of one small batch of a client, as whoever listens
at each place sees it.

    without protection  the client's answer, without the recipe's chain and private training
    to the coordinator  what it can read: the answer behind the chain, or under a mask the members' sum
    to everybody        the next state: the members' sum, with all noise that is added to it
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune import transforms
from fedtune.config import Recipe, method_of
from fedtune.errors import FedtuneError
from fedtune.privacy.settings import PrivateTraining
from fedtune.rng import stream
from fedtune.runtime.protocol import Given, given_to
from fedtune.runtime.sampling import sample
from fedtune.runtime.task import tasks_of
from fedtune.runtime.workspace import Workspace, workspace_of
from fedtune.transforms.private import PrivateSettings
from fedtune.types import Client, Round, State, Tensors, Update

if TYPE_CHECKING:
    from fedtune.methods import Method
    from fedtune.model.encode import Encoded
    from fedtune.model.gradient_matching import Matched
    from fedtune.model.update_inversion import Found

MOST = 10  # members whose training is worth the time
BEGIN = 1000  # rows of all of them that a head starts from, which is not what is attacked


@dataclass(frozen=True)
class Seen:
    """What the attacks found at one place.

    members  answers in what is seen there
    classes, words  None: nothing to find, or no attack for what is trained
    update, loss    AUC of the membership attacks
    matched         what gradient matching found; None: it was not tried
    """

    place: str
    members: int
    classes: Found | None
    words: Found | None
    update: float
    loss: float
    matched: Matched | None = None


@dataclass(frozen=True)
class Leaks:
    """seen    by place
    client  whose rows were attacked
    rows    as many were trained on, and as many others compared with them
    spread  standard deviation of an AUC by chance
    """

    seen: tuple[Seen, ...]
    client: str
    rows: int
    spread: float


def update_leaks(
    recipe: Recipe, client: int, examples: int, steps: int = 0, tell: Callable[[str], None] = print
) -> Leaks:
    """`steps` are of gradient matching, at each place; `tell` is told what they will take, beforehand.

    Raises C103 for a client that is not there, or has too few rows; C104 for a method whose updates are not
    one sum, for pairs of responses, and for gradient matching on what has no classes of texts.
    """
    if steps and recipe.data.task != "classify":
        raise FedtuneError(
            "C104",
            f"leak-test --match with data.task = '{recipe.data.task}'",
            "texts with classes (data.task = 'classify'): where words are predicted, they are labels, too",
            "leave --match out; what LoRA's A has read is searched for words anyway",
        )
    if recipe.data.task == "preference":
        raise FedtuneError(
            "C104",
            "leak-test with data.task = 'preference'",
            "rows each of which has a cross entropy: causal-lm, instruct, classify, image-classify",
            "test a recipe of another task on the same adapter",
        )
    # who attacks holds the base in float32: between weights of fewer bits small moves vanish
    whole = recipe.model.model_copy(update={"dtype": "float32"})
    recipe = recipe.model_copy(update={"model": whole})
    workspace = workspace_of(recipe)
    if client not in workspace.names or examples < 2:
        raise FedtuneError(
            "C103",
            f"--client {client} --examples {examples}",
            f"a client below {len(workspace.names)}, and two examples or more",
            "correct these options",
        )
    method = method_of(recipe)
    if "train" not in method.verbs or method.verbs["train"].by_group:
        raise FedtuneError(
            "C104",
            f"leak-test with method.type = '{recipe.method.type}'",
            "fedpeft, fedkseed or sfprompt",
            "change method.type for the test",
        )
    rows = len(workspace.train(client))
    count = min(examples, rows // 2)
    if count < 2:
        found = f"{rows} training rows at client {client}"
        raise FedtuneError("C103", found, "four or more: half are trained on", "choose another --client")
    asked = sample(recipe.sampling, len(workspace.names), recipe.seed, 1)
    members = tuple(sorted({client, *[one for one in asked if one != client][: MOST - 1]}))
    now = Round(1, recipe.seed, members)
    data = {one: drawn(workspace, one, 0, count) for one in members}
    others = drawn(workspace, client, count, 2 * count)
    tunable = workspace.tunable
    more = {one: drawn(workspace, one, 0, BEGIN // len(members)) for one in members}
    start, begin = method.start(tunable), method.capabilities.begin
    start = begin(start, Overheard(workspace, recipe, now, more, members)) if begin else start
    places = list(views(recipe, client, members))
    if steps:
        from fedtune.model.gradient_matching import seconds

        method.install(start, tunable)
        most = seconds(tunable, data[client], steps) * len(places)
        tell(f"gradient matching: {steps} steps at {len(places)} places, at most about {most:.0f} s")
    seen = tuple(attacked(workspace, view, start, now, data, client, others, steps) for view in places)
    from fedtune.model.membership import by_chance

    return Leaks(seen, workspace.names[client], count, by_chance(count, len(others)))


@dataclass(frozen=True)
class View:
    """A place, the recipe of what can be read there, and whose answers are in it."""

    place: str
    recipe: Recipe
    members: tuple[int, ...]


def views(recipe: Recipe, client: int, members: tuple[int, ...]) -> Iterator[View]:
    """Without a mask, whose sums are exactly those of `ring`."""
    steps = tuple(step for step in recipe.chain if step.step != "mask")
    masked = len(steps) < len(recipe.chain) or any(s.step == "private" and s.place == "shares" for s in steps)
    quiet = tuple(
        step.model_copy(update={"noise_multiplier": 0.0})
        if isinstance(step, PrivateSettings) and step.place == "coordinator"
        else step
        for step in steps
    )
    bare = recipe.model_copy(update={"chain": (), "method": unprotected(recipe)})
    yield View("without protection", bare, (client,))
    if recipe.chain or recipe.method.spends:
        behind = recipe.model_copy(update={"chain": quiet})
        yield View("to the coordinator", behind, members if masked else (client,))
    yield View("to everybody", recipe.model_copy(update={"chain": steps}), members)


def unprotected(recipe: Recipe) -> Any:
    """The method's table with ordinary training."""
    if not recipe.method.spends:
        return recipe.method
    table: Any = recipe.method
    return table.model_copy(update={"train": table.train.model_copy(update={"private": PrivateTraining()})})


class Overheard:
    """A cohort in this process whose answers go through the chain and nothing travels."""

    def __init__(
        self,
        workspace: Workspace,
        recipe: Recipe,
        now: Round,
        data: Mapping[int, Encoded],
        members: Sequence[int],
    ) -> None:
        self.workspace, self.data, self.members = workspace, data, members
        self.now = replace(now, members=tuple(members))
        steps = [step for step in recipe.chain if step.step != "mask"]
        self.tasks = tasks_of(method_of(recipe), transforms.build(steps), "leak-test")

    def answers(self, verb: str, given: Callable[[int], Tensors]) -> Iterator[tuple[int, Update]]:
        task = self.tasks[verb]
        for number in self.members:
            here: Client = replace(self.workspace.client_with(number, {}), data=self.data[number])
            near = task.near(given(number))
            update = task.work(here, given(number), self.now)
            sent = task.chain.send(update, here, self.now, near)
            yield number, task.chain.receive(sent, number, self.now)

    def sum(self, verb: str, given: Given) -> Update:
        total: Update | None = None
        for _, update in self.answers(verb, lambda number: given_to(number, given)):
            total = update if total is None else total + update
        assert total is not None
        task = self.tasks[verb]
        return task.chain.settle(total, self.now, task.near(given_to(self.members[0], given)))

    def each(self, verb: str, given: Any, among: Sequence[int] | None = None) -> Iterator[tuple[int, Update]]:
        to = given if callable(given) else lambda number: given
        task = self.tasks[verb]
        for number, update in self.answers(verb, to):
            yield number, task.chain.settle(update, self.now, task.near(to(number)))

    def sum_groups(self, *args: Any, **options: Any) -> Any:
        raise NotImplementedError("no method with groups gets here")

    def typical(self, name: str) -> float:
        return 0.0

    def note(self, name: str, value: float) -> None:
        """Nobody reads it."""

    def skip(self, error: FedtuneError) -> None:
        raise error


def attacked(
    workspace: Workspace,
    view: View,
    start: State,
    now: Round,
    data: Mapping[int, Encoded],
    client: int,
    others: Encoded,
    steps: int,
) -> Seen:
    from fedtune.model.gradient_matching import match
    from fedtune.model.membership import auc, cosines, losses
    from fedtune.model.update_inversion import classes_in, difference, words_in

    method, tunable = method_of(view.recipe), workspace.tunable
    after = method.round(start, Overheard(workspace, view.recipe, now, data, view.members), now)
    tensors = [standing(method, state, workspace) for state in (start, after)]
    moved = difference(tensors[1], tensors[0])
    fell = [losses(tunable, rows) for rows in (data[client], others)]  # as the model stands after
    method.install(start, tunable)
    before = [losses(tunable, rows) for rows in (data[client], others)]
    asks = [cosines(tunable, rows, moved) for rows in (data[client], others)]
    single = view.recipe.method.local_steps == 1
    return Seen(
        view.place,
        len(view.members),
        classes_in(tunable, moved, data[client]),
        words_in(tunable, moved, data[client]),
        auc(*asks),
        auc(before[0] - fell[0], before[1] - fell[1]),
        match(tunable, moved, data[client], steps, single) if steps else None,
    )


def standing(method: Method, state: State, workspace: Workspace) -> dict[str, np.ndarray]:
    """The trained tensors of a state, which stays in the tunable model."""
    method.install(state, workspace.tunable)
    return workspace.tunable.read()


def drawn(workspace: Workspace, client: int, start: int, end: int) -> Encoded:
    """Some of a client's examples, in an order that the seed draws: a source's may be class by class."""
    encoded = workspace.train(client)
    order = stream("leak test", workspace.recipe.seed, client).permutation(len(encoded))
    return encoded.some(order[start:end].tolist())


def sentences(found: Leaks) -> list[str]:
    """The report as lines of text."""
    lines = [
        f"{found.rows} rows of '{found.client}' in round 1, trained on as the recipe says; beside "
        f"{found.rows} rows of its own that were not. AUC by chance: 0.50 +- {found.spread:.2f}"
    ]
    for seen in found.seen:
        whose = "its answer" if seen.members == 1 else f"the sum of {seen.members}"
        told = [
            f"{name} {said(one)}" for name, one in (("classes", seen.classes), ("words", seen.words)) if one
        ]
        if seen.matched:
            one = seen.matched
            told.append(
                f"words {said(one.words)}, whose cosine with the update is {one.guess:.2f} (of the rows "
                f"themselves {one.truth:.2f})"
            )
        told.append(f"membership AUC {seen.update:.2f} by the update, {seen.loss:.2f} by the loss")
        lines.append(f"{seen.place:<19} ({whose}): {'; '.join(told)}")
    lines.append(
        "That these attacks find little protects nobody: better ones are known. Masks hide who said what, "
        "not what a sum says; only noise that is counted as epsilon bounds every attack."
    )
    return lines


def said(found: Found) -> str:
    return f"{found.found} of {found.sought} by {found.how} (by chance {found.chance * found.sought:.1f})"
