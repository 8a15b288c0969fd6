"""Who somebody is: a role and a name in one federation, as the SPIFFE URI of their certificate."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fedtune.errors import FedtuneError
from fedtune.forms import MemberName

PATTERN = MemberName.form
FORM = "1 to 63 of a-z, 0-9, '.', '_' and '-', beginning and ending with a letter or digit"
COORDINATOR = "coordinator"  # the one name that no client can have


@dataclass(frozen=True)
class Name:
    """One member of a federation: the coordinator, or a client."""

    federation: str
    name: str

    @property
    def uri(self) -> str:
        """SPIFFE ID (SPIFFE-ID, section 2): trust domain `fedtune`, path federation and member."""
        return f"spiffe://fedtune/{self.federation}/" + (
            COORDINATOR if self.name == COORDINATOR else f"client/{self.name}"
        )

    @classmethod
    def from_uri(cls, uri: str) -> Name | None:
        """None where a URI is not exactly one that `uri` makes."""
        found = re.fullmatch(r"spiffe://fedtune/([^/]+)/(?:client/)?([^/]+)", uri)
        if not found or not (PATTERN.fullmatch(found[1]) and PATTERN.fullmatch(found[2])):
            return None
        name = cls(found[1], found[2])
        return name if name.uri == uri else None


def checked(word: str, what: str) -> str:
    """The word, if it can stand in a URI and in a file's name. Raises T708."""
    if not PATTERN.fullmatch(word):
        raise FedtuneError("T708", f"{what} {word[:80]!r}", FORM, "choose another name")
    return word
