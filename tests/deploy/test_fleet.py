"""Objects of Flower's messages as the exchange's door takes them."""

from __future__ import annotations

import hashlib

import pytest

from fedtune.deploy.fleet import CHILDREN, check_object
from fedtune.errors import Refused


def of(children: int) -> dict[str, list[bytes | str]]:
    content = b"RecordDict " + b",".join([b"0" * 64] * children) + b" 4\0body"
    return {"object_content": [content], "object_id": [hashlib.sha256(content).hexdigest()]}


def test_an_object_has_as_many_others_as_a_message_of_ours_and_no_more() -> None:
    for children in (0, 1, CHILDREN):
        check_object(of(children))
    with pytest.raises(Refused, match=f"W606.*{CHILDREN + 1} others"):
        check_object(of(CHILDREN + 1))


def test_an_object_is_what_its_name_says() -> None:
    says = of(1)
    says["object_content"] = [bytes(says["object_content"][0])[:-1] + b"z"]  # type: ignore[arg-type]
    with pytest.raises(Refused, match="W601"):
        check_object(says)
