"""What a recipe would do, before anything runs: clients, bytes, memory, exposure. No weights are read or
downloaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fedtune import transforms
from fedtune.config import Recipe, method_of, with_rates
from fedtune.data import Federation, Slice, histogram, load
from fedtune.errors import FedtuneError
from fedtune.methods import Method, Verb
from fedtune.runtime import privacy
from fedtune.runtime.exposure import Exposure, exposure
from fedtune.runtime.kept_fronts import fronts_in_one_place, kept_fronts
from fedtune.runtime.masked_tasks import STAGES, stage_of, with_masks
from fedtune.runtime.sampling import sample
from fedtune.runtime.task import chain_for, question_of, tasks_of
from fedtune.runtime.workspace import how_to_encode
from fedtune.schema import Schema
from fedtune.transforms.base import Chain
from fedtune.types import Round, Update
from fedtune.wire import EVERYONE, Header, encode, encode_state

if TYPE_CHECKING:
    from fedtune.model.base import Base
    from fedtune.model.memory_plan import Plan

MIB = 2**20
TRIED = 1000  # rows that go through the tokenizer: a second or two


@dataclass(frozen=True)
class Traffic:
    """What a client's questions and answers of a round take: bytes of the messages, and bits of the numbers
    in them."""

    up: float = 0.0
    down: float = 0.0
    up_bits: float = 0.0
    down_bits: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.up + other.up,
            self.down + other.down,
            self.up_bits + other.up_bits,
            self.down_bits + other.down_bits,
        )

    def __mul__(self, share: float) -> Traffic:
        return Traffic(self.up * share, self.down * share, self.up_bits * share, self.down_bits * share)


@dataclass(frozen=True)
class Checked:
    """The answers of `fedtune check`, for people and programs."""

    recipe: Recipe
    method: Method
    federation: Federation
    plan: Plan
    asked: int  # clients per round
    up_bytes: int  # per client and round, header included; with a chain, by its own estimate
    down_bytes: int
    bits: tuple[float, float]  # a trained parameter, up and down, headers left out
    memory: dict[str, int]  # what -> bytes
    exposed: list[Exposure]
    remarks: list[str]  # what else the method has to say of its costs
    ranks: list[str]  # each client's LoRA rank and why, where they differ from the server's
    once: Traffic  # of a client, before the first round


def check(recipe: Recipe) -> Checked:
    """Raises the first mistake that can be found without the weights."""
    federation = federation_of(recipe)
    costs = method_of(recipe.model_copy(update={"method": recipe.method.provisional})).capabilities.costs
    if costs is None:
        raise FedtuneError(
            "C104",
            f"method.type = '{recipe.method.type}' with fedtune check",
            "a method that declares its costs",
            "run it with fedtune simulate",
        )
    base = check_context(recipe, federation.labels)
    plan = costs.plan(recipe.model, recipe.data.task, len(federation.labels))
    table, ranks = recipe.method.explain(recipe, [client.name for client in federation.clients], plan)
    auto = recipe.method.rates_open
    recipe = with_rates(recipe.model_copy(update={"method": table}))
    method, chain = method_of(recipe), transforms.build(recipe.chain)
    asked = len(sample(recipe.sampling, len(federation.clients), recipe.seed, 1))
    total, once, trained = traffic(recipe, method, chain, plan, asked, len(federation.clients))
    needs = dict((method.capabilities.costs or costs).memory(plan, recipe.data.max_length))
    fronts = kept_fronts(recipe, base, federation, TRIED) if plan.keeps_front else []
    needs |= {"outputs of frozen blocks, of the client with most": max(fronts)} if any(fronts) else {}
    mean = sum(len(client.train) for client in federation.clients) / len(federation.clients)
    texts = conversations(recipe, federation) if recipe.data.task in ("instruct", "preference") else []
    said = [
        *(f"model     {note}" for note in base.notes),  # its own head, the order of its classes, its pooling
        *([f"rates     auto: {recipe.method.rates}"] if auto else []),
        *remarks_on_types(recipe, base.load),
        *costs_of_comparing(recipe, asked, len(federation.clients)),
        *texts,
        *costs.remarks(recipe, len(federation.labels), mean),
        *fronts_in_one_place(fronts),
        *unseen(chain),
        *privacy.in_words(recipe, len(federation.clients), plan.trainable),
    ]
    bits = (total.up_bits / trained, total.down_bits / trained)
    return Checked(
        recipe,
        method,
        federation,
        plan,
        asked,
        round(total.up),
        round(total.down),
        bits,
        needs,
        exposure(method, chain, plan, recipe.select),
        said,
        ranks,
        once,
    )


def costs_of_comparing(recipe: Recipe, asked: int, clients: int) -> list[str]:
    """What it takes to train each client alone, where that is more than the run itself."""
    own, alone = asked * recipe.rounds, clients * recipe.rounds * recipe.evaluate.seeds
    if not recipe.evaluate.local or not recipe.data.is_placed or alone <= own:
        return []
    return [
        f"compare   evaluate.local trains each of {clients:,} clients alone: {alone:,} rounds of a client's "
        f"training, where the run has {own:,}; set evaluate.local = false to do without"
    ]


def unseen(chain: Chain) -> list[str]:
    """What nobody can do about a client whose answers are masked."""
    if not chain.hides:
        return []
    return [
        "mask      no single answer is seen: no check of its values and norm, no limits.clip, no "
        "watch.influence, no rule that reads single answers; each site bounds its own (clip of step 'ring'), "
        "and canaries (watch.every) see what the sum did, but not who did it"
    ]


def federation_of(recipe: Recipe) -> Federation:
    """The recipe's clients and rows; of real sites, whose rows are theirs, names and labels."""
    if recipe.data.is_placed:
        return load(recipe.data, recipe.partition, recipe.seed)
    names = recipe.deploy.sites or [f"site {number}" for number in range(recipe.partition.clients)]
    notes = (
        "this recipe names no rows: it is for real sites (fedtune client --data), and what depends on rows "
        "is not known here",
    )
    return Federation(
        tuple(Slice(number, name, [], []) for number, name in enumerate(names)),
        [],
        recipe.data.labels,
        {},
        notes,
    )


def conversations(recipe: Recipe, federation: Federation) -> list[str]:
    """What becomes of the first rows in the tokenizer and its chat template, in lines. Raises what a run
    would: D203, D207, M307."""
    from fedtune.model.memory_plan import encoded_without_weights

    rows = [row for client in federation.clients for row in client.train][:TRIED]
    tried = encoded_without_weights(recipe.model, recipe.data.task, rows, **how_to_encode(recipe.data))
    share = f"of {'the first ' * (len(rows) == TRIED)}{len(rows):,} training rows"
    said = [
        f"texts     {tried.truncated} {share} are longer than {recipe.data.max_length} tokens, "
        f"{tried.dropped} keep no response"
    ]
    return said + [
        f"texts     {count} {share} have messages with '{name}', which the chat template does not show"
        for name, count in tried.unshown.items()
    ]


def check_context(recipe: Recipe, labels: Sequence[str]) -> Base:
    """Raises D207 for texts longer than config.json and the tables of positions allow; the tokenizer may
    allow less. Returns the base without weights."""
    from fedtune.hf.config import locate, refuse_missing_weights
    from fedtune.model.base import context_of
    from fedtune.model.encode import check_length
    from fedtune.model.memory_plan import weightless

    base = weightless(recipe.model, recipe.data.task, labels)
    refuse_missing_weights(locate(recipe.model.name))
    if recipe.data.task != "image-classify":
        check_length(replace(base, context=context_of(base.net)), recipe.data.max_length)
    return base


def remarks_on_types(recipe: Recipe, load: str) -> list[str]:
    """What "auto" stands for here, and a warning of a type that this machine has no arithmetic for."""
    from fedtune.model.base import dtype_of
    from fedtune.model.device import has_bfloat16, pick_device

    stored, device = str(dtype_of(recipe.model)).removeprefix("torch."), pick_device(recipe.model.device)
    chosen = recipe.model.dtype == "auto" and device.type == "cuda"  # on a CPU it is float32 always
    said = [f"dtype     auto: {stored} on {device}"] if chosen else []
    said += [f"load      auto: {load} on {device}"] * (recipe.model.load == "auto")
    if stored == "bfloat16" and not has_bfloat16(device):
        said.append(
            f"dtype     {device} has no arithmetic for bfloat16: a step may take 20 times as long as with "
            "model.dtype = 'float32'"
        )
    return said


def traffic(
    recipe: Recipe, method: Method, chain: Chain, plan: Plan, asked: int, clients: int
) -> tuple[Traffic, Traffic, float]:
    """A mean client's traffic in a round, what comes before the first one, and how many values it trains."""
    total, once, trained, ranks = Traffic(), Traffic(), 0.0, method.capabilities.ranks
    for client, share in alike(method, clients).items():
        for name, verb in method.verbs.items():
            if verb.applies(plan) and not verb.late:
                takes = verb_traffic(recipe, method, chain, plan, name, verb, asked, asked == clients, client)
                if chain.hides and not verb.reads_each:
                    takes += masks_traffic(method, chain, name, asked)
                takes *= share
                total, once = (total, once + takes) if verb.once else (total + takes, once)
        trained += share * (ranks.trained(plan, client) if ranks else plan.trainable)
    return total, once, trained


def alike(method: Method, clients: int) -> dict[int, float]:
    """A client of each rank, and the share of clients that have it; all clients are alike for most
    methods."""
    ranks = method.capabilities.ranks
    if ranks is None:
        return {1: 1.0}
    of_rank: dict[int, list[int]] = {}
    for client in range(clients):
        of_rank.setdefault(ranks.of(client), []).append(client)
    return {same[0]: len(same) / clients for same in of_rank.values()}


def verb_traffic(
    recipe: Recipe,
    method: Method,
    chain: Chain,
    plan: Plan,
    name: str,
    verb: Verb,
    asked: int,
    everyone: bool,
    client: int,
) -> Traffic:
    """One verb in the last round, measured on real messages of zeros; codes by their own estimate of bits a
    value.

    Where everyone is asked, all members hold the broadcast before, on which a downlink may build.
    """
    now = Round(recipe.rounds, recipe.seed, tuple(range(asked)))
    given = verb.given(plan, client, now)
    answer = verb.answer(given, now)
    header = Header("0" * 16, now.number, 1, name, "0" * 64, answer.fingerprint, whole=answer.whole)
    down = len(encode_state(zeros(given), replace(header, client=EVERYONE, schema=given.fingerprint)))
    numbers = {
        name: np.zeros(shape, "int64" if answer.whole else "float64") for name, shape in answer.entries
    }
    up = len(encode(Update(numbers, 1.0, dict.fromkeys(method.facts.metrics, 1.0)), header))
    plain_up, plain_down = (
        8.0 * sum(value.nbytes for value in zeros(schema).values()) for schema in (answer, given)
    )
    chain = chain_for(verb, chain).bound(question_of(name, verb, method))
    if chain.adds:
        sent, stored = chain.sent(answer), "uint32" if verb.moves else "uint64"
        message = Update({name: np.zeros(shape, stored) for name, shape in sent.entries}, 1.0)
        up = len(encode(message, replace(header, schema=sent.fingerprint)))
        up_bits = plain_up = 8.0 * sum(value.nbytes for value in message.tensors.values())
    elif answer.whole:
        up_bits = plain_up
    else:
        up_bits = transforms.bits_per_parameter(chain, answer) * answer.count
    down_bits = recipe.downlink.bits(given)[everyone] * given.count if verb.moves else plain_down
    return Traffic(
        round(up - (plain_up - up_bits) / 8), round(down - (plain_down - down_bits) / 8), up_bits, down_bits
    )


def masks_traffic(method: Method, chain: Chain, name: str, asked: int) -> Traffic:
    """The questions of a masked sum beside the masked one, measured on messages of zeros."""
    tasks, now = with_masks(tasks_of(method, chain, "0" * 16), "0" * 16), Round(1, 0, tuple(range(asked)))
    total = Traffic()
    for stage in STAGES:
        verb = stage_of(name, stage, 1)
        given = tasks[verb].given(None, 1, now)
        answer = tasks[verb].answer(given, now)
        header = Header("0" * 16, now.number, 1, verb, "0" * 64, answer.fingerprint, whole=answer.whole)
        nothing = Update({key: np.zeros(shape, np.int64) for key, shape in answer.entries}, 1.0)
        rows = {key: np.zeros(shape, np.uint8) for key, shape in given.entries}
        down = encode_state(rows, replace(header, client=EVERYONE, schema=given.fingerprint))
        total += Traffic(len(encode(nothing, header)), len(down))
    return total


def zeros(schema: Schema) -> dict[str, np.ndarray]:
    """Tensors of a schema, of the types in which they travel."""
    types = {name: stored for name, stored, _ in schema.whole}
    return {name: np.zeros(shape, types.get(name, "float32")) for name, shape in schema.entries}


def rows(checked: Checked) -> list[str]:
    """The report as lines of text."""
    recipe, federation, plan = checked.recipe, checked.federation, checked.plan
    whole = checked.asked * recipe.rounds * (checked.up_bytes + checked.down_bytes)
    lines = [
        f"recipe    {checked.method.facts.title} on {recipe.model.name}, {recipe.data.task}, {recipe.rounds} "
        f"rounds, seed {recipe.seed}"
    ]
    lines.append(
        f"trained   {plan.trainable:,} of {plan.total:,} parameters ({100 * plan.trainable / plan.total:.3f} "
        "%)"
    )
    lines.append(
        f"clients   {len(federation.clients)}, {checked.asked} asked per round; test set "
        f"{len(federation.test)} rows"
    )
    for client in federation.clients:
        counts = histogram(client.train)
        labels = "  ".join(f"{label}:{n}" for label, n in list(counts.items())[:12]) + (
            " ..." if len(counts) > 12 else ""
        )
        lines.append(f"  {client.name:<24}{len(client.train):>7} rows, {len(client.test)} held out  {labels}")
    lines += [f"left out  {count} rows: {reason}" for reason, count in federation.dropped.items()]
    lines += [f"note      {note}" for note in (*recipe.notes, *federation.notes)]
    lines += [f"ranks     {line}" for line in checked.ranks]
    lines.append(
        f"bytes     per client and round: up {checked.up_bytes:,}, down {checked.down_bytes:,}; whole run "
        f"{whole / MIB:,.1f} MiB"
    )
    if checked.once.up:
        lines.append(
            f"bytes     per client, once before the first round: up {checked.once.up:,.0f}, down "
            f"{checked.once.down:,.0f}"
        )
    lines.append(
        f"bits      a trained parameter: up {checked.bits[0]:.3f}, down {checked.bits[1]:.3f}"
        + (" (estimates)" if recipe.chain else "")
    )
    lines += checked.remarks
    if (
        recipe.deploy.data == "sites"
        and recipe.data.task in ("classify", "image-classify")
        and not recipe.data.labels
    ):
        known = ", ".join(f'"{label}"' for label in federation.labels[:6]) + (
            ", ..." if len(federation.labels) > 6 else ""
        )
        lines.append(
            f"sites     before fedtune server: set data.labels = [{known}], so that all sites number the "
            "classes alike"
        )
    lines += [f"memory    {what}: {count / MIB:,.1f} MiB" for what, count in checked.memory.items()]
    for row in checked.exposed:
        if row.verb in checked.method.verbs:
            through = (
                f"; through {' > '.join(row.through)}" if row.through else "; as sent, no step in the chain"
            )
            lines.append(f"server    verb '{row.verb}': sees {row.sees}{through}")
        else:
            lines.append(f"{row.verb:<10}{row.sees}")
    return lines
