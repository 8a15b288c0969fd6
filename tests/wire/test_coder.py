"""The lossless coder: what went in comes out, at the rate that entropy allows, and nothing else is
accepted."""

from __future__ import annotations

import math
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedtune.errors import Refused
from fedtune.wire import coder, planes

LEVELS = hnp.arrays(
    np.int8,
    st.integers(0, 700),
    elements=st.one_of(st.just(0), st.sampled_from([-1, 1]), st.integers(-127, 127)),
)


def ternary(share: float, count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return ((rng.random(count) < share) * rng.choice([-1, 1], count)).astype(np.int8)


def bound(levels: np.ndarray) -> float:
    """H2(p) + p bits a level, for the share that is there."""
    p = np.count_nonzero(levels) / levels.size
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p) + p


@given(LEVELS)
@settings(max_examples=200)
def test_levels_come_back(levels: np.ndarray) -> None:
    assert np.array_equal(coder.unpack(coder.pack(levels), levels.size), levels)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.2, 0.45, 0.6, 0.9, 1.0])
def test_every_density_comes_back(share: float) -> None:
    levels = ternary(share, 20_000)
    assert np.array_equal(coder.unpack(coder.pack(levels), levels.size), levels)


def test_gaps_by_hand() -> None:
    places = np.array([0, 3, 300])  # 0 skipped, 2 skipped, 296 = 255 + 41 skipped
    assert list(planes.gap_bytes(places)) == [0, 2, 255, 41]
    assert planes.places_of(bytes([0, 2, 255, 41]), 3, 301).tolist() == [0, 3, 300]


def test_signs_alone_cost_one_bit() -> None:
    levels = np.where(np.arange(8000) % 3, 1, -1).astype(np.int8)
    assert len(coder.pack(levels)) == coder.HEAD.size + 1000


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_rate_is_within_one_percent_of_the_bound(share: float) -> None:
    levels = ternary(share, 1_000_000)
    assert 8 * len(coder.pack(levels)) / levels.size < 1.01 * bound(levels)


def test_many_levels_are_near_their_entropy() -> None:
    levels = np.clip(np.rint(np.random.default_rng(0).normal(0, 2.0, 200_000)), -7, 7).astype(np.int8)
    assert 8 * len(coder.pack(levels)) / levels.size < 1.03 * entropy(levels)


def shaken(step: float, count: int = 200_000) -> np.ndarray:
    """Levels of `dither`: normal numbers and uniform noise, rounded."""
    rng = np.random.default_rng(0)
    return np.rint(rng.normal(size=count) / step + rng.random(count) - 0.5).astype(np.int8)


def entropy(levels: np.ndarray) -> float:
    _, counts = np.unique(levels, return_counts=True)
    shares = counts / levels.size
    return float(-(shares * np.log2(shares)).sum())


@pytest.mark.parametrize("step", [2.0, 2.7, 3.5])
def test_few_levels_above_1_cost_what_they_say(step: float) -> None:
    """A Huffman code of whole levels needs a bit for each of them at least: a fifth more at 2.7."""
    levels = shaken(step)
    packed = coder.pack(levels)
    assert packed[0] == coder.PLANES and 8 * len(packed) / levels.size < 1.02 * entropy(levels)


@pytest.mark.parametrize("step", [0.05, 0.2, 0.5, 0.8, 1.0, 1.2, 1.6, 2.7, 6.0])
def test_the_shorter_form_is_taken(step: float) -> None:
    levels = shaken(step)
    forms = {"dense": coder.pack_dense(levels), "planes": planes_of(levels)}
    assert len(coder.pack(levels)) <= 1.01 * min(len(data) for data in forms.values())
    for data in forms.values():
        assert np.array_equal(coder.unpack(data, levels.size), levels)


def planes_of(levels: np.ndarray) -> bytes:
    """The form by its definition."""
    values = levels[levels != 0]
    rest = (np.abs(values[np.abs(values) > 1]) - 2).astype(np.uint8)
    sizes = planes.deflate(rest.tobytes()) if rest.any() else b""
    parts = planes.pack_plane(levels != 0), planes.pack_plane(np.abs(values) > 1)
    signs = np.packbits(values < 0).tobytes()
    return b"".join((bytes([coder.PLANES]), *parts, coder.SIZE.pack(len(sizes)), sizes, signs))


@given(
    hnp.arrays(np.bool_, st.integers(0, 700), elements=st.integers(0, 9).map(lambda n: n > 6)), st.booleans()
)
@settings(max_examples=60)
def test_planes_come_back(marked: np.ndarray, turned: bool) -> None:
    marked = marked ^ turned
    places, rest = planes.unpack_plane(memoryview(planes.pack_plane(marked) + b"rest"), marked.size)
    assert np.array_equal(places, np.flatnonzero(marked)) and bytes(rest) == b"rest"


def test_magnitudes_of_version_1_can_be_read() -> None:
    """Gaps with a magnitude for each level: no longer written."""
    data = packed(0, 3, bytes([0, 2, 1]), bytes([0, 4, 0]), bytes([0b01000000]))
    assert coder.unpack(data, 8).tolist() == [1, 0, 0, -5, 0, 1, 0, 0]


def test_a_prefix_code_by_hand() -> None:
    assert coder.huffman_bits([1, 1, 2, 4]) == 4 * 1 + 2 * 2 + 3 + 3
    assert (coder.huffman_bits([0, 7]), coder.huffman_bits([])) == (7, 0)


def test_minus_128_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="-128"):
        coder.pack(np.int8([-128]))


def packed(road: int, marks: int, gaps: bytes, sizes: bytes = b"", signs: bytes = b"") -> bytes:
    first, second = planes.deflate(gaps), planes.deflate(sizes)
    return coder.HEAD.pack(road, marks, len(first), len(second)) + first + second + signs


def plane(form: int, marks: int, data: bytes = b"") -> bytes:
    body = planes.deflate(data)
    return planes.PLANE.pack(form, marks, len(body)) + body


def layered(held: bytes, above: bytes, sizes: bytes, signs: bytes) -> bytes:
    body = planes.deflate(sizes)
    return bytes([coder.PLANES]) + held + above + coder.SIZE.pack(len(body)) + body + signs


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 12,
        packed(3, 0, b""),
        packed(0, 9, bytes(9), signs=b"\0\0"),  # more marks than levels
        packed(0, 2, bytes([7, 0]), signs=b"\0"),  # the second mark is at 8 of 8
        packed(0, 2, bytes([0]), signs=b"\0"),  # one gap for two marks
        packed(0, 1, bytes([0, 255]), signs=b"\0"),  # ends in the middle of a gap
        packed(0, 1, bytes([0]), signs=b""),
        packed(0, 1, bytes([0]), signs=b"\0\0"),
        packed(0, 1, bytes([0]), signs=b"\x01"),  # padding that is not 0: two messages would mean the same
        packed(0, 1, bytes([0]), bytes([127]), b"\0"),  # a magnitude of 128
        packed(0, 1, bytes([0]), bytes([1, 1]), b"\0"),
        packed(2, 0, bytes(7)),
        packed(2, 0, bytes(9)),
        packed(2, 0, bytes([128] + [0] * 7)),  # -128
        packed(2, 0, bytes(8)) + b"\0",
        packed(0, 1, bytes([0]), signs=b"\0")[:-2] + b"\xff\0",
        b"\3",
        layered(plane(3, 0, bytes(1)), plane(0, 0), b"", b""),  # no such form
        layered(plane(0, 9, bytes(9)), plane(0, 0), b"", b"\0\0"),  # more marks than places
        layered(plane(0, 2, bytes([7, 0])), plane(0, 0), b"", b"\0"),
        layered(plane(2, 0, bytes(2)), plane(0, 0), b"", b""),  # bits for sixteen
        layered(plane(2, 1, bytes(1)), plane(0, 0), b"", b""),  # bits that are counted
        layered(plane(0, 1, bytes(1)), plane(0, 2, bytes(2)), b"\0\0", b"\0"),  # more above 1 than above 0
        layered(plane(0, 1, bytes(1)), plane(2, 0, b"\xc0"), b"\0", b"\0"),  # padding that is not 0
        layered(plane(0, 1, bytes(1)), plane(0, 1, bytes(1)), b"\0", b"\0"),  # magnitudes of 2, said twice
        layered(plane(0, 1, bytes(1)), plane(0, 1, bytes(1)), b"\1\1", b"\0"),
        layered(plane(0, 1, bytes(1)), plane(0, 1, bytes(1)), bytes([126]), b"\0"),  # a magnitude of 128
        layered(plane(0, 1, bytes(1)), plane(0, 1, bytes(1)), b"\1", b""),
        layered(plane(0, 1, bytes(1)), plane(0, 1, bytes(1)), b"\1", b"\0\0"),
        layered(plane(0, 1, bytes(1)), plane(0, 1, bytes(1)), b"\1", b"\1"),
        layered(plane(0, 1, bytes(1)), plane(0, 1, bytes(1)), b"\1", b"\0")[:-4],
        layered(plane(0, 1, bytes(1))[:-1], b"", b"", b""),
    ],
)
def test_broken_levels_are_refused(data: bytes) -> None:
    with pytest.raises(Refused, match="W601"):
        coder.unpack(data, 8)


@pytest.mark.parametrize("road", [coder.DENSE, coder.PLANES])
def test_a_bomb_is_not_unpacked(road: int) -> None:
    bomb = zlib.compressobj(9, zlib.DEFLATED, -15)
    data = bomb.compress(bytes(50_000_000)) + bomb.flush()  # 50 MB in 49 kB
    message = coder.HEAD.pack(coder.DENSE, 0, len(data), 0) + data
    if road == coder.PLANES:
        message = bytes([road]) + planes.PLANE.pack(planes.BITS, 0, len(data)) + data
    tracemalloc.start()
    with pytest.raises(Refused, match="W601"):
        coder.unpack(message, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
