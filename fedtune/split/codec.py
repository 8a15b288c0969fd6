"""Hidden states and gradients as bytes: float32, float16, bfloat16, or int8 by groups with an on-line guard.

    data of a tensor = its numbers, C order, little-endian; for int8 followed by one bfloat16 scale for each
    group of the last side

Whoever sends measures what the coding costs on this very tensor and falls back to the next finer coding where
it is too much: a small
gradient underflows float16, and one channel 100 times the others ruins int8. The second is invisible in || x
- decoded || / || x ||,
because the outlier is most of the norm; so each channel is measured against its own norm, and the root mean
square of that is taken.
On trained models int8 moves a gradient by 0.9 to 1.6 %, two batches differ by more than 100 %; hence 3 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fedtune.errors import FedtuneError
from fedtune.wire.v1 import split_pb2 as pb

NUMBERS = {
    "fp32": pb.NUMBER_FLOAT32,
    "fp16": pb.NUMBER_FLOAT16,
    "bf16": pb.NUMBER_BFLOAT16,
    "int8": pb.NUMBER_INT8,
}
NAMES = {code: name for name, code in NUMBERS.items()}
DTYPES = {
    pb.NUMBER_FLOAT32: torch.float32,
    pb.NUMBER_FLOAT16: torch.float16,
    pb.NUMBER_BFLOAT16: torch.bfloat16,
    pb.NUMBER_INT8: torch.int8,
    pb.NUMBER_UINT8: torch.uint8,
    pb.NUMBER_INT32: torch.int32,
}
WIDTH = {code: dtype.itemsize for code, dtype in DTYPES.items()}
# bytes of a scale: bfloat16 has float32's range, which gradients need, and its 8 bits are absorbed by
# rounding up
SCALE = 2
FINER = {"int8": "fp16", "fp16": "bf16", "bf16": "fp32"}
# Relative errors (L2) that are let through. Sound float16 costs 2e-4, so 2e-3 means underflow, where
# bfloat16's 1.7e-3 is better.
BOUND = {"int8": 0.03, "fp16": 0.002, "bf16": 0.01}


class Coding(NamedTuple):
    """How floating-point tensors are to be sent: fp32, fp16, bf16 or int8; `group` values share a scale, 0: a
    token does."""

    name: str = "fp16"
    group: int = 32


DEFAULT = Coding()


@dataclass(frozen=True)
class Coded:
    """One tensor as it travels."""

    header: pb.Tensor
    data: bytes | memoryview

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.header.shape)


def encode(role: pb.Role, value: torch.Tensor, coding: Coding = DEFAULT) -> tuple[Coded, str]:
    """A tensor of any floating type as bytes, and the coding that was used: the wanted one, or the first
    finer one within its bound.

    Raises FedtuneError W607 where a number is not finite.
    """
    exact = value.detach().float().contiguous()
    if not finite(exact):
        raise FedtuneError(
            "W607",
            f"hidden states or gradients of shape {tuple(value.shape)} that are not finite",
            "finite numbers",
            "lower the learning rate",
        )
    name = coding.name
    while True:
        group = grouping(exact.shape[-1], coding.group) if name == "int8" else 0
        sent, scales = quantised(exact, group) if name == "int8" else (exact.to(DTYPES[NUMBERS[name]]), None)
        if name == "fp32" or lost(exact, restored(sent, scales)) <= BOUND[name]:
            break
        name = FINER[name]
    header = pb.Tensor(role=role, number=NUMBERS[name], shape=list(value.shape), group=group)
    return Coded(header, raw(sent) if scales is None else raw(sent, scales)), name


def encode_whole(role: pb.Role, value: torch.Tensor) -> Coded:
    """A mask (uint8), positions or rows (int32)."""
    number = pb.NUMBER_UINT8 if role == pb.ROLE_MASK else pb.NUMBER_INT32
    return Coded(
        pb.Tensor(role=role, number=number, shape=list(value.shape)), raw(value.detach().to(DTYPES[number]))
    )


def decode(coded: Coded) -> torch.Tensor:
    """Floating types as float32, whole numbers as they are; on the CPU. The header has been checked against
    the length of the data."""
    header, shape = coded.header, coded.shape
    count = math.prod(shape)
    split = count * WIDTH[header.number]
    sent = unraw(coded.data[:split], DTYPES[header.number], shape)
    if header.number != pb.NUMBER_INT8:
        return sent.float() if sent.is_floating_point() else sent
    return restored(sent, unraw(coded.data[split:], torch.bfloat16, (*shape[:-1], shape[-1] // header.group)))


def size_of(header: pb.Tensor) -> int:
    """Bytes that a tensor with this header takes."""
    count = math.prod(header.shape)
    scales = SCALE * (count // header.group) if header.number == pb.NUMBER_INT8 else 0
    return int(count * WIDTH[header.number] + scales)


def example(coded: Coded, place: int, tokens: int) -> Coded:
    """The first tokens of one example of a batch (examples, tokens, width), as a tensor (tokens, width) of
    its own."""
    header, (_, longest, width) = coded.header, coded.shape
    data, row = coded.data, width * WIDTH[header.number]
    part = bytes(data[place * longest * row : (place * longest + tokens) * row])
    if header.number == pb.NUMBER_INT8:
        start, row = math.prod(coded.shape), SCALE * (width // header.group)
        part += bytes(data[start + place * longest * row : start + (place * longest + tokens) * row])
    return Coded(
        pb.Tensor(role=header.role, number=header.number, shape=[tokens, width], group=header.group), part
    )


# --- parts ---


def grouping(side: int, group: int) -> int:
    """The wanted group, or the whole side where it does not divide it."""
    return group if group and side % group == 0 else side


def quantised(value: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 levels of `value`'s shape, and one bfloat16 scale a group: the largest magnitude over 127, rounded
    up."""
    grouped = value.reshape(*value.shape[:-1], -1, group)
    wanted = grouped.abs().amax(-1) / 127
    scales = wanted.to(torch.bfloat16)
    # a bfloat16 is the upper half of a float32: one more in its bits is the next larger number
    scales = torch.where(scales.float() < wanted, (scales.view(torch.int16) + 1).view(torch.bfloat16), scales)
    steps = scales.float().unsqueeze(-1)
    levels = torch.where(steps > 0, grouped / steps, 0.0).round().clamp(-127, 127)
    return levels.to(torch.int8).reshape(value.shape), scales


def restored(sent: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    if scales is None:
        return sent.float()
    return (sent.float().reshape(*scales.shape, -1) * scales.float().unsqueeze(-1)).reshape(sent.shape)


def lost(exact: torch.Tensor, back: torch.Tensor) -> float:
    """Root mean square over channels (the last side) of || exact - back || / || exact ||; silent channels
    left out."""
    channels = exact.reshape(-1, exact.shape[-1])
    low, high = (float(value) for value in channels.aminmax())
    if not (largest := max(high, -low)):
        return 0.0
    wrong = channels - back.reshape(channels.shape)
    if not 1e-12 < largest < 1e12:  # squares would leave float32
        channels, wrong = channels / largest, wrong / largest
    norms, errors = channels.square().sum(0), wrong.square_().sum(0)
    heard = norms > 0
    return math.sqrt(float((errors[heard] / norms[heard]).mean()))


def finite(value: torch.Tensor) -> bool:
    """Whether every number is; a sum that is finite says so (a tenth of the time), one that is not may only
    be too large."""
    return math.isfinite(float(value.sum())) or bool(torch.isfinite(value).all())


def raw(*values: torch.Tensor) -> memoryview:
    """C-order bytes, one tensor behind another; every processor that torch runs on is little-endian. Copied
    once, since a tensor may change before they are sent: from a GPU into pinned memory, at the speed of the
    bus, behind what the current stream has been told to do."""
    flat = [value.contiguous().reshape(-1).view(torch.uint8) for value in values]
    device = flat[0].device
    pinned = device.type == "cuda"
    joined = torch.empty(sum(map(len, flat)), dtype=torch.uint8, pin_memory=pinned)
    for part, copy in zip(flat, joined.split(list(map(len, flat))), strict=True):
        copy.copy_(part, non_blocking=pinned)
    if pinned:
        torch.cuda.current_stream(device).synchronize()
    return memoryview(joined.numpy()).toreadonly()


def unraw(data: bytes | memoryview, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor behind bytes; copied once, because what gRPC hands over is read-only."""
    return (
        torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)
        if len(data)
        else torch.empty(shape, dtype=dtype)
    )
