"""EL2N, its ranks, and what the shortcut cannot see."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedtune.errors import FedtuneError
from fedtune.split import el2n
from fedtune.split.cut import Cut
from fedtune.split.parts import Part
from fedtune.split.row_selection import pooling
from tests.split.families import LAYERS, batch, make


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_el2n_on_paper() -> None:
    """Even odds of two classes miss by (1/2, -1/2): norm sqrt(1/2). Odds of 4 to 1 for the right one: (1/5,
    -1/5)."""
    logits = torch.tensor([[0.0, 0.0], [np.log(4.0), 0.0]], dtype=torch.float32)
    assert torch.allclose(el2n.el2n(logits, torch.tensor([0, 0])), torch.tensor([0.5**0.5, 0.2 * 2**0.5]))
    # a language model: the token at 1 carries no loss, those at 2 and 3 do; the logits in front of them are
    # rows 1 and 2
    text = torch.stack([torch.zeros(4, 2), torch.zeros(4, 2)])
    text[0, 1, 0] = np.log(4.0)
    labels = torch.tensor([[1, -100, 0, 1], [0, -100, -100, -100]])
    assert torch.allclose(el2n.el2n(text, labels), torch.tensor([(0.2 * 2**0.5 + 0.5**0.5) / 2, 0.0]))


def test_spearman_with_ties() -> None:
    """Ranks of (1, 2, 2, 3) are 1, 2.5, 2.5, 4."""
    assert el2n.ranks(np.array([1.0, 2.0, 2.0, 3.0])).tolist() == [1, 2.5, 2.5, 4]
    assert el2n.spearman(np.arange(5.0), np.exp(np.arange(5.0))) == pytest.approx(1)
    assert el2n.spearman(np.arange(5.0), -np.arange(5.0)) == pytest.approx(-1)
    assert el2n.spearman(np.array([1.0, 2, 3, 4]), np.array([2.0, 1, 4, 3])) == pytest.approx(
        0.6
    )  # 1 - 6 * 4 / (4 * 15)
    assert el2n.spearman(np.ones(4), np.arange(4.0)) == 0.0


def test_pruning_keeps_the_share_asked_for() -> None:
    hard = np.array([0.1, 0.9, 0.5, 0.9, 0.2])
    assert (
        el2n.hardest(hard, 0.4) == [1, 3]
        and el2n.hardest(hard, 0.01) == [1]
        and el2n.hardest(hard, 1.0) == [0, 1, 2, 3, 4]
    )
    some = el2n.random(100, 0.25, 7, 1, 3)
    assert (
        len(some) == 25
        and some == sorted(set(some))
        and some == el2n.random(100, 0.25, 7, 1, 3)
        and some != el2n.random(100, 0.25, 7, 2, 3)
    )


@pytest.mark.parametrize("name", ["vit", "llama classifier"])
def test_the_shortcut_without_blocks_sees_nothing_and_is_refused(name: str) -> None:
    net, inputs = make(name), batch(name, rows=4)
    given = {key: value for key, value in inputs.items() if key != "labels"}
    if "input_ids" in given:  # texts that end alike
        given = {
            "input_ids": given["input_ids"].clone(),
            "attention_mask": torch.ones_like(given["attention_mask"]),
        }
        given["input_ids"][:, -1] = 5
    blind = Part(net, Cut(0, LAYERS)).shortcut(given)
    assert torch.allclose(blind, blind[:1].expand_as(blind), atol=1e-6)  # one answer for all
    seeing = Part(net, Cut(1, LAYERS)).shortcut(given)
    assert (seeing - seeing[:1])[1:].abs().max() > 1e-3
    with pytest.raises(FedtuneError, match="S703: found local_update or pruning = 'el2n' with k = 0"):
        el2n.check_sees(pooling(type(net), net.config), Cut(0, LAYERS), LAYERS)
    for cut in (Cut(1, LAYERS), Cut(0, LAYERS - 1)):
        el2n.check_sees(pooling(type(net), net.config), cut, LAYERS)


@pytest.mark.parametrize("name", ["dinov2", "llama"])
def test_heads_that_read_more_rows_are_let_through(name: str) -> None:
    net = make(name)
    el2n.check_sees(pooling(type(net), net.config), Cut(0, LAYERS), LAYERS)
