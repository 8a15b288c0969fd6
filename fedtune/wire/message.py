"""Updates and states as bytes and back. Equal updates give equal bytes; what comes from outside is checked
before memory is taken.

    data = encode(update, Header(run, round, client, verb, base))
    header, update = decode(data, Expect(run, round, client, verb, base, schema=asked))

What each field means stands in protos/fedtune/wire/v1/message.proto. Names and shapes do not travel: the
schema's fingerprint says that both sides mean the same tensors. A message that does name them can be read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fedtune.errors import ClientFailed, FedtuneError
from fedtune.schema import Schema
from fedtune.types import Tensors, Update
from fedtune.wire import coder
from fedtune.wire.changes import pack_changes, unpack_changes
from fedtune.wire.frame import METRICS, VERSIONS, opened, refuse, sealed
from fedtune.wire.guard import Expect, accepted, check_norm
from fedtune.wire.integers import pack_whole, unpack_whole
from fedtune.wire.scales import blocks, expand, to_halves
from fedtune.wire.v1 import message_pb2 as pb

EVERYONE = -1  # client of a state that is the same for all
DTYPES: dict[str, int] = {
    "float32": 1,
    "float64": 2,
    "int8": 3,
    "uint8": 4,
    "int32": 5,
    "uint32": 6,
    "int64": 7,
    "int16": 8,
}
KINDS: dict[str, pb.Kind] = {
    "values": pb.KIND_VALUES,
    "levels": pb.KIND_LEVELS,
    "ring": pb.KIND_RING,
    "ring64": pb.KIND_RING64,
    "state": pb.KIND_STATE,
    "whole": pb.KIND_WHOLE,
}
KINDS |= {"changes": pb.KIND_CHANGES}
WIDTHS = {code: np.dtype(name).itemsize for name, code in DTYPES.items()}

SCALINGS: dict[int, pb.Scaling] = {
    0: pb.SCALING_TENSOR,
    1: pb.SCALING_BLOCK64,
    2: pb.SCALING_KEPT,
}  # by dimensions of the scales


@dataclass(frozen=True)
class Header:
    """Who says it, and about what. Weight and metrics are the update's own.

    run     the run's id
    round   1 is the first
    client  sender of an answer, receiver of a state, EVERYONE
    verb    what was asked
    base    fingerprint of the frozen base model, "" where there is none
    schema  fingerprint of names and shapes; "" takes that of the tensors sent
    since   of a state: the numbers change the broadcast of this round; 0: they are the whole state
    whole   of an answer in whole numbers: as the schema's
    """

    run: str
    round: int
    client: int
    verb: str
    base: str = ""
    schema: str = ""
    since: int = 0
    whole: tuple[tuple[str, str, int], ...] = ()


def kind_of(update: Update) -> str:
    """values, levels, ring, ring64 or whole, from the types of the tensors. Raises TypeError for anything
    else."""
    types = {np.asarray(value).dtype.name for value in update.tensors.values()}
    if types <= {"float64", "float32"} and not update.scales:
        return "values"
    if types == {"int8"} and update.scales.keys() == update.tensors.keys():
        return "levels"
    if types == {"uint32"} and not update.scales:
        return "ring"
    if types == {"uint64"} and not update.scales:
        return "ring64"
    if types == {"int64"} and not update.scales:
        return "whole"
    raise TypeError(f"no message kind for tensors of type {sorted(types)} with {len(update.scales)} scales")


def encode(update: Update, header: Header) -> bytes:
    """An answer as bytes: float32 means, integer levels with scales, ring numbers, or whole means
    (`header.whole`). Raises ClientFailed W607."""
    check_weight(update)
    kind = kind_of(update)
    numbers = pack_whole(update, header.whole) if kind == "whole" else {}
    message = headed(header, kind, Schema.of(update.tensors), update.weight)
    if len(update.metrics) > METRICS or any(len(name) > 64 for name in update.metrics):
        raise ValueError(f"at most {METRICS} metrics with names of at most 64 characters can travel")
    for name in sorted(update.metrics):
        if not math.isfinite(update.metrics[name]):
            raise unfit(f"metric '{name}' = {update.metrics[name]}")
        message.metrics.append(pb.Metric(name=name, value=update.metrics[name]))
    if kind == "levels":
        return sealed(message, [fill_levels(message, update)])
    if kind == "whole":
        message.dtypes = bytes(DTYPES[numbers[name].dtype.name] for name in sorted(numbers))
        return sealed(message, raw(numbers))
    with np.errstate(over="ignore"):  # what overflows float32 is found by the check below and named
        tensors = update.values() if kind == "values" else update.tensors
    if name := not_finite(tensors):
        raise unfit(f"a value of '{name}' that is not finite in float32")
    return sealed(message, raw(tensors))


def encode_state(tensors: Tensors, header: Header) -> bytes:
    """A state as bytes, every tensor of its own type. Raises FedtuneError W607, TypeError for types that
    cannot travel."""
    types = [np.asarray(tensors[name]).dtype.name for name in sorted(tensors)]
    if strange := set(types) - DTYPES.keys():
        raise TypeError(f"no message type for {sorted(strange)}")
    if name := not_finite(tensors):
        raise FedtuneError(
            "W607",
            f"a value of '{name}' in the state that is not finite",
            "finite numbers",
            "lower method.train.lr or the server's learning rate",
        )
    message = headed(header, "state", Schema.of(tensors), 1.0)
    message.dtypes = bytes(DTYPES[name] for name in types)
    return sealed(message, raw(tensors))


def encode_changes(tensors: Tensors, changed: Tensors, header: Header) -> bytes:
    """A state of whole numbers as the numbers that are marked in `changed`: all others are as in the
    broadcast of round `header.since`, or 0 (since 0)."""
    message = headed(header, "changes", Schema.of(tensors), 1.0)
    message.dtypes = bytes(DTYPES[tensors[name].dtype.name] for name in sorted(tensors))
    return sealed(message, [pack_changes(tensors, changed)])


def decode(data: bytes, expect: Expect) -> tuple[Header, Update]:
    """The answer in `data`, as its sender held it to the bit. Raises Refused W601 to W604, W606, W607: that
    it came before (W605), a message cannot show."""
    message, payload, schema, kind = accepted(data, expect, KINDS, WIDTHS)
    if kind in ("state", "changes"):
        raise refuse("W603", "a state", "an answer", "send what was asked for")
    weight, metrics = message.weight, {metric.name: metric.value for metric in message.metrics}
    header = header_of(message)
    if kind == "levels":
        levels, scales = read_levels(message, payload, schema)
        update = Update(levels, weight, metrics, scales)
        if math.isfinite(expect.max_norm):
            check_norm((expand(levels[name], scales[name]) for name in levels), expect)
        return header, update
    if kind == "whole":
        if list(message.dtypes) != [DTYPES[stored] for _, stored, _ in schema.whole]:
            raise refuse(
                "W603",
                "whole numbers of other types",
                "the declared types",
                "use the same recipe on both sides",
            )
        return header, Update(unpack_whole(payload, schema, weight), weight, metrics)
    if kind in ("ring", "ring64"):
        stored = np.dtype(np.uint32 if kind == "ring" else np.uint64)
        numbers = np.frombuffer(payload, stored.newbyteorder("<")).astype(stored)
        return header, Update(split(numbers, schema), weight, metrics)
    flat = np.frombuffer(payload, "<f4")
    if not np.isfinite(flat).all():
        raise refuse("W607", "a value that is not finite", "finite numbers", "check the sender's training")
    values = split(flat, schema)
    check_norm(values.values(), expect)
    return header, Update(Update.of(values, weight).tensors, weight, metrics)


def decode_state(
    data: bytes, expect: Expect, held: tuple[int, Tensors] = (0, {})
) -> tuple[Header, dict[str, np.ndarray]]:
    """The state in `data`, every tensor of the type that it was sent as. `held`: a round and its broadcast,
    on which changes may build. Raises Refused."""
    message, payload, schema, kind = accepted(data, expect, KINDS, WIDTHS)
    if kind == "changes":
        if message.since not in (0, held[0]):
            found = f"changes relative to the broadcast of round {message.since}"
            raise refuse(
                "W604",
                found,
                "a broadcast that this client has",
                "the server sends the whole state next time",
            )
        kinds = {code: np.dtype(name) for name, code in DTYPES.items()}
        types = [kinds[code] for code in message.dtypes]
        return header_of(message), unpack_changes(payload, schema, types, held[1] if message.since else {})
    if kind != "state":
        raise refuse("W603", f"an answer of kind '{kind}'", "a state", "send what was asked for")
    names = {code: name for name, code in DTYPES.items()}
    tensors, at = {}, 0
    for (name, shape), code in zip(schema.entries, message.dtypes, strict=True):
        kept = np.dtype(names[code])
        size = math.prod(shape)
        value = np.frombuffer(payload, kept.newbyteorder("<"), size, at).astype(kept).reshape(shape)
        if kept.kind == "f" and not np.isfinite(value).all():
            raise refuse(
                "W607",
                f"a value of '{name}' that is not finite",
                "finite numbers",
                "check the sender's state",
            )
        tensors[name] = value
        at += size * kept.itemsize
    return header_of(message), tensors


def schema_named(data: bytes) -> str:
    """The fingerprint of the schema that a message says it follows, as hex; nothing else is read. Raises
    Refused W601, W602, W606."""
    return opened(data)[0].schema.hex()


# --- parts ---


def headed(header: Header, kind: str, schema: Schema, weight: float) -> pb.Message:
    """A message with everything but its numbers."""
    message = pb.Message(
        version=VERSIONS[0],
        run=header.run,
        round=header.round,
        client=header.client,
        verb=header.verb,
        base=header.base,
        since=header.since,
    )
    message.kind, message.weight = KINDS[kind], weight
    message.schema = bytes.fromhex(header.schema or schema.fingerprint)
    return message


def header_of(message: pb.Message) -> Header:
    return Header(
        message.run,
        message.round,
        message.client,
        message.verb,
        message.base,
        message.schema.hex(),
        message.since,
    )


def fill_levels(message: pb.Message, update: Update) -> bytes:
    """Scales into the message, and the packed levels. Raises ValueError for scales that do not fit their
    tensors."""
    names = sorted(update.tensors)
    ranks = {update.scales[name].ndim for name in names}
    if len(ranks) != 1:
        raise ValueError(f"scales of {sorted(ranks)} dimensions in one message")
    message.scaling = SCALINGS[ranks.pop()]
    for name in names:
        fits = scale_shape(message.scaling, update.tensors[name])
        if update.scales[name].shape != fits:
            raise ValueError(
                f"scales of '{name}' have shape {update.scales[name].shape}, its levels need {fits}"
            )
    halves, message.exponent = to_halves(
        np.concatenate([update.scales[name].reshape(-1) for name in names]).astype(np.float32, copy=False)
    )
    message.scales = halves.tobytes()
    packed = coder.pack(np.concatenate([update.tensors[name].reshape(-1) for name in names]))
    message.version = coder.version_of(packed)
    return packed


def read_levels(
    message: pb.Message, payload: memoryview, schema: Schema
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Levels (int8) and scales (float32) of every tensor; `check_sizes` has seen the scales."""
    if coder.version_of(payload) > message.version:
        raise refuse(
            "W601",
            f"levels of a later version than the message's, {message.version}",
            f"version {coder.version_of(payload)}",
            "the message is dropped; the sender should send it again",
        )
    levels = split(coder.unpack(payload, schema.count), schema)
    flat = np.ldexp(np.frombuffer(message.scales, "<f2").astype(np.float64), message.exponent).astype(
        np.float32
    )
    scales: dict[str, np.ndarray] = {}
    at = 0
    for name, value in levels.items():
        shape = scale_shape(message.scaling, value)
        size = math.prod(shape)
        if at + size > flat.size:
            break
        scales[name] = flat[at : at + size].reshape(shape)
        at += size
    if at != flat.size or len(scales) != len(levels):
        raise refuse(
            "W601",
            f"{flat.size} scales",
            "as many as the levels need",
            "the message is dropped; the sender should send it again",
        )
    return levels, scales


def scale_shape(scaling: pb.Scaling, levels: np.ndarray) -> tuple[int, ...]:
    """The shape of a tensor's scales, see fedtune/wire/scales.py."""
    if scaling == pb.SCALING_TENSOR:
        return ()
    return (blocks(levels.size),) if scaling == pb.SCALING_BLOCK64 else (int(np.count_nonzero(levels)), 1)


def split(flat: np.ndarray, schema: Schema) -> dict[str, np.ndarray]:
    """A flat array as the schema's tensors (views)."""
    out, at = {}, 0
    for name, shape in schema.entries:
        size = math.prod(shape)
        out[name] = flat[at : at + size].reshape(shape)
        at += size
    return out


def raw(tensors: Tensors) -> list[bytes]:
    """All tensors in name order as little-endian bytes."""
    arrays = [np.asarray(tensors[name]) for name in sorted(tensors)]
    return [np.ascontiguousarray(value, value.dtype.newbyteorder("<")).tobytes() for value in arrays]


def check_weight(update: Update) -> None:
    if not (math.isfinite(update.weight) and update.weight > 0):
        raise unfit(f"weight {update.weight}")


def not_finite(tensors: Tensors) -> str:
    """The first tensor with a number that is not finite; "" if there is none."""
    return next(
        (
            name
            for name, value in tensors.items()
            if np.asarray(value).dtype.kind == "f" and not np.isfinite(value).all()
        ),
        "",
    )


def unfit(found: str) -> ClientFailed:
    return ClientFailed(
        "W607", found, "finite numbers", "lower the learning rate or check the data of this client"
    )
