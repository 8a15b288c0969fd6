"""Soft prompts (P, d) among the hidden states: at index 0 of a decoder, behind the class token of an
encoder."""

from __future__ import annotations

import torch

from fedtune.split.cut import Side


def put_in(hidden: torch.Tensor, prompts: torch.Tensor, place: int) -> torch.Tensor:
    """(B, T, d) and (P, d) or (B, P, d) -> (B, T + P, d). Differentiable in both."""
    rows = prompts.to(hidden.dtype)
    rows = rows.expand(len(hidden), -1, -1) if prompts.ndim == 2 else rows
    return torch.cat([hidden[:, :place], rows, hidden[:, place:]], 1)


def longer(side: Side, count: int, place: int) -> Side:
    """The side information of a hidden state with `count` prompts in it: they are real tokens at the
    positions 0, 1, ... of a decoder."""
    mask, positions, last = side.mask, side.positions, side.last
    if mask is not None:
        mask = torch.cat([mask[:, :place], mask.new_ones(len(mask), count), mask[:, place:]], 1)
    if positions is not None:
        own = torch.arange(place, place + count, device=positions.device, dtype=positions.dtype).expand(
            len(positions), -1
        )
        positions = torch.cat([positions[:, :place], own, positions[:, place:] + count], 1)
    return Side(mask, positions, None if last is None else last + count)


def insert(hidden: torch.Tensor, side: Side, prompts: torch.Tensor, place: int) -> tuple[torch.Tensor, Side]:
    """Prompts (P, d), or (B, P, d) where the rows belong to different clients, put into a hidden state at the
    cut."""
    return put_in(hidden, prompts, place), longer(side, prompts.shape[-2], place)


def insert_labels(labels: torch.Tensor, count: int, place: int) -> torch.Tensor:
    """A language model's labels (B, T) -> (B, T + count): prompts carry no loss."""
    return torch.cat([labels[:, :place], labels.new_full((len(labels), count), -100), labels[:, place:]], 1)


def prompt_grad(grad: torch.Tensor, count: int, place: int) -> torch.Tensor:
    """Gradient of a hidden state with prompts (B, T + P, d) -> the prompts' own (P, d), summed over the batch
    as autograd does."""
    return grad[:, place : place + count].sum(0)
