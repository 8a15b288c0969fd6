"""What leaves the device that runs the body is what travels: results are coded where they were computed."""

from __future__ import annotations

import pytest
import torch

from fedtune.split.body import Frozen
from fedtune.split.codec import Coding, decode, encode
from fedtune.split.cut import Cut, Side
from fedtune.split.parts import Part
from fedtune.split.work import Work
from fedtune.wire.v1 import split_pb2 as pb
from tests.split.families import make


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("name", "each"), [("int8", 1 + 2 / 32), ("fp16", 2), ("bf16", 2)])
def test_a_result_is_copied_once_and_coded(
    backward: bool, name: str, each: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied: list[int] = []
    real = torch.Tensor.copy_

    def counted(place: torch.Tensor, value: torch.Tensor, **how: bool) -> torch.Tensor:
        copied.append(value.nbytes)
        return real(place, value, **how)

    body, draw = Frozen(Part(make("llama"), Cut(1, 3))), torch.Generator().manual_seed(3)
    hidden, grad = (torch.randn(2, 12, 32, generator=draw) for _ in range(2))
    work = Work(b"", hidden, Side(), grad if backward else None, torch.tensor([3, 7, 20]), 0, 0)
    monkeypatch.setattr(torch.Tensor, "copy_", counted)
    result = body.backward(hidden, Side(), grad) if backward else body.forward(hidden, Side())
    assert not copied and result.dtype == torch.float32
    finished = work.finish(result)
    coded, used = encode(pb.ROLE_GRADIENT if backward else pb.ROLE_HIDDEN, finished, Coding(name))
    assert used == name and sum(copied) == len(coded.data) == each * finished.numel()
    assert decode(coded).shape == ((2, 12, 32) if backward else (3, 32))
