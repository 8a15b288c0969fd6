"""HFT: halves of every block, the same for everybody, and everything once in two rounds."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.aggregate import RULES
from fedtune.errors import FedtuneError
from fedtune.events import ClientDone
from fedtune.runtime.check import check
from tests import small
from tests.conformance.recipes import METHODS
from tests.marks import mostly_thorough

PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
WIDE = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
MATRICES = [f"model.layers.{block}.{part}.weight" for block in range(12) for part in PARTS + WIDE]
REST = ["model.embed_tokens.weight", "model.norm.weight", "model.layers.3.input_layernorm.weight"]
NAMES = MATRICES + REST
LORA = [f"x.{name.removesuffix('weight')}lora_{side}.weight" for name in MATRICES for side in "AB"]


def rule(seed: int = 0) -> object:
    return RULES["hft"](seed=seed)


@pytest.mark.parametrize("number", [1, 2, 3, 8])
def test_half_of_every_blocks_attention_and_half_of_the_rest_over_two_blocks(number: int) -> None:
    trained = rule().trains(NAMES, number)
    assert set(REST) <= trained and len(trained - set(REST)) == len(MATRICES) / 2
    for block in range(12):
        own = [name for name in trained if f"layers.{block}." in name and name not in REST]
        assert sum("attn" in name for name in own) == 2
        assert sum("mlp" in name for name in own) in (1, 2)


def test_two_rounds_train_everything_once_and_the_next_two_are_drawn_anew() -> None:
    one, two, three = (rule().trains(NAMES, number) for number in (1, 2, 3))
    assert one | two == set(NAMES) and one & two == set(REST)
    assert three not in (one, two)
    assert rule(seed=1).trains(NAMES, 1) != one == rule().trains(reversed(NAMES), 1)


def test_both_factors_of_a_pair_rest_together_and_with_their_weight() -> None:
    full, pairs = rule().trains(NAMES, 5), rule().trains(LORA, 5)
    assert len(pairs) == len(LORA) / 2
    assert {name.split(".lora_")[0] for name in pairs} == {
        f"x.{name.removesuffix('.weight')}" for name in full - set(REST)
    }


def test_what_has_no_matrices_in_blocks_is_refused() -> None:
    with pytest.raises(FedtuneError, match=r"M306: found aggregate.rule = 'hft' with 2 tensors such as 'a'"):
        rule().trains(["prompts", "a"], 1)


ADAPTERS = [{"kind": "full"}, {"kind": "lora", "rank": 2}]


@pytest.mark.parametrize("adapter", mostly_thorough(ADAPTERS, ADAPTERS[1:]))
def test_half_of_the_bytes_of_blocks_travel_and_check_says_so(
    adapter: dict[str, object], tiny_bert: Path, data: Path, tmp_path: Path
) -> None:
    changes = METHODS["fedpeft-hft"] | {"method__adapter": adapter}
    recipe = small.recipe(tiny_bert, data, rounds=2, **changes)
    up = check(recipe).up_bytes
    whole = check(small.recipe(tiny_bert, data, method__adapter=adapter)).up_bytes
    events = small.play(recipe, tmp_path)[2]
    sent = {
        number: [e.up_bytes for e in events if isinstance(e, ClientDone) and e.round == number]
        for number in (1, 2)
    }
    assert all(abs(one - up) < 64 for one in sent[2])  # check counts the last round; a 0 is left out
    assert max(map(max, sent.values())) < 0.65 * whole  # what is in no block travels in each round
