"""Linear layers whose weights are held in 4 or 8 bits, and multiplied as numbers of an ordinary type.

4bit  NF4 (Dettmers et al. 2023, QLoRA, arXiv:2305.14314, section 3): of every 64 numbers, in the order of
      rows, each over the largest magnitude is the nearest of 16 quantiles of a normal distribution (their
      appendix E). The magnitude is a bfloat16: 4.25 bits a number.
8bit  of every row, each number over the largest magnitude is one of 255 equal steps (Dettmers et al. 2022,
      LLM.int8(), arXiv:2208.07339, section 2.1, vector-wise). The magnitude is a float32. Inputs stay as
      they are: LLM.int8() rounds them, too, and then gradients are not those of what was computed.

Divisions, comparisons and products alone, each rounded once: the same codes and the same weights on every
device. docs/decisions/0018 says why no library does it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

BITS = {"8bit": 8, "4bit": 4}
BLOCK = 64  # numbers of one scale, in 4 bits
LEVELS = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip
BETWEEN = (LEVELS[:-1] + LEVELS[1:]) / 2
# the two numbers that a byte stands for, as one word: a lookup for two
PAIRS = torch.stack([LEVELS.repeat_interleave(16), LEVELS.repeat(16)], 1).view(torch.int64).reshape(-1)
LIMIT = Path("/sys/fs/cgroup/memory.max")


def to_nf4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 matrix of n numbers as ceil(n / 64) x 32 bytes, the first of two numbers in the higher half
    of a byte, and ceil(n / 64) scales."""
    blocks = functional.pad(weight.reshape(-1), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    scales = blocks.abs().amax(1).bfloat16()
    share = blocks / torch.where(scales > 0, scales.float(), 1.0)[:, None]
    codes = torch.bucketize(share, BETWEEN.to(weight.device), out_int32=True).to(torch.uint8)
    return ((codes[:, ::2] << 4) | codes[:, 1::2]).reshape(-1), scales


def from_nf4(
    codes: torch.Tensor, scales: torch.Tensor, pairs: torch.Tensor, shape: torch.Size
) -> torch.Tensor:
    """The float32 matrix that they stand for."""
    levels = pairs.index_select(0, codes.int()).view(torch.float32).view(-1, BLOCK)
    return levels.mul_(scales.float()[:, None]).view(-1)[: shape.numel()].view(shape)


def to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A float32 matrix as bytes of its shape, and a scale for each row."""
    scales = weight.abs().amax(1) / 127
    return (weight / torch.where(scales > 0, scales, 1.0)[:, None]).round().to(torch.int8), scales


class Product(torch.autograd.Function):  # type: ignore[misc]
    """x W^T + b, with W made of its codes for each of the two passes and not kept between them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, layer: QuantisedLinear) -> torch.Tensor:
        ctx.layer, ctx.dtype, kind = layer, x.dtype, x.device.type
        mixed = not x.is_meta and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if mixed else x.dtype
        bias = None if layer.bias is None else layer.bias.to(dtype)
        with torch.autocast(kind if mixed else "cpu", enabled=False):
            return functional.linear(x.to(dtype), layer.dequantize(dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return (grad @ ctx.layer.dequantize(grad.dtype)).to(ctx.dtype), None


class QuantisedLinear(nn.Linear):  # type: ignore[misc]
    """A frozen linear layer in 4 or 8 bits; a linear layer to peft, whose DoRA asks `W_q` and `dequantize`.

    weight  the codes, as int8, by which transformers knows a type that nothing may be converted to
    scales  of blocks or rows
    pairs   what a byte of two codes means
    """

    def __init__(self, layer: Any, bits: int, dtype: torch.dtype, device: torch.device) -> None:
        """Of a Linear or GPT-2's Conv1D, whose numbers are given back as `dtype` where nobody says another;
        of torch's meta device, the sizes."""
        nn.Module.__init__(self)  # not Linear's own, which draws weights
        own = layer.weight.detach()
        weight = own.T if isinstance(layer, Conv1D) else own
        self.out_features, self.in_features = weight.shape
        self.bits, self.dtype = bits, dtype
        if own.is_meta:
            blocks = -(-weight.numel() // BLOCK)
            codes = own.new_empty(weight.shape if bits == 8 else (blocks * BLOCK // 2,), dtype=torch.int8)
            rows = own.new_empty(weight.shape[0], dtype=torch.float32)
            scales = rows if bits == 8 else own.new_empty(blocks, dtype=torch.bfloat16)
        else:
            made = (to_int8 if bits == 8 else to_nf4)(weight.to(device, torch.float32).contiguous())
            codes, scales = made[0].view(torch.int8), made[1]
        self.weight, self.bias = nn.Parameter(codes, requires_grad=False), layer.bias
        self.register_buffer("scales", scales, persistent=False)
        self.register_buffer("pairs", PAIRS.to(codes.device) if bits == 4 else None, persistent=False)

    @property
    def W_q(self) -> torch.Tensor:
        return self.weight

    @property
    def scale_bytes(self) -> int:
        """Of what is held beside the codes."""
        return int(self.scales.numel() * self.scales.element_size())

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weights that the codes stand for, (out, in)."""
        if self.bits == 8:
            made = self.weight.float().mul_(self.scales[:, None])
        else:
            shape = torch.Size((self.out_features, self.in_features))
            made = from_nf4(self.weight.view(torch.uint8), self.scales, self.pairs, shape)
        return made.to(dtype or self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Product.apply(x, self)


def quantise(
    net: nn.Module, names: Collection[str], load: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Put these linear layers in as many bits as `load` says, one by one, on a device; the other parameters
    become `dtype` where they are."""
    for name in names:
        net.set_submodule(name, QuantisedLinear(net.get_submodule(name), BITS[load], dtype, device))
    for value in net.parameters():
        if value.is_floating_point():
            value.data = value.data.to(dtype)
    with suppress(OSError, AttributeError):  # no glibc, whose heap keeps what was freed between the codes
        ctypes.CDLL(None).malloc_trim(0)


def quantised(net: nn.Module) -> dict[str, QuantisedLinear]:
    """The quantised layers of a network by name, with or without an adapter around them."""
    return {name: module for name, module in net.named_modules() if isinstance(module, QuantisedLinear)}


def fitting(net: nn.Module, names: Collection[str], device: torch.device) -> str:
    """What "auto" stands for: the first of full, 8bit and 4bit in which a network's weights take no more than
    half of a device's memory; 4bit where none does."""
    values = {id(value): value for value in net.parameters()}
    whole = sum(value.numel() * value.element_size() for value in values.values())
    linear = [net.get_submodule(name).weight for name in names]
    rest = whole - sum(value.numel() * value.element_size() for value in linear)
    count = sum(value.numel() for value in linear)
    sizes = {"full": whole, "8bit": rest + count, "4bit": rest + count * 17 // 32}
    most = memory_of(device) // 2
    return next((load for load, size in sizes.items() if size <= most), "4bit")


def memory_of(device: torch.device) -> int:
    """Bytes of a device's memory, or of main memory as far as the control group allows, used or not: what
    does not change from one moment to the next."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no such control group, or "max"
        most = min(most, int(LIMIT.read_text()))
    return most
