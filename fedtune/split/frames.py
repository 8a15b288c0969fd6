"""Frames of the split stream: cut into parts and joined, and what a receiver refuses before it takes memory.

See protos/fedtune/wire/v1/split.proto for who sends what. A parcel is a micro-batch or an answer once its
parts are together.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from google.protobuf.message import DecodeError

from fedtune.errors import FedtuneError, Refused
from fedtune.split.codec import Coded, size_of
from fedtune.wire.v1 import split_pb2 as pb

VERSION = 1
CALL = "/fedtune.wire.v1.Split/Train"
LONGEST = 1 << 20  # bytes of a frame: gRPC's default refuses messages above 4 MiB
CHUNK = LONGEST - (64 << 10)  # bytes of payload in it; the rest is for headers and sample ids

FLOATS = frozenset({pb.NUMBER_FLOAT32, pb.NUMBER_FLOAT16, pb.NUMBER_BFLOAT16, pb.NUMBER_INT8})
# role -> how many sides and which numbers it may have; activations that are rows, and their gradients, have
# two sides
FORMS: Mapping[int, tuple[tuple[int, ...], frozenset[int]]] = {
    pb.ROLE_HIDDEN: ((2, 3), FLOATS),
    pb.ROLE_MASK: ((2,), frozenset({pb.NUMBER_UINT8})),
    pb.ROLE_POSITIONS: ((2,), frozenset({pb.NUMBER_INT32})),
    pb.ROLE_PROMPTS: ((2,), FLOATS),
    pb.ROLE_ROWS: ((1,), frozenset({pb.NUMBER_INT32})),
    pb.ROLE_GRADIENT: ((2, 3), FLOATS),
}


@dataclass(frozen=True)
class Limits:
    """What one micro-batch may be. Both ends hold their peer to it.

    tokens    examples times tokens, prompts included
    width     of the hidden states
    payload   bytes
    """

    tokens: int = 16_384
    width: int = 16_384
    payload: int = 64 << 20


LIMITS = Limits()


@dataclass(frozen=True)
class Parcel:
    """A whole micro-batch or answer.

    digest   BLAKE2b-64 of headers and payload
    forward  the same without the gradient: of a BACKWARD that says its FORWARD again, the FORWARD's digest
    """

    frame: pb.Frame  # of part 0, its payload cleared
    tensors: Mapping[int, Coded]  # role -> tensor
    digest: bytes
    forward: bytes
    size: int  # bytes of the payload


# --- sending ---


def packed(frame: pb.Frame, tensors: Sequence[Coded] = ()) -> tuple[list[bytes], bytes, bytes]:
    """A frame and its tensors as messages of at most 1 MiB; and the parcel's `digest` and `forward`."""
    frame.tensors.extend(coded.header for coded in tensors)
    payload = b"".join(coded.data for coded in tensors)
    digest, forward = digests(frame, [(coded.header.role, coded.data) for coded in tensors])
    view, messages = memoryview(payload), []
    for part in range(max(1, math.ceil(len(payload) / CHUNK))):
        piece = frame if part == 0 else pb.Frame(kind=frame.kind, sequence=frame.sequence, part=part)
        piece.payload = payload if len(payload) <= CHUNK else bytes(view[part * CHUNK : (part + 1) * CHUNK])
        messages.append(piece.SerializeToString(deterministic=True))
    return messages, digest, forward


def failed(sequence: int, error: FedtuneError, samples: Sequence[int] = ()) -> bytes:
    """An error as a frame."""
    failure = pb.Failure(
        code=error.code,
        found=error.found[:500],
        expected=error.expected[:500],
        advice=error.do[:500],
        samples=samples,
    )
    return pb.Frame(kind=pb.FRAME_ERROR, sequence=sequence, failure=failure).SerializeToString()


def digests(frame: pb.Frame, tensors: Iterable[tuple[int, bytes | memoryview]]) -> tuple[bytes, bytes]:
    """`digest` and `forward` of a parcel: its header fields and payload, with and without the gradient."""
    whole, forward = hashlib.blake2b(digest_size=8), b""
    whole.update(repr((frame.at, frame.row, tuple(frame.samples))).encode())
    for header, (role, data) in zip(frame.tensors, tensors, strict=True):
        if role == pb.ROLE_GRADIENT:
            forward = whole.digest()
        whole.update(repr((role, header.number, tuple(header.shape), header.group)).encode())
        whole.update(data)
    digest = whole.digest()
    return digest, forward or digest


# --- receiving ---


def parsed(data: bytes) -> pb.Frame:
    """Bytes -> frame. Raises Refused W601, W606."""
    if len(data) > LONGEST:
        raise Refused(
            "W606", f"a frame of {len(data)} bytes", f"at most {LONGEST}", "send the payload in parts"
        )
    try:
        return pb.Frame.FromString(data)
    except DecodeError:
        raise Refused(
            "W601", f"{len(data)} bytes that are not a frame", "a frame of the split stream", "send it again"
        ) from None


class Joiner:
    """Puts a peer's frames together: one parcel at a time, its parts in order. Holds at most the payload that
    its headers declared."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.head: pb.Frame | None = None
        self.held = bytearray()
        self.wanted = 0

    def add(self, frame: pb.Frame) -> Parcel | None:
        """The parcel that this frame completes, or None. Raises Refused W601, W603, W606; what was held is
        dropped then."""
        head, held = self.head, self.held
        self.head, self.held = None, bytearray()
        if frame.part == 0:
            wanted = measured(frame.tensors, self.limits)
            if len(frame.payload) == wanted:
                return joined(frame, frame.payload)
            head, held, self.wanted = frame, bytearray(), wanted
        elif (
            head is None
            or (frame.kind, frame.sequence) != (head.kind, head.sequence)
            or frame.part * CHUNK != len(held)
        ):
            raise Refused(
                "W601",
                f"part {frame.part} of micro-batch {frame.sequence} out of order",
                "every part, in order",
                "send the micro-batch again",
            )
        left = self.wanted - len(held)
        if len(frame.payload) != min(CHUNK, left):
            found = f"{len(frame.payload)} bytes in part {frame.part} of micro-batch {frame.sequence}"
            raise Refused(
                "W601", found, f"{min(CHUNK, left)}, as its headers say", "send the micro-batch again"
            )
        held += frame.payload
        if len(held) == self.wanted:
            head.ClearField("payload")
            return joined(head, held)
        self.head, self.held = head, held
        return None


def joined(frame: pb.Frame, payload: bytes | bytearray) -> Parcel:
    """The parcel of a frame whose headers fit its payload."""
    tensors: dict[int, Coded] = {}
    view, at = memoryview(payload), 0
    for header in frame.tensors:
        size = size_of(header)
        tensors[header.role] = Coded(header, view[at : at + size])
        at += size
    digest, forward = digests(frame, [(role, coded.data) for role, coded in tensors.items()])
    frame.ClearField("payload")
    return Parcel(frame, tensors, digest, forward, len(payload))


def measured(headers: Sequence[pb.Tensor], limits: Limits) -> int:
    """Bytes that tensors with these headers take; nothing is allocated. Raises Refused W601, W603, W606."""
    roles = [header.role for header in headers]
    if roles != sorted(set(roles)):
        raise Refused(
            "W601",
            f"tensors with roles {roles[:8]}",
            "each role once, ascending",
            "send the micro-batch again",
        )
    total = 0
    for header in headers:
        check(header, limits)
        total += size_of(header)
    if total > limits.payload:
        raise Refused(
            "W606", f"a payload of {total} bytes", f"at most {limits.payload}", "send smaller micro-batches"
        )
    return total


def check(header: pb.Tensor, limits: Limits) -> None:
    """One header: its role, numbers, dimensions and size. Raises Refused W603, W606."""
    sides, numbers = FORMS.get(header.role, ((), frozenset()))
    shape = tuple(header.shape[:4])
    if header.number not in numbers:
        raise Refused(
            "W603",
            f"a tensor of role {header.role} in numbers of type {header.number}",
            "those of split.proto",
            "use the same version on both sides",
        )
    if len(header.shape) not in sides:
        raise Refused(
            "W603",
            f"a tensor of role {header.role} and shape {shape}",
            f"one of {sides} sides",
            "use the same version on both sides",
        )
    floating = header.number in FLOATS
    bounds = (*(limits.tokens for _ in shape[:-1]), limits.width if floating else limits.tokens)
    if (
        any(side > bound or side == 0 for side, bound in zip(shape, bounds, strict=True))
        or math.prod(shape[: -1 if floating else None]) > limits.tokens
    ):
        raise Refused(
            "W606",
            f"a tensor of shape {shape}",
            f"1 to {limits.tokens} tokens of width at most {limits.width}",
            "send smaller micro-batches",
        )
    if (header.number == pb.NUMBER_INT8) != bool(header.group) or (header.group and shape[-1] % header.group):
        raise Refused(
            "W603",
            f"groups of {header.group} in a last side of {shape[-1]}",
            "groups that divide it, for int8 only",
            "use the same version on both sides",
        )
