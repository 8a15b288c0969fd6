"""What passes through the cut of SFPrompt: bytes by the formula, over a socket, to a body that forgot, refused where it may not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import Recipe
from fedtune.errors import ClientFailed
from fedtune.events import ClientLeftOut
from fedtune.methods.sfprompt_net import SplitNet
from fedtune.runtime.check import check, rows
from fedtune.runtime.local import local_transport
from fedtune.runtime.protocol import Link, Transport
from fedtune.runtime.workspace import Workspace
from fedtune.split.body import Frozen
from fedtune.split.body_address import BodyAddress
from fedtune.split.channel import Socket
from fedtune.split.grpc_server import serve
from fedtune.split.service import Service
from fedtune.split.session import Tokens
from tests import small
from tests.methods.sfprompt_data import write_images, write_sentences
from tests.methods.test_sfprompt import IMAGES, TRAIN, methods_round, recipe_of, through_cut


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sentences(tmp_path_factory.mktemp("rows"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def elsewhere(tiny_vit: Path, images: Path) -> Iterator[tuple[Recipe, str, Service, Tokens]]:
    """A body service with its own copy of the model, on a socket."""
    recipe = recipe_of(tiny_vit, images, {"head": 1})
    workspace, _ = small.workspace_of(recipe)
    tokens = Tokens()
    service = Service(
        Frozen(workspace.tunable.net.part), workspace.tunable.net.own_body.offer, tokens.admit
    ).start()
    server, port = serve(service, "127.0.0.1:0")
    yield recipe, f"127.0.0.1:{port}", service, tokens
    server.stop(0)
    service.stop()


def by_socket(address: str, token: Any) -> Any:
    def carry(link: Link, workspace: Workspace) -> Transport:
        workspace.body = BodyAddress(
            lambda: Socket(address), workspace.tunable.net.own_body.offer, "run", token
        )
        return local_transport(link, workspace.client, workspace.done)

    return carry


def test_a_body_behind_a_socket_gives_the_same_state(elsewhere: Any, tmp_path: Path) -> None:
    recipe, address, service, tokens = elsewhere
    here = small.play(recipe, tmp_path / "here")[1]
    there = small.play(
        recipe,
        tmp_path / "there",
        carry=by_socket(address, lambda number, client: tokens.issue("run", number, client)),
    )[1]
    assert here["state_sha256"] == there["state_sha256"]
    assert (
        service.merger.counts.jobs == 2 * 4 * 3 * 4 and service.held.size == 0
    )  # forward and backward x clients x rounds x micro-batches


def test_a_client_without_a_token_is_left_out_and_named(elsewhere: Any, tmp_path: Path) -> None:
    recipe, address, _, tokens = elsewhere
    events: list[Any] = []
    carry = by_socket(
        address, lambda number, client: tokens.issue("run", number, client) if client else "guess"
    )
    small.play(recipe, tmp_path, tell=events.append, carry=carry)
    assert [(e.client, e.code) for e in events if isinstance(e, ClientLeftOut)] == [(0, "S712")] * 3


def test_another_body_is_refused_before_training(elsewhere: Any, tmp_path: Path) -> None:
    recipe, address, _, tokens = elsewhere
    workspace, link = small.workspace_of(recipe)
    net: SplitNet = workspace.tunable.net
    body = BodyAddress(
        lambda: Socket(address),
        replace(net.own_body.offer, part="0" * 64),
        "run",
        lambda number, client: tokens.issue("run", number, client),
    )
    now = methods_round(recipe)
    with pytest.raises(ClientFailed, match="S702"):
        link.method.verbs["train"].work(
            replace(workspace.client_with(0, {}), body=body), link.method.start(workspace.tunable).shared, now
        )


def test_bytes_at_the_cut_are_those_of_the_formula(tiny_vit: Path, images: Path, tmp_path: Path) -> None:
    """4 images of 5 tokens and 3 prompts of width 32 in float16, 4 micro-batches: up 4 x 5 x 32 + (3 + 4) x
    32 numbers, down (3 + 4) x 32."""
    recipe = recipe_of(tiny_vit, images, {"head": 1, "codec": "fp16"})
    up, down = 4 * 2 * (4 * 5 * 32 + 7 * 32), 4 * 2 * 7 * 32
    for _, sent, received in through_cut(recipe, tmp_path):
        assert 0 < sent - up < 1000 and 0 < received - down < 1000  # HELLO and headers
    line = next(line for line in rows(check(recipe)) if "slim: a micro-batch" in line)
    assert "4 x 5 tokens up 1,728, down 448 bytes" in line and up + down == 4 * (1728 + 448)


@pytest.mark.thorough
@pytest.mark.parametrize("changes", [{"position": "input"}, {"lora_rank": 2}, {"slim": "off"}], ids=str)
def test_bytes_are_those_of_the_formula_where_gradients_reach_the_head(
    changes: dict[str, Any], tiny_vit: Path, images: Path, tmp_path: Path
) -> None:
    """4 x (5 + 3) tokens and their gradient, and 4 rows of a class token (slim off: all rows) and theirs."""
    recipe = recipe_of(tiny_vit, images, {"head": 1, "codec": "fp16", **changes})
    each = 2 * 32 * (4 * 8 + (4 * 8 if "slim" in changes else 4))
    line = next(line for line in rows(check(recipe)) if "a micro-batch of" in line)
    assert f"up {each:,}, down {each:,} bytes" in line
    for _, sent, received in through_cut(recipe, tmp_path):
        assert 0 < sent - 4 * each < 1000 and 0 < received - 4 * each < 1000


def test_without_prompts_nothing_goes_back(tiny_vit: Path, images: Path, tmp_path: Path) -> None:
    """The tail learns alone: up what the head says, down a row an image, no gradients."""
    recipe = small.recipe(
        tiny_vit, images, method={"type": "sfprompt", "prompts": 0, "train": TRAIN}, **IMAGES
    )
    line = next(line for line in rows(check(recipe)) if "slim: a micro-batch" in line)
    assert "up 1,280, down 256 bytes" in line
    for _, sent, received in through_cut(recipe, tmp_path):
        assert 0 < sent - 4 * 1280 < 1000 and 0 < received - 4 * 256 < 1000


@pytest.mark.thorough
def test_what_the_head_says_of_an_image_goes_up_once(tiny_vit: Path, images: Path, tmp_path: Path) -> None:
    changes = {"head": 1, "cache_smashed": True, "train": {"lr": 0.01, "steps": 0, "epochs": 2, "batch": 4}}
    kept = recipe_of(tiny_vit, images, changes)
    (_, first, _), (_, second, _), (_, third, _) = through_cut(kept, tmp_path / "kept")
    examples = 8 * 5 * 32 * 4  # of client 0
    assert 0.9 * examples < first - second < 1.1 * examples and second == third
    plain = recipe_of(tiny_vit, images, {**changes, "cache_smashed": False})
    assert (
        small.play(kept, tmp_path / "a")[1]["state_sha256"]
        == small.play(plain, tmp_path / "b")[1]["state_sha256"]
    )


@pytest.mark.thorough
def test_a_service_that_forgot_is_told_again(tiny_bert: Path, data: Path, tmp_path: Path) -> None:
    """Texts of different lengths; after round 1 the service starts anew, as after a crash."""
    recipe = recipe_of(tiny_bert, data, {"cache_smashed": True})

    def forgetful(link: Link, workspace: Workspace) -> Transport:
        carry = local_transport(link, workspace.client, workspace.done)

        def each(asks: Any) -> Any:
            vars(workspace.tunable.net).pop("own_body", None)
            return carry(asks)

        return each

    assert (
        small.play(recipe, tmp_path / "a", carry=forgetful)[1]["state_sha256"]
        == small.play(recipe, tmp_path / "b")[1]["state_sha256"]
    )
