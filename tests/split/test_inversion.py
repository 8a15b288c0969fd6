"""What the operator of the body reads off the hidden states: nearly everything, and the test says so."""

from __future__ import annotations

import pytest
import torch

from fedtune.split import inversion
from fedtune.split.cut import Cut
from fedtune.split.parts import Part
from tests.split.families import batch, make


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def int8(hidden: torch.Tensor) -> torch.Tensor:
    scale = hidden.abs().amax(-1, keepdim=True) / 127
    return (hidden / scale).round() * scale


def test_pixels_are_one_linear_map_away() -> None:
    """Patches of 2 x 2 x 3 pixels become 32 numbers: over-determined, like ViT-L's 768 to 1024."""
    net = make("vit", image_size=8, patch_size=2)
    pixels = {"pixel_values": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
    part = Part(net, Cut(0, 4))
    exact = inversion.attack(part, pixels)
    assert (
        exact.attack == "linear inversion"
        and exact.recovered == 1.0
        and exact.error < 1e-5
        and exact.tried == 4
    )
    assert inversion.attack(part, pixels, wire=lambda h: h.half().float()).error < 1e-4
    assert inversion.attack(part, pixels, wire=int8).recovered == 1.0  # a codec is no protection
    noisy = inversion.attack(
        part,
        pixels,
        wire=lambda h: h + 2 * h.std() * torch.randn(h.shape, generator=torch.Generator().manual_seed(0)),
    )
    assert noisy.recovered == 0.0 and noisy.error > 0.1


def test_a_block_does_not_hide_the_pixels() -> None:
    net = make("vit", image_size=8, patch_size=2)
    pixels = {"pixel_values": torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
    found = inversion.attack(Part(net, Cut(1, 4)), pixels, steps=300)
    assert found.attack == "gradient descent on pixels" and found.recovered == 1.0 and found.error < 1e-3
    assert (
        inversion.attack(Part(net, Cut(1, 4)), pixels, steps=1).recovered == 0.0
    )  # it is the descent that finds them


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("k", [0, 1])
def test_every_token_of_a_byte_model_is_found(name: str, k: int) -> None:
    inputs = batch(name)
    inputs["input_ids"] = torch.where(inputs["attention_mask"] > 0, inputs["input_ids"] * 2, 0)
    part = Part(make(name, vocab_size=256), Cut(k, 3))
    found = inversion.attack(part, inputs, wire=lambda h: h.half().float())
    assert (
        found.attack == "search of the vocabulary" and found.recovered == 1.0 and found.tried == 8 + 12 + 11
    )
    assert inversion.attack(part, inputs, limit=3).tried == 9
    drowned = inversion.attack(
        part,
        inputs,
        wire=lambda h: h + 20 * h.std() * torch.randn(h.shape, generator=torch.Generator().manual_seed(0)),
    )
    assert drowned.recovered < 0.5


@pytest.mark.parametrize("k", [0, 1])
def test_an_encoders_tokens_are_found_by_descent(k: int) -> None:
    found = inversion.attack(Part(make("bert"), Cut(k, 3)), batch("bert"), steps=300)
    assert found.attack == "gradient descent on embeddings" and found.recovered > 0.9
    drown = lambda h: h + 20 * h.std() * torch.randn(h.shape, generator=torch.Generator().manual_seed(0))
    assert (
        inversion.attack(Part(make("bert"), Cut(k, 3)), batch("bert"), steps=300, wire=drown).recovered < 0.5
    )
