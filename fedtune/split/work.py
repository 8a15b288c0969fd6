"""From a checked parcel to what the body computes, and from its result to what is sent: prompts put in, rows
taken out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from fedtune.errors import Refused
from fedtune.split import codec
from fedtune.split.codec import Coded, decode, example
from fedtune.split.cut import Side
from fedtune.split.frames import Limits, Parcel
from fedtune.split.session import HeldSamples, Session
from fedtune.wire.v1 import split_pb2 as pb


class Missing(Refused):
    """S713: what the parcel refers to is not held; it has to be said again, whole."""

    def __init__(self, found: str, samples: Sequence[int] = ()) -> None:
        super().__init__(
            "S713",
            found,
            "hidden states that this service still has",
            "send the micro-batch again, with its hidden states",
        )
        self.samples = tuple(samples)


@dataclass(frozen=True)
class Sample:
    """What is held of one: hidden states (tokens, width) up to its last real token, and its mask up to there,
    b"" where it has none."""

    row: Coded
    mask: bytes


@dataclass(frozen=True)
class Work:
    """One pass.

    forward   digest of the FORWARD that this is, or belongs to
    hidden    (examples, tokens, width), prompts put in
    grad      as hidden, or None: a forward
    rows      (rows,) which rows of the output, flattened, come down; None: all, as (examples, tokens, width)
    prompts   how many stand before place `at`; 0: the gradient is that of the hidden states
    """

    forward: bytes
    hidden: torch.Tensor
    side: Side
    grad: torch.Tensor | None
    rows: torch.Tensor | None
    prompts: int
    at: int

    def finish(self, result: torch.Tensor) -> torch.Tensor:
        """What comes down: the rows asked for, or the gradient, summed over the batch where it is that of
        prompts."""
        if self.grad is None:
            if self.rows is None:
                return result
            return result.reshape(-1, result.shape[-1])[self.rows.to(result.device)]
        return result[:, self.at : self.at + self.prompts].sum(0) if self.prompts else result


def prepared(parcel: Parcel, session: Session, held: HeldSamples, limits: Limits) -> Work:
    """What to compute for a parcel. Raises Refused W603, W606, W607, S717, Missing S713."""
    hello, frame, tensors, forward = session.hello, parcel.frame, parcel.tensors, parcel.forward
    backward = frame.kind == pb.FRAME_BACKWARD
    if (backward and pb.ROLE_GRADIENT not in tensors) or (not backward and pb.ROLE_GRADIENT in tensors):
        raise unfit("a gradient" if not backward else "no gradient", "one in a BACKWARD, none in a FORWARD")
    if backward and frame.digest:  # lean: the FORWARD is held
        (first,) = held.get(hello.session, [frame.sequence])
        if first is None:
            raise Missing(f"a BACKWARD of micro-batch {frame.sequence}, whose FORWARD is not held")
        if frame.digest != first.forward:
            raise Refused(
                "S717",
                f"the gradient of another micro-batch than {frame.sequence}",
                "its own",
                "use a new number for every micro-batch",
            )
        forward, frame = first.forward, first.frame
        tensors = {**first.tensors, pb.ROLE_GRADIENT: tensors[pb.ROLE_GRADIENT]}
    hidden = assembled(tensors, frame, session, held, limits)
    examples, tokens = hidden.shape[0], hidden.shape[1]
    side = Side(
        whole(tensors, pb.ROLE_MASK, hello.masked, (examples, tokens), 2),
        whole(tensors, pb.ROLE_POSITIONS, hello.positioned, (examples, tokens), 1 << 24),
    )
    rows = chosen(tensors, frame.row, examples, tokens)
    grad = None
    if backward:
        came = (examples, tokens, hello.width) if rows is None else (len(rows), hello.width)
        if tensors[pb.ROLE_GRADIENT].shape != came:
            raise unfit(
                f"a gradient of shape {tensors[pb.ROLE_GRADIENT].shape}", f"{came}, as its activations"
            )
        grad = finite(tensors[pb.ROLE_GRADIENT])
        if rows is not None:
            spread = hidden.new_zeros(examples * tokens, hello.width)
            spread[rows] = grad
            grad = spread.reshape(hidden.shape)
    return Work(forward, hidden, side, grad, rows, hello.prompts, frame.at)


def keep(parcel: Parcel, session: Session, held: HeldSamples) -> None:
    """Hold what the client opted in to: the micro-batch until its BACKWARD, the hidden states of its
    samples."""
    frame, hello = parcel.frame, session.hello
    if frame.kind != pb.FRAME_FORWARD:
        return
    if hello.lean:
        held.put(hello.session, frame.sequence, parcel, parcel.size + 1000)
    if hello.cache and frame.samples and pb.ROLE_HIDDEN in parcel.tensors:
        hidden = parcel.tensors[pb.ROLE_HIDDEN]
        masks = own_masks(parcel.tensors, frame, session)
        for place, sample in enumerate(frame.samples):
            mask = b"" if masks is None else masks[place].rstrip(b"\0")
            row = example(hidden, place, len(mask) or hidden.shape[1])
            held.put((*session.owner, hello.part), sample, Sample(row, mask), len(row.data) + len(mask) + 500)


# --- parts ---


def assembled(
    tensors: Mapping[int, Coded], frame: pb.Frame, session: Session, held: HeldSamples, limits: Limits
) -> torch.Tensor:
    """The body's input: hidden states sent or held, with the prompts put in. Raises Refused W603, W606, W607,
    Missing S713."""
    hello = session.hello
    if pb.ROLE_HIDDEN in tensors:
        hidden = finite(tensors[pb.ROLE_HIDDEN])
        if hidden.ndim != 3:
            raise unfit(f"hidden states of shape {tuple(hidden.shape)}", "(examples, tokens, width)")
        if len(frame.samples) not in (0, len(hidden)):
            raise unfit(
                f"{len(frame.samples)} sample ids for {len(hidden)} examples", "an id an example, or none"
            )
    else:
        hidden = recalled(tensors, frame, session, held, limits)
    if hidden.shape[2] != hello.width:
        raise unfit(f"hidden states of width {hidden.shape[2]}", f"{hello.width}")
    if (pb.ROLE_PROMPTS in tensors) != bool(hello.prompts):
        raise unfit(
            "prompts" if pb.ROLE_PROMPTS in tensors else "no prompts",
            f"{hello.prompts} at the cut, as HELLO said",
        )
    if hello.prompts:
        coded = tensors[pb.ROLE_PROMPTS]
        if coded.shape != (hello.prompts, hello.width) or frame.at > hidden.shape[1]:
            raise unfit(
                f"prompts of shape {coded.shape} before place {frame.at}",
                f"{(hello.prompts, hello.width)} before one of {hidden.shape[1]} places",
            )
        if len(hidden) * (hidden.shape[1] + hello.prompts) > limits.tokens:
            raise Refused(
                "W606",
                f"{len(hidden)} examples of {hidden.shape[1]} tokens and {hello.prompts} prompts",
                f"{limits.tokens} tokens",
                "send fewer examples",
            )
        prompts = finite(coded).expand(len(hidden), -1, -1)
        hidden = torch.cat([hidden[:, : frame.at], prompts, hidden[:, frame.at :]], 1)
    return hidden


def recalled(
    tensors: Mapping[int, Coded], frame: pb.Frame, session: Session, held: HeldSamples, limits: Limits
) -> torch.Tensor:
    """Hidden states of samples sent before, with zeros where they are padded now. Raises Missing with the ids
    that are not held so."""
    if not frame.samples:
        raise unfit("neither hidden states nor samples", "one of them")
    owner, masks = (*session.owner, session.hello.part), own_masks(tensors, frame, session)
    found: list[Sample | None] = (
        held.get(owner, frame.samples) if session.hello.cache else [None] * len(frame.samples)
    )
    asked = [None] * len(found) if masks is None else [mask.rstrip(b"\0") for mask in masks]
    there = [
        (sample, mask)
        for sample, mask in zip(found, asked, strict=True)
        if sample is not None and (mask is None or sample.mask == mask)
    ]
    longest = len(masks[0]) if masks else max((sample.row.shape[0] for sample, _ in there), default=0)
    # without a mask nothing may be padded: a shorter one would be another input
    fits = [masks is not None or sample.row.shape[0] == longest for sample, _ in there]
    if len(there) < len(found) or not all(fits):
        known = {id(sample) for (sample, _), fit in zip(there, fits, strict=True) if fit}
        missing = [
            number for number, sample in zip(frame.samples, found, strict=True) if id(sample) not in known
        ]
        raise Missing(f"no hidden states for {len(missing)} of {len(found)} samples", missing)
    if len(there) * longest > limits.tokens:
        raise Refused(
            "W606",
            f"{len(there)} samples of up to {longest} tokens",
            f"{limits.tokens} tokens",
            "send fewer examples",
        )
    return torch.cat([joined_row(finite(sample.row), longest) for sample, _ in there])


def joined_row(row: torch.Tensor, longest: int) -> torch.Tensor:
    """(tokens, width) -> (1, longest, width), zeros behind."""
    whole = row.new_zeros(1, longest, row.shape[1])
    whole[0, : len(row)] = row
    return whole


def own_masks(tensors: Mapping[int, Coded], frame: pb.Frame, session: Session) -> list[bytes] | None:
    """The mask of each example without the prompts' places, a byte a token; None without masks. Raises
    Refused W603."""
    if pb.ROLE_MASK not in tensors:
        return None
    coded, prompts = tensors[pb.ROLE_MASK], session.hello.prompts
    rows, tokens = coded.shape
    if rows != len(frame.samples) or tokens <= prompts or frame.at > tokens - prompts:
        raise unfit(
            f"a mask of shape {coded.shape} for {len(frame.samples)} samples",
            "a row a sample, prompts included",
        )
    data = bytes(coded.data)
    each = [data[row * tokens : (row + 1) * tokens] for row in range(rows)]
    return [mask[: frame.at] + mask[frame.at + prompts :] for mask in each]


def whole(
    tensors: Mapping[int, Coded], role: pb.Role, needed: bool, shape: tuple[int, int], below: int
) -> torch.Tensor | None:
    """A mask or positions, checked. Raises Refused W603, W607."""
    if role not in tensors:
        if needed:
            raise unfit(f"no tensor of role {role}", "one with every micro-batch, as HELLO said")
        return None
    value = decode(tensors[role])
    if value.shape != shape:
        raise unfit(f"a tensor of role {role} and shape {tuple(value.shape)}", f"{shape}, prompts included")
    if int(value.min()) < 0 or int(value.max()) >= below:
        raise Refused(
            "W607",
            f"a tensor of role {role} from {int(value.min())} to {int(value.max())}",
            f"0 to {below - 1}",
            "check the sender's batch",
        )
    return value if role == pb.ROLE_MASK else value.long()


def chosen(tensors: Mapping[int, Coded], row: int, examples: int, tokens: int) -> torch.Tensor | None:
    """Which rows come down, flattened and ascending. Raises Refused W603."""
    if row:
        if row > tokens or pb.ROLE_ROWS in tensors:
            raise unfit(f"row {row} of {tokens}", "a row of every example, or a list of rows")
        return torch.arange(examples) * tokens + (row - 1)
    if pb.ROLE_ROWS not in tensors:
        return None
    rows = decode(tensors[pb.ROLE_ROWS]).long()
    if int(rows[0]) < 0 or int(rows[-1]) >= examples * tokens or bool((rows[1:] <= rows[:-1]).any()):
        raise unfit(
            "rows that are not there, or not ascending", f"ascending numbers below {examples * tokens}"
        )
    return rows


def finite(coded: Coded) -> torch.Tensor:
    """Decoded. Raises Refused W607 where a number is not finite."""
    value = decode(coded)
    if not codec.finite(value):
        raise Refused(
            "W607",
            f"numbers of role {coded.header.role} that are not finite",
            "finite numbers",
            "check the sender's training",
        )
    return value


def unfit(found: str, expected: str) -> Refused:
    return Refused("W603", found, expected, "use the same recipe and version of fedtune on both sides")
