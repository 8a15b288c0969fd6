"""A gateway for the files that stand at its fleet door."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hostile.gateway import Gateway


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    made = Gateway(tmp_path_factory.mktemp("gateway"))
    yield made
    made.close()
