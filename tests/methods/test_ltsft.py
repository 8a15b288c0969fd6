"""LT-SFT: the mask is what clients' own trainings moved most, nothing else changes, and a mask of everything is
full tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from fedtune.errors import ClientFailed, FedtuneError
from fedtune.events import ClientDone
from fedtune.methods import ballots
from fedtune.methods.ltsft import MASK, VALUES, VOTES
from fedtune.model.fit import fit
from fedtune.rng import seed_of
from fedtune.runtime.check import check, rows
from fedtune.runtime.checkpoints import load_state
from fedtune.runtime.finished import export_run
from fedtune.types import Update
from tests import small
from tests.conformance.recipes import LOTTERY

FULL = {"type": "fedpeft", "adapter": {"kind": "full"}, "train": LOTTERY["train"]}
CAUSAL = {"data__task": "causal-lm", "data__max_length": 24}


def body(tunable: Any) -> dict[str, np.ndarray]:
    return {name: value for name, value in tunable.read().items() if name not in tunable.of_head}


def flat(tensors: dict[str, np.ndarray]) -> np.ndarray:
    return np.concatenate([tensors[name].reshape(-1) for name in sorted(tensors)])


def mask_of(state: Any, count: int) -> np.ndarray:
    """(count,) bool, bit by bit."""
    words = [int(word) for word in state.shared[MASK]]
    return np.array([words[place // 32] >> place % 32 & 1 for place in range(count)], bool)


@pytest.fixture(scope="module")
def played(tiny_bert: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A recipe, its state at the end, and its events."""
    agreed = {**LOTTERY, "elect": "threshold", "share": 0.6}
    recipe = small.recipe(tiny_bert, data, method=agreed, rounds=2)
    folder, _, events = small.play(recipe, tmp_path_factory.mktemp("run"))
    return recipe, load_state(folder, 2, "")[0], events


def test_the_mask_holds_what_most_clients_moved_most_and_the_rest_stays_the_base(played: Any) -> None:
    """Votes by hand: each client trains all weights, as full tuning does."""
    recipe, state, _ = played
    workspace, link = small.workspace_of(recipe)
    tunable = workspace.tunable
    first = tunable.read()
    base, votes = flat(body(tunable)), np.zeros(sum(v.size for v in body(tunable).values()), int)
    for client in range(4):
        tunable.write(first)
        fit(tunable, workspace.train(client), recipe.method.train, seed_of("vote", recipe.seed, 1, client))
        moved = np.abs(flat(body(tunable)) - base)
        votes[np.argsort(-moved, kind="stable")[: round(0.1 * votes.size)]] += 1
    mask = mask_of(state, votes.size)
    assert mask.tolist() == (votes >= 3).tolist() and 100 < mask.sum() < round(0.1 * votes.size)
    link.method.install(state, tunable)
    now = flat(body(tunable))
    assert np.array_equal(now[~mask], base[~mask]) and (now[mask] != base[mask]).mean() > 0.9
    assert np.array_equal(now[mask], state.shared[VALUES][: mask.sum()])
    assert not state.shared[VALUES][mask.sum() :].any()
    assert all(not np.array_equal(tunable.read()[name], first[name]) for name in tunable.of_head)


def test_a_mask_of_everything_is_full_tuning_to_the_bit(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    masked = small.recipe(tiny_bert, data, method={**LOTTERY, "density": 1.0}, rounds=2)
    plain = small.recipe(tiny_bert, data, method=FULL, rounds=2)
    found = load_state(small.play(masked, tmp_path / "masked")[0], 2, "")[0].shared
    wanted = dict(load_state(small.play(plain, tmp_path / "plain")[0], 2, "")[0].shared)
    head = {name: wanted.pop(name) for name in found.keys() - {MASK, VALUES}}
    assert head and all(np.array_equal(found[name], value) for name, value in head.items())
    assert found[VALUES].tobytes() == flat(wanted).tobytes()


def test_a_language_model_is_exported_as_stock_transformers_loads_it(
    tiny_llama: Path, data: Path, tmp_path: Path
) -> None:
    """It has no task head: all that is trained is under the mask. So is the training in one place."""
    more = {"evaluate": {"local": False, "centralised": True, "base": True}, "rounds": 2}
    recipe = small.recipe(tiny_llama, data, method=LOTTERY, **CAUSAL, **more)
    folder, result, _ = small.play(recipe, tmp_path / "run")
    export_run(folder, "merged", tmp_path / "merged")
    workspace, link = small.workspace_of(recipe)
    link.method.install(load_state(folder, 2, "")[0], workspace.tunable)
    ids = torch.arange(5, 14)[None]
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(ids).logits, workspace.tunable.net(input_ids=ids).logits)
    assert result["federated"] < result["base"] and result["centralised"] < result["base"]
    changed = flat(body(workspace.tunable)) != flat(
        {name: value.numpy() for name, value in workspace.base.weights.items()}
    )
    assert 0.05 < changed.mean() <= 0.1


def test_check_says_what_travels_and_what_a_vote_shows(played: Any) -> None:
    recipe, _, events = played
    checked = check(recipe)
    sent = [e for e in events if isinstance(e, ClientDone)]
    near = [e.up_bytes - checked.up_bytes for e in sent if e.metrics]
    once = [e.up_bytes - checked.once.up for e in sent if not e.metrics]
    assert len(once) == 4 and len(near) == 8 and max(map(abs, near)) < 40 and max(map(abs, once)) < 40
    lines = rows(checked)
    assert "mask      2,080 of 20,800 weights; each client of the first round votes for so many" in lines
    assert any("'vote'" in line and "a bit for each weight" in line for line in lines)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method__adapter": {"kind": "lora"}}, "kind = 'full'"),
        ({"method__share": 0.5}, "elect = 'threshold'"),
        ({"method__train__weight_decay": 0.1}, "outside the mask"),
        ({"method__train__private": {"max_grad_norm": 1.0}}, "no noise covers"),
        (
            {"chain": [{"step": "private", "clip": 1.0}], "method__weight": "equal", **CAUSAL},
            "no noise covers",
        ),
        ({"aggregate": {"rule": "median"}}, "mean"),
        ({"downlink": {"step": "delta"}}, "the mask must arrive"),
    ],
)
def test_what_does_not_go_together_is_refused(
    changes: dict[str, Any], words: str, tiny_bert: Path, data: Path
) -> None:
    with pytest.raises(FedtuneError, match="C104") as refused:
        small.recipe(tiny_bert, data, method=LOTTERY | {"train": {**LOTTERY["train"]}}, **changes)
    assert words in str(refused.value)


class Said:
    """A cohort whose sum of ballots is this one."""

    def __init__(self, words: np.ndarray, width: int, voters: int) -> None:
        self.update = Update({f"{VOTES}{width}": words}, float(voters))

    def sum(self, verb: str, given: Any) -> Update:
        return self.update


def test_votes_that_do_not_add_up_or_elect_nothing_end_the_run_with_a_sentence(
    tiny_bert: Path, data: Path
) -> None:
    recipe = small.recipe(tiny_bert, data, method={**LOTTERY, "elect": "threshold", "share": 1.0})
    workspace, link = small.workspace_of(recipe)
    method: Any = link.method
    state = method.start(workspace.tunable)
    count, most = method.sizes(workspace.tunable)
    one, other = (ballots.packed(np.arange(most) + start, count, 2) for start in (0, most))
    with pytest.raises(FedtuneError, match="R414: found no weight for which 2 of 2 clients are"):
        method.begin(state, Said(one + other, 2, 2))
    stuffed = one + ballots.packed(np.arange(2 * most), count, 2)
    with pytest.raises(FedtuneError, match=r"R414: found 6,240 votes of 2 clients, expected 2,080 of each"):
        method.begin(state, Said(stuffed, 2, 2))
    masked = method.begin(state, Said(one + one, 2, 2)).shared
    assert masked[VALUES].size == most
    with pytest.raises(ClientFailed, match="W607: found a mask of 2,080 weights, expected at most 2,079"):
        method.write(workspace.tunable, {**masked, VALUES: masked[VALUES][:-1]})
    with pytest.raises(FedtuneError, match=r"M306: found method\.adapter\.only"):
        check(small.recipe(tiny_bert, data, method={**LOTTERY, "adapter": {"only": ["classifier.*"]}}))
