"""Tensors to pairs and back."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import peft
import pytest
import torch

from fedtune.aggregate import (
    MERGES,
    RULES,
    ClientAdapter,
    Combined,
    Pair,
    WeightedMean,
    flat_residual,
    join,
    ranks,
    residual_of,
    split,
)
from fedtune.aggregate.pairs import factors
from fedtune.errors import FedtuneError
from fedtune.schema import digest
from fedtune.types import Round, Tensors
from tests.aggregate.dense import adapter


def test_split_and_join_are_inverse() -> None:
    tensors = adapter(3, 0)
    pairs, rest = split(tensors)
    assert sorted(rest) == ["head.bias", "layers.0.q.lora_magnitude_vector", "temperature"]
    assert ranks(tensors) == {"layers.0.q": 3, "layers.1.up": 3}
    assert digest(join(pairs, rest)) == digest(tensors)


def test_a_residual_travels_as_named_tensors() -> None:
    residual = {"q": Pair(np.ones((3, 2), np.float32), np.zeros((2, 5), np.float32))}
    flat = flat_residual(residual)
    assert {name: value.shape for name, value in flat.items()} == {
        "q.residual_A": (2, 5),
        "q.residual_B": (3, 2),
    }
    assert digest(flat_residual(residual_of(flat | adapter(2, 0)))) == digest(flat)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"q.lora_A.weight": np.ones((2, 5))}, "a pair without its factor B in 'q'"),
        ({"q.lora_B.weight": np.ones((5, 2))}, "a pair without its factor A in 'q'"),
        (
            {"q.lora_A.weight": np.ones((2, 5)), "q.lora_B.weight": np.ones((4, 3))},
            r"factors A \(2, 5\) and B \(4, 3\) in 'q'",
        ),
        ({"q.lora_A.weight": np.ones((0, 5)), "q.lora_B.weight": np.ones((4, 0))}, r"factors A \(0, 5\)"),
        (
            {"q.lora_A.weight": np.ones((2, 5, 3, 3)), "q.lora_B.weight": np.ones((4, 2, 1, 1))},
            r"factors A \(2, 5, 3, 3\)",
        ),
    ],
)
def test_what_is_no_pair_is_refused(tensors: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(FedtuneError, match="M305: found " + said):
        split(tensors)


def test_a_weighted_mean_by_hand() -> None:
    """(1 * 1 + 3 * 5) / 4 = 4; longer than a chunk, so that its seams are crossed."""
    mean = WeightedMean()
    mean.add({"w": np.full(140_000, 1, np.float32)}, 1.0)
    mean.add({"w": np.full(140_000, 5, np.float32)}, 3.0)
    assert (mean.mean()["w"] == 4).all()


def test_equal_values_are_averaged_to_the_bit() -> None:
    value = np.random.default_rng(0).normal(size=70_000).astype(np.float32)
    mean = WeightedMean()
    for i in range(100):
        mean.add({"w": value}, 0.1 + i / 7)
    assert digest(mean.mean()) == digest({"w": value})


def test_answers_of_other_names_or_shapes_are_refused() -> None:
    mean = WeightedMean()
    mean.add({"w": np.ones((4, 2), np.float32)}, 1.0)
    with pytest.raises(FedtuneError, match="M305: found shape"):
        mean.add({"w": np.ones((1, 2), np.float32)}, 1.0)
    with pytest.raises(FedtuneError, match="M305: found 'v' in some answers only"):
        mean.add({"v": np.ones(2, np.float32)}, 1.0)


# --- LoRA of embedding tables ---

EMBEDDING = {
    "words.lora_embedding_A": (2, 30),
    "words.lora_embedding_B": (8, 2),
    "q.lora_A.weight": (2, 8),
    "q.lora_B.weight": (6, 2),
}
ROUND = Round(1, 7, (0, 1))


def embedded(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: np.float32(rng.normal(size=shape)) for name, shape in EMBEDDING.items()}


def test_an_embeddings_factors_are_a_pair() -> None:
    pairs, rest = split(embedded(0))
    assert {name: (pair.B.shape, pair.A.shape) for name, pair in pairs.items()} == {
        "words.lora_embedding": ((8, 2), (2, 30)),
        "q": ((6, 2), (2, 8)),
    }
    assert not rest and digest(join(pairs, rest)) == digest(embedded(0))
    flat = flat_residual({"words.lora_embedding": pairs["words.lora_embedding"]})
    assert residual_of(flat).keys() == {"words.lora_embedding"}


def test_roles_of_factors_follow_how_peft_starts_them() -> None:
    """FFA freezes what starts at random: an embedding's A starts at zero, and frozen there would never
    learn."""
    layer = torch.nn.Embedding(30, 8)
    net = peft.get_peft_model(
        torch.nn.Sequential(OrderedDict(words=layer)), peft.LoraConfig(r=2, target_modules=["words"])
    )  # type: ignore[arg-type]
    start = {name: value.numpy() for name, value in peft.get_peft_model_state_dict(net).items()}
    zero = {name for name, value in start.items() if not value.any()}
    assert {name.rpartition(".")[2] for name in zero} == {"lora_embedding_A"}
    assert (
        factors(start, "B")
        == zero
        == RULES["ffa"]().sends(start, 1)
        == RULES["rolora"]().trains(start, 1)
        == RULES["fedsa"]().stays(start)
    )
    assert not RULES["fedsb"]().sends(start, 2)


@pytest.mark.parametrize("name", sorted(name for name in RULES if not RULES[name]().linear))
def test_rules_of_products_hold_for_embeddings(name: str) -> None:
    """Equal answers give that answer; flexlora and fedex give the mean of what peft adds to the table."""
    rule = RULES[name]()
    before = Combined(embedded(0))
    made = rule.combine([ClientAdapter(i, embedded(1), 1.0, 2.0) for i in range(5)], before, 2.0, ROUND)
    assert_table(made, table(embedded(1)))
    if name in {"flexlora", "fedex", "flora"}:
        wide = Combined(widened(before.tensors, 4)) if name == "flexlora" else before
        answers = [
            ClientAdapter(i, widened(embedded(i), 4) if name == "flexlora" else embedded(i), 1.0, 2.0)
            for i in (1, 2)
        ]
        assert_table(rule.combine(answers, wide, 2.0, ROUND), (table(embedded(1)) + table(embedded(2))) / 2)


def test_a_merged_embedding_is_what_stock_peft_adds_to_its_table() -> None:
    made = MERGES["mean"]()([ClientAdapter(i, embedded(i), 1.0, 2.0) for i in (1, 2)], 0, 1.0)
    layer = torch.nn.Embedding(30, 8)
    net = peft.get_peft_model(
        torch.nn.Sequential(OrderedDict(words=layer)),
        peft.LoraConfig(r=4, lora_alpha=4, target_modules=["words"]),
    )  # type: ignore[arg-type]
    own = {
        f"base_model.model.{name}": torch.from_numpy(value)
        for name, value in made.tensors.items()
        if name.startswith("words")
    }
    peft.set_peft_model_state_dict(net, own)
    words = net.get_submodule("base_model.model.words")
    np.testing.assert_allclose(
        words.get_delta_weight("default").detach().numpy(),
        (table(embedded(1)) + table(embedded(2))) / 2,
        rtol=1e-4,
        atol=1e-5,
    )


def table(tensors: Tensors) -> np.ndarray:
    """(words, width): scale 2 times the product, transposed, as peft.tuners.lora.Embedding adds it."""
    return np.asarray(
        2.0 * (np.float64(tensors["words.lora_embedding_B"]) @ tensors["words.lora_embedding_A"]).T
    )


def assert_table(made: Combined, wanted: np.ndarray) -> None:
    found = table(made.tensors)
    if "words.lora_embedding" in made.residual:
        pair = made.residual["words.lora_embedding"]
        found = found + (np.float64(pair.B) @ pair.A).T
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def widened(tensors: Tensors, rank: int) -> dict[str, np.ndarray]:
    """The same products at a greater rank."""
    pairs, rest = split(tensors)
    more = {name: ((0, 0), (0, rank - pair.rank)) for name, pair in pairs.items()}
    return join(
        {
            name: Pair(np.pad(pair.B, more[name]), np.pad(pair.A, more[name][::-1]))
            for name, pair in pairs.items()
        },
        rest,
    )
