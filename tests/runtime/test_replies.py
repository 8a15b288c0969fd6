"""Replies of a transport: what waiting for each took, and bytes of one question for each client."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from fedtune.runtime import replies
from fedtune.runtime.protocol import Reply, given_to
from fedtune.runtime.replies import timed


def test_only_the_waiting_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what the reader does between two replies."""
    now = [100.0]
    monkeypatch.setattr(replies, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def arriving() -> Iterator[Reply]:
        for client, seconds in ((3, 2.0), (1, 5.0)):
            now[0] += seconds
            yield Reply(client)
        now[0] += 0.5

    waited: list[float] = []
    for reply in timed(arriving(), waited.append):
        assert reply.client in (1, 3)
        now[0] += 1000.0
    assert waited == [2.0, 5.0, 0.5]


def test_what_is_given_may_differ_by_client() -> None:
    assert given_to(3, {"a": 1}) == {"a": 1}  # type: ignore[dict-item]
    assert given_to(3, lambda client: {"a": client}) == {"a": 3}  # type: ignore[dict-item,return-value]
