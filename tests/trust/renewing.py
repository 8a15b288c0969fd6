"""A federation, and a site whose keys have five of thirty days left."""

from __future__ import annotations

import stat
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from fedtune.trust import Identity, load, renewal, requests
from fedtune.trust.authority import Authority, create
from fedtune.trust.certificates import utc_now
from fedtune.trust.renewal import Desk
from fedtune.trust.signed import seal

DAYS = timedelta(days=1)


@dataclass
class Scene:
    """`home` is the site's, `desk` the coordinator's."""

    root: Path
    authority: Authority
    keys: Path
    site: Identity
    home: Path
    desk: Desk
    now: datetime

    @property
    def coordinator(self) -> Identity:
        return load(self.authority.place("coordinator"))

    def handed_in(self, content: bytes) -> bytes:
        return self.desk.hand_in(self.site.peer, content, self.coordinator)

    def signs(self, days: int = 42) -> list[str]:
        return list(renewal.answered(self.authority, self.desk.folder, days))

    def request(self, name: str, by: Identity | None = None, federation: str = "hospitals") -> bytes:
        """Other new keys of any name, made somewhere, that a member vouches for: this site, if no other is given."""
        place = self.root / f"made-{len(list(self.root.iterdir()))}" / name
        path, _ = requests.make(place, federation, name)
        return seal(path.read_bytes(), by or self.site).to_json()

    def renewed(self) -> Identity:
        """The site's new keys, by way of the desk and the authority."""
        wanted = renewal.asked(self.site, self.home)
        self.handed_in(wanted)
        self.signs()
        return renewal.accept(self.handed_in(wanted), self.site, self.home)


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    authority, now = create(tmp_path / "keys", "hospitals", ["localhost"], 30), utc_now()
    keys, home = authority.issue("site-d", 30, now=now - 25 * DAYS), tmp_path / "home-d"
    home.mkdir()
    return Scene(tmp_path, authority, keys, load(keys), home, Desk(tmp_path / "renewals"), now)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
