"""Laws that every method keeps, on a real tiny model; a method is enrolled by a line in recipes.py.

One client without a chain is ordinary training; order does not matter; k copies of a client are one client; a
resumed
run is an undisturbed one; what is sent is what the shapes say. The Flower half of the laws is in tests/e2e.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune import methods
from fedtune.config import Recipe
from fedtune.events import ClientDone, ClientLeftOut, Event, RoundDone
from fedtune.rng import seed_of
from fedtune.runtime.check import check
from fedtune.runtime.checkpoints import load_state
from fedtune.runtime.cohort import RoundCohort
from fedtune.runtime.local import local_transport
from fedtune.runtime.protocol import Ask
from fedtune.runtime.run import run
from fedtune.schema import digest
from fedtune.types import Client, Round, Tensors
from tests import small
from tests.conformance.recipes import METHODS
from tests.conformance.states import found_in, require_known
from tests.marks import mostly_thorough
from tests.proxy import with_work
from tests.transports import Disturbed, disturbed

REFACTORED = [
    "fedpeft-flexlora",
    "fedpeft-flora",
    "fedpeft-fedex",
    "fedpeft-fair",
    "fedpeft-fedrot",
    "fedpeft-fedsb",
]
OWN_SEEDS = [
    "fedkseed-steps",
    "fedkseed-pro",
    "fedkseed-fzoo",
    "fedkseed-table",
    "fedkseed-ridge",
    "fedkseed-lda",
]  # every client walks along seeds of its own, so that clones differ by their number
MASKED = [
    "fedpeft-mask",
    "fedpeft-lift",
    "experts-mask",
    "experts-gate-mask",
    "experts-gate-sums",
    "fedkseed-mask",
    "sfprompt-mask",
    "ltsft-mask",
]  # of three members or more
EXACT = ["fedpeft-lora", "fedpeft-bias", "fedpeft-full"]
UNCODED = [
    *EXACT,
    "fedpeft-outer",
    "fedpeft-adam",
    "fedkseed-steps",
    "fedkseed-pro",
    "fedkseed-mixed",
    "sfprompt-slim",
    "sfprompt-tail",
    "offsite-lora",
]
EVERY_TIME = [
    "fedpeft-lora",
    "fedpeft-chain",
    "fedpeft-both-ways",
    "fedpeft-outer",
    "fedpeft-lda",
    "fedpeft-lift-stages",
    "fedpeft-mask",
    "fedkseed-mixed",
    "fedkseed-pool",
    "fedkseed-curved",
    "sfprompt-slim",
    "sfprompt-mask",
    "offsite-lora",
    "experts-gate-mask",
]  # one of each way in which rounds and states, the server's and the clients', go; -m thorough tries all others under every law


def tried(names: Iterable[str]) -> list[Any]:
    """Methods as parameters of a law; not every law is about each of EVERY_TIME."""
    names = list(names)
    return mostly_thorough(names, [name for name in names if name in EVERY_TIME])


Played = tuple[small.RunFolder, dict[str, Any], list[Event]]


@pytest.fixture(scope="module")
def undisturbed(
    tiny_bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Played]:
    """The run of a method that nothing happens to, made once: what every law's own run is compared with."""

    @cache
    def played(name: str) -> Played:
        return small.play(small.recipe(tiny_bert, data, **METHODS[name]), tmp_path_factory.mktemp(name))

    return played


def sha(recipe: Recipe, root: Path, **more: Any) -> str:
    return str(small.play(recipe, root, **more)[1]["state_sha256"])


def test_every_method_is_enrolled() -> None:
    assert set(EVERY_TIME) < set(METHODS)
    assert {name.partition("-")[0] for name in METHODS} == set(methods.METHODS)


@pytest.mark.parametrize("name", tried(METHODS))
def test_a_run_ends_with_its_recorded_bytes(name: str, undisturbed: Callable[[str], Played]) -> None:
    folder, result, _ = undisturbed(name)
    require_known(name, found_in(folder, result))


@pytest.mark.parametrize("name", EXACT)
def test_one_client_is_ordinary_training_to_the_bit(
    name: str, tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = small.recipe(tiny_bert, data, partition__clients=1, **METHODS[name])
    folder, result, _ = small.play(recipe, tmp_path)
    assert result["state_sha256"] == digest(plain_training(recipe))
    assert load_state(folder, 3, "")[0].shared.keys() == plain_training(recipe).keys()


def plain_training(recipe: Recipe) -> Tensors:
    """A torch loop over the client's batches, with no federation in it: AdamW made anew at every round's
    start."""
    from fedtune.model.fit import step_batches

    workspace, _ = small.workspace_of(recipe)
    tunable, encoded, train = workspace.tunable, workspace.train(0), recipe.method.train
    net = tunable.net.train()
    for number in range(1, recipe.rounds + 1):
        seed = seed_of("train", recipe.seed, number, 0)
        optimizer = torch.optim.AdamW(list(tunable.named.values()), lr=train.lr, weight_decay=0.0)
        for micro in step_batches(len(encoded), train, seed):
            optimizer.zero_grad()
            batch = encoded.collate(micro[0])
            labels = batch.pop("labels")
            logits = net(**batch).logits
            (torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / len(labels)).backward()
            optimizer.step()
    return tunable.read()


@pytest.mark.parametrize("name", tried(MASKED))
def test_masks_change_no_byte(
    name: str, tiny_bert: Path, data: Path, tmp_path: Path, undisturbed: Callable[[str], Played]
) -> None:
    plain = METHODS[name] | {"chain": METHODS[name]["chain"][:-1] or [{"step": "ring"}]}
    assert sha(small.recipe(tiny_bert, data, **plain), tmp_path) == undisturbed(name)[1]["state_sha256"]


@pytest.mark.parametrize("name", tried(name for name in METHODS if name not in OWN_SEEDS + MASKED))
def test_k_identical_clients_equal_one(name: str, tiny_bert: Path, data: Path) -> None:
    recipe = small.recipe(
        tiny_bert, data, **{key: value for key, value in METHODS[name].items() if "_by_client" not in key}
    )
    one, five = clones(recipe, 1), clones(recipe, 5)
    assert one.keys() == five.keys()
    for tensor in one:
        np.testing.assert_array_equal(
            one[tensor], five[tensor], err_msg=tensor
        ) if name not in REFACTORED else None
    modules = {name.removesuffix(".lora_A.weight") for name in one if name.endswith(".lora_A.weight")}
    for module in sorted(
        name for name in modules if f"{name}.lora_B.weight" in one
    ):  # factors may differ by a gauge, products may not
        np.testing.assert_allclose(
            product(one, module), product(five, module), rtol=1e-5, atol=1e-8, err_msg=module
        )


def product(tensors: Tensors, module: str) -> np.ndarray:
    """B @ A of a module, and its residual."""
    moved = tensors[f"{module}.lora_B.weight"].astype(np.float64) @ tensors[f"{module}.lora_A.weight"]
    if f"{module}.residual_A" not in tensors:
        return moved
    rest: np.ndarray = tensors[f"{module}.residual_B"].astype(np.float64) @ tensors[f"{module}.residual_A"]
    return moved + rest


def clones(recipe: Recipe, count: int) -> Tensors:
    """One round in which every member has client 0's data and draws client 0's randomness."""
    workspace, link = small.workspace_of(recipe)
    real = link.method
    twin = replace(
        link,
        method=with_work(
            real, lambda work: lambda client, given, now: work(replace(client, id=0), given, now)
        ),
    )

    def client(ask: Ask) -> Client:
        return (
            workspace.client_with(0, {})
            if ask.client == 0
            else replace(workspace.client_with(0, {}), id=ask.client)
        )

    now = Round(1, recipe.seed, tuple(range(count)))
    cohort = RoundCohort(
        twin,
        now,
        local_transport(twin, client, lambda ask, done: None),
        lambda event: None,
        {n: str(n) for n in range(count)},
    )
    state = real.start(workspace.tunable)
    return real.round(state, cohort, now).shared


@pytest.mark.parametrize("name", tried(METHODS))
def test_stops_and_answers_in_any_order_twice_or_late_do_not_change_the_result(
    name: str, tiny_bert: Path, data: Path, tmp_path: Path, undisturbed: Callable[[str], Played]
) -> None:
    """A run that is stopped in its second and third rounds, each of whose three lives is disturbed."""
    recipe = small.recipe(tiny_bert, data, **METHODS[name])

    def stop_in(number: int) -> Callable[[Event], None]:
        def tell(event: Event) -> None:
            if isinstance(event, ClientDone) and (event.round, event.client) == (number, 1):
                raise KeyboardInterrupt

        return tell

    with pytest.raises(KeyboardInterrupt):
        small.play(recipe, tmp_path, tell=stop_in(2), carry=disturbed(len(name), []))
    cut = small.RunFolder(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run(recipe, cut, stop_in(3), disturbed(len(name) + 1, []))
    told: list[Event] = []
    last: list[Disturbed] = []
    result = run(recipe, cut, told.append, disturbed(len(name) + 2, last))
    assert [e.round for e in told if isinstance(e, RoundDone)] == [3]
    dropped = [e for e in told if isinstance(e, ClientLeftOut)]
    assert {e.code for e in dropped} <= {"W605"} and len(dropped) == last[0].doubled
    whole, other, _ = undisturbed(name)
    assert result["state_sha256"] == other["state_sha256"] and result["left_out"] == 0
    assert cut.state(3).read_bytes() == whole.state(3).read_bytes()
    for path in sorted(p for p in whole.adapter.iterdir() if p.suffix == ".safetensors"):
        assert (cut.adapter / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", tried(UNCODED))
def test_bytes_sent_are_what_the_shapes_say(
    name: str, tiny_bert: Path, data: Path, undisturbed: Callable[[str], Played]
) -> None:
    predicted = check(small.recipe(tiny_bert, data, **METHODS[name]))
    _, result, events = undisturbed(name)
    sent = [e for e in events if isinstance(e, ClientDone)]
    left_out = [
        2 * (e.client == 0) + 9 * list(e.metrics.values()).count(0) for e in sent
    ]  # protobuf leaves out a number that is 0
    assert {e.up_bytes + zeros for e, zeros in zip(sent, left_out, strict=True)} == {predicted.up_bytes}
    assert {e.down_bytes for e in sent} == {predicted.down_bytes} or (
        name.startswith("fedkseed") and max(e.down_bytes for e in sent) <= predicted.down_bytes
    )
    for bits, total in zip(predicted.bits, (predicted.up_bytes, predicted.down_bytes), strict=True):
        assert 0 < total - bits * result["trainable"] / 8 < 300  # the whole overhead of a message


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = small.recipe(tiny_bert, data)
    other = small.recipe(tiny_bert, data, seed=4)
    assert sha(recipe, tmp_path / "a") == sha(recipe, tmp_path / "b") != sha(other, tmp_path / "c")


def test_the_mean_is_weighted_by_examples(tiny_bert: Path, data: Path) -> None:
    recipe = small.recipe(
        tiny_bert, data, partition__by="column", partition__column="label", partition__clients=3
    )
    workspace, link = small.workspace_of(recipe)
    now = Round(1, recipe.seed, (0, 1, 2))
    start = link.method.start(workspace.tunable)
    updates = [
        link.method.verbs["train"].work(workspace.client_with(n, {}), start.shared, now) for n in now.members
    ]
    weights = [len(workspace.train(n)) for n in now.members]
    assert [u.weight for u in updates] == weights
    got = link.method.round(
        start,
        RoundCohort(
            link,
            now,
            local_transport(link, workspace.client, workspace.done),
            lambda e: None,
            workspace.names,
        ),
        now,
    )
    for tensor in got.shared:
        want = sum(
            w * u.values()[tensor].astype(np.float64) for w, u in zip(weights, updates, strict=True)
        ) / sum(weights)
        np.testing.assert_array_equal(got.shared[tensor], want.astype(np.float32))
