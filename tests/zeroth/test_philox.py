"""The generator against Random123's known answers, and directions against formulas in plain Python."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from fedtune.zeroth import Pool, device, kernels, philox_torch
from fedtune.zeroth.philox import bits, philox, words
from tests.zeroth import oracle

# philox4x32 with 10 rounds, from Random123's kat_vectors: counter, key (low word first), words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((oracle.LOW,) * 4, (oracle.LOW,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    c0, c1, stream, family = counter
    whole, block = key[0] | key[1] << 32, c0 | c1 << 32
    assert tuple(philox(counter, whole).reshape(-1).tolist()) == expected
    assert tuple(oracle.philox(counter, whole)) == expected
    out = np.zeros(4, np.uint32)
    kernels.fill(out, block, stream, family, whole)
    assert tuple(out.tolist()) == expected
    if block < 2**61:  # torch numbers words by int64: all blocks that a model can have
        assert (
            tuple(philox_torch.words(whole, family, stream, 4 * block, 4, torch.device("cpu")).tolist())
            == expected
        )


@pytest.mark.parametrize(
    "first", [0, 3, 2**34 - 5]
)  # the last crosses from one half of the block number to the other
def test_any_slice_of_a_stream_is_the_stream(first: int) -> None:
    assert words(9, 2, 1, first, 6).tolist() == [oracle.word(9, 2, 1, first + n) for n in range(6)]
    assert (
        philox_torch.words(9, 2, 1, first, 6, torch.device("cpu")).tolist()
        == words(9, 2, 1, first, 6).tolist()
    )
    assert np.array_equal(bits(9, 2, 1, 32 * first + 5, 40), bits(9, 2, 1, 32 * first, 64)[5:45])


@pytest.mark.parametrize("pool", oracle.POOLS)
@pytest.mark.parametrize("offset", [0, 31, 2**40 + 8190])
def test_a_direction_is_its_formula(pool: Pool, offset: int) -> None:
    k = pool.size - 1
    expected = [oracle.value(pool, k, i) for i in range(offset, offset + 70)]
    assert pool.direction(k, offset, 70).tolist() == expected
    if pool.kind == "hadamard":
        said = torch.zeros(70)
        device.along(pool, [(k, 1.0)])(said, None, offset)
    else:
        said = device.direction(pool, k, offset, 70, torch.device("cpu"))
    assert said.tolist() == expected


# Recorded once: a change here is a change of every federation's directions.
GOLDEN = [
    (Pool(1, 32), 5, 0, "2b237e227e54ebe3b643c9237b4ee68ec52cb6daa2f69cf6924a62561bb4c501"),
    (
        Pool(2**64 - 1, 4096),
        4095,
        2**33 + 7,
        "7a473b86939e68daa3493c3ebc3e49a4a573a30bd224cdbcbb5b27e9715c7cc4",
    ),
    (
        Pool(12345, 1024, "independent"),
        1000,
        100,
        "b6cef3de3baa5b3347d03cfdea5f5ad15803ea332ca134f022282dab62d6b95c",
    ),
    (
        Pool(7, 64, "independent", "gaussian"),
        3,
        2**34 + 1,
        "070a7d7261aad0a51d8c1f0413ac1c076694aa5c39461ffec7227c203bb34ba5",
    ),
]


@pytest.mark.parametrize(("pool", "k", "offset", "expected"), GOLDEN)
def test_golden_bytes(pool: Pool, k: int, offset: int, expected: str) -> None:
    assert hashlib.sha256(pool.direction(k, offset, 4096).astype("<i2").tobytes()).hexdigest() == expected
