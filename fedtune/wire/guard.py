"""What a receiver demands of a message before it takes memory for it; every refusal has a code of the
catalogue."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedtune.schema import Schema
from fedtune.wire.frame import ENTRIES, METRICS, PART, damaged, opened, refuse
from fedtune.wire.scales import HIGHEST, LOWEST, blocks
from fedtune.wire.v1 import message_pb2 as pb

if TYPE_CHECKING:
    pass

ROOM = 64 * 1024  # bytes of a message besides its numbers: header, metrics, head of the coder
NAME = 256  # longest name of a tensor


@dataclass(frozen=True)
class Expect:
    """What the receiver asked for. Everything else is refused.

    run, round, client, verb, base   must be equal to the header's
    schema      the tensors asked for, with the types and bounds of whole numbers; None accepts a message that
                names its tensors, up to `max_values` numbers
    kinds       the kinds of numbers that the chain sends (values, levels, ring, ring64, whole), or state,
                changes
    max_weight  most that one answer may count; max_norm of its mean (L2); max_scale of its levels' scales
    """

    run: str
    round: int
    client: int
    verb: str
    base: str = ""
    schema: Schema | None = None
    kinds: frozenset[str] = frozenset({"values"})
    max_weight: float = 1e9
    max_norm: float = math.inf
    max_scale: float = 1e36  # times 127 is still a float32
    max_values: int = 1 << 20

    @property
    def count(self) -> int:
        """Most numbers that a message may hold."""
        return self.max_values if self.schema is None else self.schema.count

    @property
    def max_message(self) -> int:
        """Bytes of the longest message: 4 a number (8 in a state or a ring of 64 bits), and room for the
        header."""
        return (
            (8 if self.kinds & {"state", "ring64"} else 4) * self.count
            + ROOM
            + (ENTRIES * PART if self.schema is None else 0)
        )

    @property
    def bound(self) -> int:
        """Bytes that decoding may need: the longest message and the update made of it, 8 a number."""
        return self.max_message + 8 * self.count


def accepted(
    data: bytes, expect: Expect, kinds: Mapping[str, int], widths: Mapping[int, int]
) -> tuple[pb.Message, memoryview, Schema, str]:
    """A message whose header, schema and sizes are as expected, and its payload; no number of it has been
    read yet.

    kinds: name -> code; widths: code of a type -> bytes. Raises Refused W601 to W607.
    """
    if len(data) > expect.max_message:
        raise refuse(
            "W606",
            f"{len(data)} bytes",
            f"at most {expect.max_message}",
            "send the tensors that were asked for",
        )
    message, payload = opened(data)
    schema = check_header(message, expect)
    kind = {code: name for name, code in kinds.items()}.get(message.kind, "")
    if kind not in expect.kinds:
        raise refuse(
            "W603",
            f"kind '{kind or message.kind}'",
            f"one of {', '.join(sorted(expect.kinds))}",
            "use the same recipe on both sides",
        )
    check_sizes(message, len(payload), kind, schema, expect, widths)
    return message, payload, schema, kind


def check_header(message: pb.Message, expect: Expect) -> Schema:
    """Run, round, client, verb, base, schema, weight and metrics. Raises W603, W604, W606, W607."""
    for word in ("run", "round", "client", "verb", "base"):
        found, asked = getattr(message, word), getattr(expect, word)
        if found != asked:
            raise refuse(
                "W604",
                f"{word} {str(found)[:60]!r}",
                f"{str(asked)!r}",
                "answer what was asked, in the round in which it was asked",
            )
    if message.since and not message.since < message.round:
        raise refuse(
            "W604",
            f"a change to round {message.since} in round {message.round}",
            "a change to an earlier round",
            "ask for the whole state",
        )
    schema = schema_of(message, expect)
    if message.schema.hex() != schema.fingerprint:
        raise refuse(
            "W603",
            f"schema {message.schema.hex()[:12]}",
            schema.fingerprint[:12],
            "use the same model, adapter and recipe on both sides",
        )
    if not (math.isfinite(message.weight) and message.weight > 0):
        raise refuse(
            "W607",
            f"weight {message.weight}",
            "a finite number above 0",
            "check the sender's count of examples",
        )
    if message.weight > expect.max_weight:
        raise refuse(
            "W606",
            f"weight {message.weight:g}",
            f"at most {expect.max_weight:g}",
            "check the sender's count of examples",
        )
    names = [metric.name for metric in message.metrics]
    if len(names) > METRICS or names != sorted(set(names)) or any(len(name) > 64 for name in names):
        raise damaged("metrics that are not in order")
    for metric in message.metrics:
        if not math.isfinite(metric.value):
            raise refuse(
                "W607",
                f"metric '{metric.name}' = {metric.value}",
                "a finite number",
                "check the sender's training",
            )
    return schema


def schema_of(message: pb.Message, expect: Expect) -> Schema:
    """The schema asked for, or the one that the message names within the bounds. Raises W603, W606."""
    if expect.schema is not None:
        if message.entries:
            named = Schema(tuple((entry.name, tuple(entry.shape)) for entry in message.entries))
            if named.entries != expect.schema.entries:
                raise refuse(
                    "W603",
                    "other names or shapes",
                    "the tensors that were asked for",
                    "use the same recipe on both sides",
                )
        return expect.schema
    names = [entry.name for entry in message.entries]
    if names != sorted(set(names)) or any(len(name) > NAME for name in names):
        raise damaged("tensor names that are not in order")
    for entry in message.entries:
        if (
            len(entry.shape) > 8
            or math.prod(entry.shape) > expect.max_values
            or any(side > expect.max_values for side in entry.shape)
        ):
            raise refuse(
                "W606",
                f"shape {tuple(entry.shape)[:8]}",
                f"at most {expect.max_values} numbers",
                "send the tensors that were asked for",
            )
    if (count := sum(math.prod(entry.shape) for entry in message.entries)) > expect.max_values:
        raise refuse(
            "W606", f"{count} numbers", f"at most {expect.max_values}", "send the tensors that were asked for"
        )
    return Schema(tuple((entry.name, tuple(entry.shape)) for entry in message.entries))


def check_sizes(
    message: pb.Message, length: int, kind: str, schema: Schema, expect: Expect, widths: Mapping[int, int]
) -> None:
    """Payload, types and scales have the sizes that kind and schema say. Raises W601, W603, W606, W607."""
    if (message.dtypes and kind not in ("state", "whole", "changes")) or (
        kind != "levels" and (message.scaling or message.scales or message.exponent)
    ):
        raise damaged(f"parts that a message of kind '{kind}' does not have")
    if kind == "levels":
        check_scales(message, schema, expect)
        return
    size = (8 if kind == "ring64" else 4) * schema.count
    if kind == "whole" and [name for name, _, _ in schema.whole] != [name for name, _ in schema.entries]:
        raise refuse(
            "W603",
            "whole numbers",
            "numbers of the kind that was asked for",
            "use the same recipe on both sides",
        )
    if kind in ("state", "whole", "changes"):
        if len(message.dtypes) != len(schema.entries) or any(code not in widths for code in message.dtypes):
            raise refuse(
                "W603",
                "types of tensors that are not known",
                "one for each tensor",
                "install the same version of fedtune on both sides",
            )
        size = sum(
            math.prod(shape) * widths[code]
            for (_, shape), code in zip(schema.entries, message.dtypes, strict=True)
        )
    if length != size and kind != "changes":  # whose length only their reader can tell
        raise damaged(f"{length} bytes of numbers where {size} belong")


def check_scales(message: pb.Message, schema: Schema, expect: Expect) -> None:
    """Scales are as many as can be known before the levels are, not negative, finite and capped."""
    many = {
        pb.SCALING_TENSOR: len(schema.entries),
        pb.SCALING_BLOCK64: sum(blocks(math.prod(shape)) for _, shape in schema.entries),
        pb.SCALING_KEPT: min(len(message.scales) // 2, schema.count),
    }.get(message.scaling)
    if many is None or len(message.scales) != 2 * many:
        raise damaged(f"{len(message.scales)} bytes of scales where {2 * (many or 0)} belong")
    if not LOWEST <= message.exponent <= HIGHEST:
        raise refuse(
            "W607",
            f"an exponent of {message.exponent}",
            f"{LOWEST} to {HIGHEST}",
            "check the sender's training",
        )
    halves = np.frombuffer(message.scales, "<f2")
    if not np.isfinite(halves).all() or np.signbit(halves).any():
        raise refuse(
            "W607",
            "a scale that is negative or not finite",
            "finite scales of 0 or more",
            "check the sender's training",
        )
    if halves.size and (largest := math.ldexp(float(halves.max()), message.exponent)) > expect.max_scale:
        raise refuse(
            "W606",
            f"a scale of {largest:g}",
            f"at most {expect.max_scale:g}",
            "check the sender's training, or raise the bound",
        )


def check_norm(values: Iterable[np.ndarray], expect: Expect) -> None:
    """Refuse an answer whose mean is longer than the receiver allows. Raises W606."""
    if not math.isfinite(expect.max_norm):
        return
    norm = math.sqrt(sum(square(value.reshape(-1)) for value in values))
    if norm > expect.max_norm:
        raise refuse(
            "W606",
            f"an answer of norm {norm:.6g}",
            f"at most {expect.max_norm:g}",
            "check the sender's training, or raise the bound",
        )


def square(flat: NDArray[np.floating]) -> float:
    """Sum of squares in float64, a piece at a time so that no float64 copy of a whole tensor is made."""
    return sum(
        float(np.dot(part, part))
        for part in (flat[i : i + 65536].astype(np.float64) for i in range(0, flat.size, 65536))
    )
