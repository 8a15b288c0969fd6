from pathlib import Path

import pytest

from fedtune.trust.authority import Authority, create
from tests.trust.renewing import scene  # noqa: F401


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return create(tmp_path / "keys", "hospitals", ["localhost"], days=30)
