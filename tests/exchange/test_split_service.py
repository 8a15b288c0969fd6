"""The body service behind the exchange's door, with the federation's own keys."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fedtune import transforms
from fedtune.config import Recipe, parse
from fedtune.errors import FedtuneError
from fedtune.exchange import Server
from fedtune.exchange.split_service import alongside, body_address, body_service, dial, over
from fedtune.runtime.client_half import respond
from fedtune.runtime.protocol import Ask, Link
from fedtune.runtime.workspace import Workspace, workspace_of
from fedtune.schema import Schema
from fedtune.split.body_address import BodyAddress
from fedtune.split.codec import Coding
from fedtune.split.cut import Side
from fedtune.split.facts import SplitFacts
from fedtune.split.micro import Micro, Wishes
from fedtune.split.service import Service
from fedtune.split.session import Tokens
from fedtune.split.stream import Stream
from fedtune.trust import private
from fedtune.trust.authority import revoke
from fedtune.types import Client, Round
from fedtune.wire import EVERYONE, encode_state
from tests import small, tiny
from tests.exchange.federation import Federation
from tests.split.plain import OFFER, run, served, turn
from tests.waiting import wait_for

RUN = "run-1"
NAMES = {0: "site-a", 1: "site-b"}
BLOCKS = 8


def test_a_member_trains_and_no_other_takes_its_place(federation: Federation) -> None:
    """Site-a is client 0. Site-b has a certificate of the federation and even site-a's token, and is told
    that it is not admitted."""
    torch.set_num_threads(1)
    service, mine = served(), turn(peer="site-a")
    server = federation.start(**alongside(service.start()))
    try:
        stream = Stream(
            dial(federation.sites["site-a"], server.address), OFFER, mine, Wishes(Coding("fp32"), 4)
        )
        (losses, values), (wanted, parameters) = run(stream), run(None)
        assert losses == wanted and all(torch.equal(a, b) for a, b in zip(values, parameters, strict=True))
        stream.close()
        for thief in ("site-b", "coordinator"):
            identity = federation.sites.get(thief, federation.coordinator)
            with pytest.raises(FedtuneError, match="S712"):
                Stream(dial(identity, server.address), OFFER, mine, Wishes(Coding("fp32"), 4))
        revoke(federation.authority.place("coordinator"), "site-a")
        with pytest.raises(FedtuneError, match=r"S711.*T706"):
            Stream(
                dial(federation.sites["site-a"], server.address),
                OFFER,
                mine,
                Wishes(Coding("fp32"), 4, patience=0.0),
            )
    finally:
        service.stop()
        server.stop(0)


# --- a site that holds its part alone, in a process of its own ---


@dataclass
class Deployed:
    """An encoder of 8 blocks of 7 MB at a coordinator: a body service that loaded seven of them, and a run
    that holds all."""

    federation: Federation
    recipe: Recipe
    tree: dict[str, Any]
    workspace: Workspace
    service: Service
    server: Server
    tokens: Tokens

    @property
    def method(self) -> Any:
        return self.recipe.method.build(self.recipe.rounds, self.recipe.aggregate)

    @property
    def link(self) -> Link:
        return Link(RUN, self.workspace.base.fingerprint, self.method, transforms.build(self.recipe.chain))

    def details(self, client: int = 0, round: int = 1) -> SplitFacts:
        """What the coordinator's ticket says to this client."""
        return replace(
            self.method.capabilities.split.describe(self.workspace.tunable),
            token=self.tokens.issue(RUN, round, client, NAMES[client]),
        )

    def ask(self, client: int = 0) -> Ask:
        given = self.method.start(self.workspace.tunable).shared
        return Ask(
            client,
            "train",
            self.now,
            encode_state(given, self.link.header("train", EVERYONE, self.now, Schema.of(given))),
        )

    @property
    def now(self) -> Round:
        return Round(1, self.recipe.seed, (0, 1))

    def body(self, client: int = 0, round: int = 1, site: str = "") -> BodyAddress:
        details = self.details(client, round)
        return body_address(self.federation.sites[site or NAMES[client]], self.server.address, RUN, details)


@pytest.fixture
def deployed(federation: Federation, tmp_path: Path) -> Iterator[Deployed]:
    torch.set_num_threads(1)
    config = transformers.BertConfig.from_pretrained(tiny.bert(tmp_path / "model"))
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = BLOCKS, 384, 1536
    tiny.save(transformers.BertModel, config, tmp_path / "model")
    method = {
        "type": "sfprompt",
        "prompts": 3,
        "codec": "fp32",
        "train": {"lr": 0.01, "steps": 2, "batch": 4, "accumulate": 2},
    }
    tree = small.tree(tmp_path / "model", small.write_rows(tmp_path), method=method, partition__clients=2)
    recipe = parse(tree)
    tokens = Tokens(private.shared_key(tmp_path / "gateway" / "split.key"))
    service = body_service(
        recipe,
        Tokens(private.shared_key(tmp_path / "gateway" / "split.key")),
        over(federation.server_store.ledger),
    )
    server = federation.start(**alongside(service))
    workspace = workspace_of(recipe)
    yield Deployed(federation, recipe, tree, workspace, service, server, tokens)
    server.stop(0)
    service.stop()


@pytest.mark.thorough
def test_a_site_with_one_of_eight_blocks_answers_to_the_bit_what_the_whole_model_answers(
    deployed: Deployed, tmp_path: Path
) -> None:
    """Over TLS, from a process of its own that never holds the seven blocks behind it: every byte of its
    update, loss and counted bytes included."""
    workspace, ask, details = deployed.workspace, deployed.ask(), deployed.details()
    job = {
        "recipe": deployed.tree,
        "client": 0,
        "name": "site-a",
        "run": RUN,
        "round": 1,
        "members": [0, 1],
        "given": "given",
        "details": details.to_words(),
    }
    job |= {"keys": str(deployed.federation.sites["site-a"].folder), "address": deployed.server.address}
    (tmp_path / "given").write_bytes(ask.payload)
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "-m", "tests.exchange.site", str(tmp_path / "job.json")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr
    told = json.loads(done.stdout)

    own = workspace.tunable.net.own_body
    here = BodyAddress(own.dial, own.offer, RUN, lambda number, client: details.token)
    payload = respond(
        deployed.link, Client(0, "site-a", workspace.tunable, workspace.train(0), {}, here), ask
    ).payload
    assert (tmp_path / "answer").read_bytes() == payload and len(payload) > 10_000

    body = sum(value.numel() for value in workspace.tunable.net.part.parameters("body").values())
    assert told["held"] == workspace.base.size - body and body > 6 * told["held"]
    assert (
        told["living"] < 2 * told["held"]
    )  # every tensor in the process: frozen and trained ones, gradients, batches
    assert told["grown"] < 4 * body  # bytes, with the work memory of a step


def test_micro_batches_of_megabytes_pass_the_exchanges_port(deployed: Deployed) -> None:
    hidden, part = torch.randn(64, 16, 384), deployed.workspace.tunable.net.part  # 1.5 MB, in two frames
    with deployed.body().open(1, 0, Wishes(Coding("fp32"), 4, patience=0.0)) as stream:
        stream.forward(Micro(hidden))
        assert torch.equal(stream.answer().value, part.body(hidden, Side()))
        assert stream.sent > 4 * hidden.numel() and stream.again == 0


def test_a_stream_that_always_breaks_is_given_up(deployed: Deployed) -> None:
    """A port that takes messages of the exchange's size alone; once the body's answers were waited for
    without end."""
    without = {name: value for name, value in alongside(deployed.service).items() if name != "longest"}
    server = deployed.federation.start(**without)
    body = replace(deployed.body(), dial=dial(deployed.federation.sites["site-a"], server.address))
    try:
        with body.open(1, 0, Wishes(Coding("fp32"), 4, patience=0.5)) as stream:
            stream.forward(Micro(torch.randn(64, 16, 384)))
            with pytest.raises(
                FedtuneError,
                match=r"S711: 6 streams in a row broke before an answer came \(RESOURCE_EXHAUSTED",
            ):
                stream.answer()
    finally:
        server.stop(0)


def test_a_round_that_is_over_admits_nobody_and_ends_who_is_there(deployed: Deployed) -> None:
    wishes = Wishes(Coding("fp32"), 4, patience=2.0)
    stream = deployed.body().open(1, 0, wishes)
    assert len(deployed.service.sessions) == 1
    deployed.federation.server_store.close_round(RUN, 1, "train")
    with pytest.raises(FedtuneError, match="S712: found round 1, which is over"):
        deployed.body(1).open(1, 1, wishes)
    wait_for(lambda: not deployed.service.sessions and deployed.service.live == 0, "the end of the session")
    stream.close()
    deployed.federation.open(2)
    deployed.body(0, 2).open(2, 0, wishes).close()


def test_a_token_is_of_one_member_one_number_and_one_round(deployed: Deployed) -> None:
    wishes = Wishes(Coding("fp32"), 4, patience=0.0)
    with pytest.raises(FedtuneError, match="S712"):
        deployed.body(0, site="site-b").open(1, 0, wishes)  # seen in another's ticket
    with pytest.raises(FedtuneError, match="S712"):
        deployed.body(0).open(1, 1, wishes)
    deployed.federation.open(2)
    with pytest.raises(FedtuneError, match="S712"):
        deployed.body(0, 1).open(2, 0, wishes)
    deployed.body(1).open(1, 1, wishes).close()


def test_a_method_without_a_cut_has_no_body_service(
    deployed: Deployed, tmp_path: Path, tiny_bert: Path
) -> None:
    with pytest.raises(FedtuneError, match=r"C104: found method\.type = 'fedpeft'"):
        body_service(
            small.recipe(tiny_bert, tmp_path / "rows.jsonl"), deployed.tokens, lambda run, round: False
        )
