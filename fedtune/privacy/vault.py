"""Where a site keeps the secrets of the masked sums that it takes part in: apart from what it remembers,
and no longer than a round."""

from __future__ import annotations

from typing import Protocol


class Vault(Protocol):
    """Secrets by name. A name is letters, digits, dots and dashes."""

    def read(self, name: str) -> bytes | None: ...

    def write(self, name: str, secret: bytes) -> None:
        """On return, the secret outlives whatever this vault outlives."""

    def names(self) -> list[str]: ...

    def remove(self, name: str) -> None: ...


class MemoryVault:
    """Secrets that live as long as this process."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def read(self, name: str) -> bytes | None:
        return self.held.get(name)

    def write(self, name: str, secret: bytes) -> None:
        self.held[name] = secret

    def names(self) -> list[str]:
        return sorted(self.held)

    def remove(self, name: str) -> None:
        self.held.pop(name, None)
