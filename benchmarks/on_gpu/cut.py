"""Hidden states on their way to a body service: as bytes in at most a millisecond, the same ones as from a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from claims import at_most, claim

from fedtune.split.codec import Coding, encode
from fedtune.wire.v1 import split_pb2 as pb
from on_gpu.models import seconds

MILLISECOND = 1e-3


def cut(device: torch.device, tiny: bool) -> Iterator[dict[str, object]]:
    shape = (2, 8, 64) if tiny else (8, 512, 4096)
    hidden = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    there = hidden.to(device)
    for coding in (Coding("fp16"), Coding("int8")):
        here, coded = (encode(pb.ROLE_HIDDEN, value, coding)[0].data for value in (hidden, there))
        differ = sum(a != b for a, b in zip(here, coded, strict=True))
        what = f"{' x '.join(map(str, shape))} as {coding.name}"
        yield claim(f"bytes of {what} that differ from the CPU's", differ, 1, differ, "0", not differ)
        found = seconds(lambda: encode(pb.ROLE_HIDDEN, there, coding), device)  # noqa: B023
        print(f"{what}: {1e3 * found:.2f} ms")
        yield at_most(f"seconds of encoding {what}; other: a millisecond", found, MILLISECOND, 1.0)
