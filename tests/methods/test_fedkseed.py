"""FedKSeed on tiny real models: every copy of the model has the same bits, a message has a few hundred bytes,
and what diverges is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.config import Recipe
from fedtune.methods import integers
from fedtune.model.forward import batch_of, forward_only, mean_loss
from fedtune.model.initial_values import reset
from fedtune.rng import seed_of
from fedtune.runtime.checkpoints import load_state
from fedtune.runtime.client_half import respond
from fedtune.runtime.protocol import Ask
from fedtune.schema import Schema, digest
from fedtune.types import Round, State, Tensors
from fedtune.wire import EVERYONE, encode_state
from tests import small
from tests.marks import mostly_thorough
from tests.methods.kseed import recipe_of, weights

ALIKE: list[dict[str, Any]] = [
    {},
    {"pool": "independent"},
    {"pool": "independent", "directions": "gaussian"},
    {"bits": 1, "uplink": "pool"},
    {"estimator": "fzoo", "group": 3},
    {"walk": "table"},
    {"walk": "table", "estimator": "fzoo", "group": 3, "uplink": "pool"},
    {"refresh": 1, "curvature": True, "size": 32},
    {
        "refresh": 2,
        "curvature": True,
        "size": 32,
        "pool": "independent",
        "directions": "gaussian",
        "estimator": "fzoo",
        "group": 2,
    },
]


@pytest.mark.parametrize("changes", mostly_thorough(ALIKE, [ALIKE[0], ALIKE[6], ALIKE[7]]))
def test_one_client_is_a_plain_walk_to_the_bit(
    changes: dict[str, Any], tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_bert, data, changes, partition__clients=1)
    folder, _, _ = small.play(recipe, tmp_path)
    state, _ = load_state(folder, 3, "")
    accumulators, model = plain_walk(recipe)
    assert {
        name: value.tolist() for name, value in state.shared.items() if name.startswith("pool-")
    } == accumulators
    assert weights(recipe, state) == digest(model)


def plain_walk(recipe: Recipe) -> tuple[dict[str, list[int]], Tensors]:
    """The algorithm in numpy, with whole vectors: directions as (K, d) matrices, float32 additions, int64
    sums."""
    from fedtune.model.fit import step_batches
    from fedtune.model.settings import TrainSettings

    workspace, link = small.workspace_of(recipe)
    tunable, data, s = workspace.tunable, workspace.train(0), recipe.method
    epochs = [link.method.epoch(number) for number in range(1, recipe.rounds + 1)]
    pools = {epoch: matrix(link.method, tunable, epoch) for epoch in epochs}  # (K, d) each, whole numbers
    accumulators = {epoch: np.zeros(s.size, np.int64) for epoch in epochs}
    worth = link.method.pool(tunable, 0).unit
    first = np.concatenate([value.reshape(-1) for value in tunable.read().values()])
    unit = link.method.scale.unit

    def put(flat: np.ndarray) -> None:
        at = 0
        for value in tunable.named.values():
            value.data.view(-1).copy_(torch.from_numpy(flat[at : at + value.numel()]))
            at += value.numel()

    def rebuilt(until: int) -> tuple[np.ndarray, np.ndarray]:
        """The model, and what the steps of the pool after `until` are multiplied by."""
        flat, squares, mean = first, np.zeros(len(first)), 0.0
        factor = np.ones(len(first))
        for epoch in sorted(accumulators):
            if epoch <= until:
                total = (pools[epoch].T @ accumulators[epoch]).astype(np.float64)
                flat = moved(flat, total * (link.method.replay_scale * worth) * factor)
                squares, mean = (
                    squares + total**2,
                    mean + sum(a * a for a in accumulators[epoch].tolist()) / worth**2,
                )
                if s.curvature and mean:
                    factor = np.sqrt(2 * mean / (squares + mean)).astype(np.float32).astype(np.float64)
        return flat, factor

    for number, epoch in enumerate(epochs, 1):
        directions, factor = pools[epoch], rebuilt(epoch - 1)[1]
        flat = rebuilt(epoch)[0]
        seeds = integers.draw(s.size, s.steps, (recipe.seed, number, 0)).reshape(
            -1, s.group if s.estimator == "fzoo" else 1
        )
        batches = step_batches(
            len(data),
            TrainSettings(steps=len(seeds), batch=s.batch),
            seed_of("train", recipe.seed, number, 0),
        )

        def go(k: int, by: float, directions: np.ndarray = directions, factor: np.ndarray = factor) -> None:
            nonlocal flat
            flat = moved(flat, directions[k] * (by * worth) * factor)

        def loss(flat: np.ndarray, indices: Any) -> float:
            put(flat)
            with forward_only(tunable, data):
                return mean_loss(tunable, batch_of(tunable, data, list(indices)))

        def beside(k: int, far: float, directions: np.ndarray = directions, epoch: int = epoch) -> np.ndarray:
            """The model so far and `far` along a direction, from the first values."""
            whole = (directions.T @ accumulators[epoch]).astype(np.float64)
            return moved(first, whole * link.method.replay_scale + far * directions[k])

        for group, micro in zip(seeds.tolist(), batches, strict=True):
            if s.walk == "table":
                sides = [loss(beside(k, s.eps), micro[0]) for k in group]
                if s.estimator == "fzoo":
                    start = loss(beside(0, 0.0), micro[0])
                    found = [(side - start) / np.std(sides, ddof=1) for side in sides]
                else:
                    found = [(sides[0] - loss(beside(group[0], -s.eps), micro[0])) / (2 * s.eps)]
                back = [0.0] * len(group)
            elif s.estimator == "fzoo":
                start, sides = loss(flat, micro[0]), []
                for k in group:
                    go(k, s.eps)
                    sides.append(loss(flat, micro[0]))
                    if k != group[-1] or len(sides) < len(group):
                        go(k, -s.eps)
                found, back = (
                    [(side - start) / np.std(sides, ddof=1) for side in sides],
                    [0.0] * (len(group) - 1) + [-s.eps],
                )
            else:
                go(group[0], s.eps)
                above = loss(flat, micro[0])
                go(group[0], -2 * s.eps)
                found, back = [(above - loss(flat, micro[0])) / (2 * s.eps)], [s.eps]
            for k, g, far in zip(group, found, back, strict=True):
                a = link.method.scale.whole(g, False)
                go(k, far - s.lr * unit * a)
                accumulators[epoch][k] += 256 * a
    put(rebuilt(max(epochs))[0])
    return {f"pool-{epoch:04d}": value.tolist() for epoch, value in accumulators.items()}, tunable.read()


def moved(flat: np.ndarray, by: np.ndarray) -> np.ndarray:
    """One float32 addition of a rounded term; where the term is zero, the weight keeps its bits (a -0.0
    too)."""
    term = by.astype(np.float32)
    return np.where(term == 0, flat, flat + term)


def matrix(method: Any, tunable: Any, epoch: int) -> np.ndarray:
    """Every direction of a pool: (K, d) whole numbers."""
    pool = method.pool(tunable, epoch)
    return np.stack([pool.direction(k, 0, tunable.trainable) for k in range(pool.size)]).astype(np.int64)


@pytest.mark.thorough
def test_server_clients_late_joiners_and_other_processes_hold_the_same_model(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    """The server's model after round 3; what a client of round 4 rebuilds, with memory or without; another
    process with two threads."""
    recipe = recipe_of(tiny_bert, data, {"refresh": 2}, sampling={"count": 2})
    folder, _, _ = small.play(recipe, tmp_path)
    state, _ = load_state(folder, 3, "")
    want = weights(recipe, state)
    workspace, link = small.workspace_of(recipe)
    seen: list[str] = []
    real = link.method.walk

    def watching(tunable: Any, *rest: Any) -> Any:
        seen.append(digest(tunable.read()))
        return real(tunable, *rest)

    link.method.walk = watching
    now = Round(4, recipe.seed, (0, 3))
    payload = encode_state(state.shared, link.header("train", EVERYONE, now, Schema.of(state.shared)))
    for client in (3, 0, 3):  # one after another on one tunable model: nothing of the client before is left
        respond(link, workspace.client_with(client, {}), Ask(client, "train", now, payload))
    assert seen == [want] * 3

    probe = (
        "import sys, torch; from pathlib import Path; from fedtune.runtime.finished import installed; from "
        "fedtune.runtime.folder import RunFolder; "
        "from fedtune.schema import digest; torch.set_num_threads(2); "
        "workspace, state, _ = installed(RunFolder(Path(sys.argv[1]))); "
        "print(digest(workspace.tunable.read()))"
    )
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "ATEN_CPU_CAPABILITY": "default",
        "NUMBA_NUM_THREADS": "2",
        "OMP_NUM_THREADS": "2",
    }
    done = subprocess.run(
        [sys.executable, "-c", probe, str(folder.path)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.stdout.strip() == want, done.stderr


def test_a_client_ends_where_its_own_scalars_lead(tiny_bert: Path, data: Path) -> None:
    """The walk is made in place, in float32; what it says, replayed from the start, is the same model up to
    the rounding of its additions."""
    workspace, link = small.workspace_of(recipe_of(tiny_bert, data, {"steps": 20}))
    method, tunable = link.method, workspace.tunable
    reset(tunable)
    seeds = integers.draw(256, 20, (3, 1, 0))
    walk = method.walk(tunable, workspace.train(0), 0, seeds, 5)
    walked = tunable.read()
    pool = np.zeros(256, np.int64)
    np.add.at(pool, seeds, 256 * walk.scalars)
    method.install(State({"pool-0000": pool}), tunable)
    moved = max(
        float(np.abs(tunable.read()[name] - tunable.origin.tensors[name].numpy()).max()) for name in walked
    )
    apart = max(float(np.abs(tunable.read()[name] - walked[name]).max()) for name in walked)
    assert moved > 1e-3 and apart < 1e-5


def test_a_fresh_head_does_not_depend_on_torch(tiny_bert: Path, data: Path) -> None:
    workspace, _ = small.workspace_of(recipe_of(tiny_bert, data))
    head = workspace.tunable.read()["classifier.weight"]
    levels = head / np.float32(3**0.5 * 0.2 / 2**15)  # the tiny model's initializer_range
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-2)
    assert abs(levels).max() <= 2**15 and 0.1 < head.std() / 0.2 < 2


def test_a_base_in_half_precision_is_rebuilt_from_its_own_values(
    tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    recipe = recipe_of(tiny_bert, data, {"lr": 1e-2}, model__dtype="bfloat16", rounds=1)
    folder, _, _ = small.play(recipe, tmp_path)
    state, _ = load_state(folder, 1, "")
    workspace, link = small.workspace_of(recipe)
    link.method.install(state, workspace.tunable)
    name = "bert.encoder.layer.0.output.dense.weight"
    base = workspace.base.weights[name]
    assert (
        base.dtype == torch.bfloat16 and workspace.tunable.origin.tensors[name].data_ptr() == base.data_ptr()
    )  # no second copy
    tuned = workspace.tunable.named[name]
    assert tuned.dtype == torch.float32 and 0 < float((tuned.detach() - base.float()).abs().max()) < 0.5
    link.method.install(link.method.start(workspace.tunable), workspace.tunable)
    assert torch.equal(tuned.detach(), base.float())
