"""What a run gives away of its clients: planned, charged round by round, and ended by a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fedtune.config import Recipe
from fedtune.errors import FedtuneError
from fedtune.events import Noted
from fedtune.methods.head_start import waits
from fedtune.privacy.accountant import Spent, library
from fedtune.privacy.ledger import Line, by_round, by_unit
from fedtune.privacy.releases import UNITS
from fedtune.runtime.folder import RunFolder, recipe_of
from fedtune.runtime.journal import Journal
from fedtune.runtime.sampling import sample
from fedtune.transforms.noise_shares import noise_makers
from fedtune.transforms.private import PrivateSettings

if TYPE_CHECKING:
    from fedtune.runtime.run import Run

BEFORE = "/before"  # ends the name of a draw: of what is asked before the first round's own question
BUDGET = "budget"  # how the journal names why a run ended before its last round
FEW = 30  # clients: below that, hiding one among the others takes more noise than the others can make up for
LARGE = 10.0  # epsilon: whoever looks may be exp(10) = 22,000 times as sure as before


def require_accountant(recipe: Recipe) -> None:
    """A run that is private has to be able to say how much. Raises P901."""
    if recipe.spends:
        library()


def charges(
    recipe: Recipe, number: int, members: Iterable[int], draw: str = "0", before: bool = False
) -> list[Line]:
    """What a round charges, one line for each member and release; `before`: questions before the first
    round's own are asked in it, whose noise is another draw."""
    lines = []
    for client in members:
        lines += [Line(client, number, release, draw=draw) for release in recipe.spends]
        lines += [
            Line(client, number, release, draw=f"{draw}{BEFORE}")
            for release in recipe.spends_before
            if before
        ]
    return lines


def planned(recipe: Recipe, clients: int, rounds: int) -> list[Line]:
    """All charges of so many rounds, with the members that will be asked."""
    return [
        line
        for number in range(1, rounds + 1)
        for line in charges(
            recipe, number, sample(recipe.sampling, clients, recipe.seed, number), before=number == 1
        )
    ]


def affordable(recipe: Recipe, clients: int) -> int:
    """How many of the planned rounds the budget allows."""
    if not recipe.privacy.budget:
        return recipe.rounds
    low, high = 0, recipe.rounds  # what is spent only grows
    while low < high:
        middle = (low + high + 1) // 2
        fits = within(planned(recipe, clients, middle), recipe)
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def within(lines: Sequence[Line], recipe: Recipe) -> bool:
    """Whether what these charges come to is known and inside the budget, for each unit by itself."""
    units = by_unit(lines, recipe.privacy.delta).values()
    return all(spent.epsilon <= recipe.privacy.budget for spent in units)


def charge(work: Run, number: int, members: Sequence[int]) -> bool:
    """Write a round's charges into the ledger, before anybody is asked; False, and nothing written, where the
    budget does not allow the round, and why. Raises P902 where it does not allow the first one."""
    recipe, journal = work.recipe, work.journal
    if not recipe.spends:
        return True
    lines = charges(recipe, number, members, journal.ledger.draw(number), waits(work.state))
    known = journal.charges()
    there = {(line.client, line.round, line.draw) for line in known}
    new = [line for line in lines if (line.client, line.round, line.draw) not in there]
    if recipe.privacy.budget and new and not within([*known, *new], recipe):
        would = worst(by_unit([*known, *new], recipe.privacy.delta))
        found = f"{would} after round {number}"
        if number == 1:
            raise FedtuneError(
                "P902", found, f"at most {recipe.privacy.budget:g}", "add noise, or raise privacy.budget"
            )
        said = f"stopped after round {number - 1}: found {found}, expected at most {recipe.privacy.budget:g}"
        journal.finish(BUDGET, {"after": number - 1, "said": said})
        work.tell(Noted(f"{said} (privacy.budget)"))
        return False
    journal.charge(lines)
    return True


def worst(units: dict[str, Spent]) -> Spent:
    """The unit of which most was given away; what is unknown is the most."""
    return max(units.values(), key=lambda spent: (math.isnan(spent.epsilon), spent.epsilon))


def told(recipe: Recipe, journal: Journal) -> dict[str, Any]:
    """For result.json: epsilon (null where nothing is private, or it is unknown or unbounded), and a sentence
    for each unit."""
    found = by_unit(journal.charges(), recipe.privacy.delta)
    if not found:
        return {"epsilon": None, "privacy": []}
    most = worst(found).epsilon
    return {
        "epsilon": most if math.isfinite(most) else None,
        "privacy": [f"{spent}; hidden: {UNITS.get(unit, unit)}" for unit, spent in sorted(found.items())],
    }


def epsilon_by_round(folder: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """What a run has given away after each round, by unit; {} where nothing is private, or nobody here can
    count it. As `by_round`."""
    if not folder.journal.exists() or not (recipe := recipe_of(folder)).spends:
        return {}
    journal = Journal(folder.journal)
    try:
        return by_round(journal.charges(), recipe.privacy.delta)
    except FedtuneError as error:
        if error.code != "P901":
            raise
        return {}
    finally:
        journal.close()


def in_words(recipe: Recipe, clients: int, trained: int) -> list[str]:
    """For `fedtune check`: epsilon of the planned rounds, whom it protects, and where it means little."""
    if not recipe.spends:
        return []
    rounds = affordable(recipe, clients)
    if not rounds:
        charged = worst(by_unit(planned(recipe, clients, 1), recipe.privacy.delta))
        return [f"privacy   the budget of {recipe.privacy.budget:g} does not allow one round: {charged}"]
    spent = by_unit(planned(recipe, clients, rounds), recipe.privacy.delta)
    said = [
        f"privacy   {one} after {rounds} rounds; hidden: {UNITS[unit]}" for unit, one in sorted(spent.items())
    ]
    if recipe.spends_before:
        first = by_unit(before_first(recipe), recipe.privacy.delta)
        said += [
            f"privacy   {one} of it for the class sums before the first round"
            for _, one in sorted(first.items())
        ]
    if rounds < recipe.rounds:
        said.append(
            f"privacy   the budget of {recipe.privacy.budget:g} ends the run after round {rounds} of "
            f"{recipe.rounds}"
        )
    if "client" in spent:
        said += doubts(recipe, clients, trained, spent["client"])
    return said


def before_first(recipe: Recipe) -> list[Line]:
    """What a client is charged before the first round's own question."""
    return [Line(0, 1, release) for release in recipe.spends_before]


def more_noise(recipe: Recipe, asked: int) -> float:
    """How many times as long the noise in a sum of all answers is as what is promised of it."""
    for step in recipe.chain:
        if isinstance(step, PrivateSettings):
            makers = {"client": 1, "shares": noise_makers(step.honest, asked)}
            return math.sqrt(asked / makers.get(step.place, asked))
    return 1.0


def doubts(recipe: Recipe, clients: int, trained: int, spent: Spent) -> list[str]:
    """Why an epsilon of whole clients may be meaningless here."""
    asked = len(sample(recipe.sampling, clients, recipe.seed, 1))
    noise = max(release.noise for release in recipe.spends if release.unit == "client")
    ratio = noise * math.sqrt(trained) * more_noise(recipe, asked) / asked
    said = [
        f"privacy   the noise in a round's mean is {ratio:,.3g} times as long as the longest mean can be "
        f"({asked} clients, {trained:,} numbers)"
    ]
    if spent.epsilon > LARGE:
        said.append(f"privacy   meaningless: an epsilon above {LARGE:g} hides nobody from a close look")
    if clients < FEW:
        said.append(
            f"privacy   meaningless with {clients} clients: one of so few cannot hide among the others; "
            "method.train.private hides rows instead"
        )
    if recipe.privacy.delta * clients >= 1:
        said.append(
            f"privacy   meaningless: a delta of {recipe.privacy.delta:g} allows that one of {clients} "
            "clients is shown whole"
        )
    return said
