"""Micro-batches that one frame of the split stream cannot carry: fewer examples at a time. A step sums over
its micro-batches, so nothing changes but the order of a sum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedtune.methods.sfprompt_net import Piece, SplitNet
from fedtune.split.codec import NUMBERS, size_of
from fedtune.split.frames import Limits
from fedtune.split.row_selection import Kind
from fedtune.split.stream import Stream
from fedtune.wire.v1 import split_pb2 as pb


def pieces_of(
    net: SplitNet, stream: Stream, kind: Kind, batch: Mapping[str, Any], samples: Sequence[int] = ()
) -> Iterator[Piece]:
    """A batch as one piece, or halves of it as often as frames ask for; a single example goes as it is."""
    piece, count = net.piece(batch, samples), len(batch["labels"])
    if count == 1 or fits(net, stream, kind, piece):
        yield piece
        return
    for part in (slice((count + 1) // 2), slice((count + 1) // 2, None)):
        yield from pieces_of(
            net, stream, kind, {name: value[part] for name, value in batch.items()}, samples[part]
        )


def fits(net: SplitNet, stream: Stream, kind: Kind, piece: Piece) -> bool:
    """Whether a piece's FORWARD and BACKWARD are within the stream's limits, in the coding that the client
    wants: one that it falls back to has the same size, but for float32."""
    limits: Limits = stream.limits
    examples, tokens = len(piece.labels), tokens_of(net, piece)
    rows = net.rows(piece, kind)
    down = examples * tokens if not rows else examples if "row" in rows else len(rows["rows"])
    asked = 4 * down if "rows" in rows else 0
    sent = tokens - net.count if net.lean else tokens  # prompts that enter at the cut go up by themselves
    up = coded(stream, examples * sent, net.part.width) + coded(stream, net.count * net.lean, net.part.width)
    for value, size in ((piece.side.mask, 1), (piece.side.positions, 4)):
        up += 0 if value is None else size * value.numel()
    back = coded(stream, down, net.part.width)
    most = max(up + asked, back if stream.lean else up + asked + back)
    return examples * tokens <= limits.tokens and most <= limits.payload


def coded(stream: Stream, rows: int, width: int) -> int:
    """Bytes of so many rows of hidden states or gradients."""
    coding = stream.wishes.coding
    header = pb.Tensor(number=NUMBERS[coding.name], shape=[rows, width], group=stream.hello.group)
    return size_of(header)


def tokens_of(net: SplitNet, piece: Piece) -> int:
    """Tokens of an example in front of the body, prompts included."""
    ids = piece.inputs.get("input_ids")
    return (net.image_tokens if ids is None else int(ids.shape[1])) + net.count
