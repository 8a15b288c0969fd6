"""Numbers on the wire: what they cost, how long they are, when a coding gives way to a finer one; frames cut
and joined."""

from __future__ import annotations

import pytest
import torch

from fedtune.errors import FedtuneError, Refused
from fedtune.split.codec import Coded, Coding, decode, encode, encode_whole, example, size_of
from fedtune.split.frames import CHUNK, Joiner, Limits, measured, packed, parsed
from fedtune.wire.v1 import split_pb2 as pb


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(value: torch.Tensor, coded: Coded) -> float:
    return float((value - decode(coded)).norm() / value.norm())


@pytest.mark.parametrize(
    ("coding", "share", "most"),
    [
        (Coding("fp32"), 1.0, 0.0),
        (Coding("fp16"), 0.5, 3e-4),
        (Coding("bf16"), 0.5, 2e-3),
        (Coding("int8", 32), (1 + 2 / 32) / 4, 0.01),  # one scale of 2 bytes for 32 values
        (Coding("int8", 0), (1 + 2 / 256) / 4, 0.012),  # one for a token of 256
    ],
)
def test_length_and_error_of_a_coding(coding: Coding, share: float, most: float) -> None:
    value = noise(4, 64, 256)
    coded, used = encode(pb.ROLE_HIDDEN, value, coding)
    assert used == coding.name and len(coded.data) == size_of(coded.header) == share * value.numel() * 4
    assert error(value, coded) <= most
    assert torch.equal(decode(example(coded, 2, 64)), decode(coded)[2]) and torch.equal(
        decode(example(coded, 3, 5)), decode(coded)[3, :5]
    )


def test_int8_is_between_25_and_28_percent() -> None:
    for width, group in [(64, 32), (256, 32), (768, 32), (768, 0), (4096, 0)]:
        coded, _ = encode(pb.ROLE_HIDDEN, noise(1, 8, width), Coding("int8", group))
        assert 0.25 <= len(coded.data) / (8 * width * 4) <= 0.28


def test_int8_by_hand() -> None:
    """127 / 127 = 1, so levels are the numbers; 2 / 127 is rounded up to a bfloat16, so that no level passes
    127."""
    coded, _ = encode(pb.ROLE_HIDDEN, torch.tensor([[[127.0, -63, 1, 0], [0, 0, 0, 0]]]), Coding("int8", 4))
    assert list(memoryview(coded.data)[:8].cast("b")) == [127, -63, 1, 0, 0, 0, 0, 0]
    assert bytes(coded.data[8:]) == b"\x80\x3f\x00\x00"  # bfloat16 1 and 0, little-endian
    assert (
        error(
            torch.tensor([[[2.0, -2.0]]]),
            encode(pb.ROLE_HIDDEN, torch.tensor([[[2.0, -2.0]]]), Coding("int8", 2))[0],
        )
        < 0.008
    )


def test_an_outlier_channel_makes_int8_give_way() -> None:
    """One channel at +100: a token's scale is then 0.8, and the other channels drown, though most of the norm
    is right."""
    value = noise(4, 64, 256)
    value[..., 3] += 100
    assert [encode(pb.ROLE_HIDDEN, value, Coding("int8", group))[1] for group in (0, 32)] == ["fp16", "fp16"]


def test_float16_gives_way_to_what_it_cannot_hold() -> None:
    assert encode(pb.ROLE_GRADIENT, noise(2, 3, 8) * 1e6, Coding("fp16"))[1] == "bf16"  # above 65504
    assert (
        encode(pb.ROLE_GRADIENT, noise(2, 3, 8) * 1e-7, Coding("fp16"))[1] == "bf16"
    )  # below 6e-8 everything is 0
    coded, used = encode(
        pb.ROLE_GRADIENT, torch.full((1, 1, 2), 3.4e38), Coding("bf16")
    )  # rounds up to infinity
    assert used == "fp32" and decode(coded)[0, 0, 0] == torch.tensor(3.4e38)
    assert encode(pb.ROLE_GRADIENT, torch.zeros(1, 2, 4), Coding("int8"))[1] == "int8"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_sent(bad: float) -> None:
    with pytest.raises(FedtuneError, match="W607"):
        encode(pb.ROLE_HIDDEN, torch.tensor([[[1.0, bad]]]), Coding("fp32"))


def test_masks_and_rows_are_as_they_were() -> None:
    mask = torch.tensor([[1, 1, 0]], dtype=torch.uint8)
    assert torch.equal(decode(encode_whole(pb.ROLE_MASK, mask)), mask)
    assert decode(encode_whole(pb.ROLE_ROWS, torch.tensor([3, 70_000]))).tolist() == [3, 70_000]


def test_a_parcel_of_several_parts_is_the_same_at_the_other_end() -> None:
    """5 x 280 x 512 numbers of 4 bytes are 2.92 times 983,040 bytes: 3 parts; the mask travels in the
    last."""
    value, mask = noise(5, 280, 512), torch.ones(5, 280, dtype=torch.uint8)
    tensors = [encode(pb.ROLE_HIDDEN, value, Coding("fp32"))[0], encode_whole(pb.ROLE_MASK, mask)]
    messages, digest, forward = packed(pb.Frame(kind=pb.FRAME_FORWARD, sequence=7), tensors)
    assert len(messages) == 3 and max(map(len, messages)) < CHUNK + 100
    joiner = Joiner(Limits())
    parcels = [joiner.add(parsed(message)) for message in messages]
    assert parcels[:2] == [None, None] and parcels[2] is not None
    assert parcels[2].digest == digest == forward == parcels[2].forward
    assert torch.equal(decode(parcels[2].tensors[pb.ROLE_HIDDEN]), value) and torch.equal(
        decode(parcels[2].tensors[pb.ROLE_MASK]), mask
    )


def test_a_backward_that_says_its_forward_again_has_its_digest() -> None:
    tensors = [
        encode(pb.ROLE_HIDDEN, noise(1, 2, 4), Coding("fp32"))[0],
        encode(pb.ROLE_GRADIENT, noise(1, 2, 4, seed=1), Coding("fp32"))[0],
    ]
    _, first, _ = packed(pb.Frame(kind=pb.FRAME_FORWARD), tensors[:1])
    _, whole, forward = packed(pb.Frame(kind=pb.FRAME_BACKWARD), tensors)
    assert first == forward != whole


@pytest.mark.parametrize(
    ("code", "header"),
    [
        (
            "W606",
            {"role": pb.ROLE_HIDDEN, "number": pb.NUMBER_FLOAT32, "shape": [1, 16384, 16384]},
        ),  # a gigabyte
        ("W606", {"role": pb.ROLE_HIDDEN, "number": pb.NUMBER_FLOAT32, "shape": [2**31, 2**31, 2**31]}),
        (
            "W606",
            {"role": pb.ROLE_HIDDEN, "number": pb.NUMBER_FLOAT32, "shape": [200, 200, 4]},
        ),  # 40,000 tokens
        ("W606", {"role": pb.ROLE_HIDDEN, "number": pb.NUMBER_FLOAT32, "shape": [1, 0, 4]}),
        ("W603", {"role": pb.ROLE_HIDDEN, "number": pb.NUMBER_FLOAT32, "shape": [4, 4, 4, 4]}),
        ("W603", {"role": pb.ROLE_HIDDEN, "number": 99, "shape": [1, 4, 4]}),
        ("W603", {"role": pb.ROLE_MASK, "number": pb.NUMBER_FLOAT32, "shape": [4, 4]}),
        ("W603", {"role": 77, "number": pb.NUMBER_FLOAT32, "shape": [4, 4]}),
        ("W603", {"role": pb.ROLE_HIDDEN, "number": pb.NUMBER_INT8, "shape": [1, 4, 6], "group": 4}),
        ("W603", {"role": pb.ROLE_HIDDEN, "number": pb.NUMBER_INT8, "shape": [1, 4, 6]}),
        ("W603", {"role": pb.ROLE_HIDDEN, "number": pb.NUMBER_FLOAT16, "shape": [1, 4, 6], "group": 2}),
    ],
)
def test_a_header_is_refused_before_its_numbers_come(code: str, header: dict[str, object]) -> None:
    with pytest.raises(Refused, match=code):
        measured([pb.Tensor(**header)], Limits())


def test_parts_out_of_order_are_refused_and_dropped() -> None:
    messages, _, _ = packed(
        pb.Frame(kind=pb.FRAME_FORWARD, sequence=1),
        [encode(pb.ROLE_HIDDEN, noise(5, 300, 512), Coding("fp32"))[0]],
    )
    joiner = Joiner(Limits())
    assert joiner.add(parsed(messages[0])) is None
    with pytest.raises(Refused, match=r"W601: found part 2 .* out of order"):
        joiner.add(parsed(messages[2]))
    assert not joiner.held
    with pytest.raises(Refused, match="W601"):
        joiner.add(parsed(messages[1]))
