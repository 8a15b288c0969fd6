"""The body service behind the exchange's door: the same port, mutual TLS and allow list, and clients' names
from their certificates.

tokens = Tokens(private.shared_key(folder / "split.key"))  # one key for the run and for the service
service = body_service(recipe, tokens, over(store.ledger))  # started; holds the body's blocks, nothing else
serve(store, coordinator, address, **alongside(service))
...
client.body = body_address(identity, address, run, told)  # at a site; run and told come in its signed ticket
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc

from fedtune.config import Recipe, method_of
from fedtune.errors import FedtuneError
from fedtune.exchange.round_ledger import RoundLedger
from fedtune.exchange.tls import Door, client_credentials
from fedtune.split.batching import MERGING
from fedtune.split.body import Frozen
from fedtune.split.body_address import BodyAddress
from fedtune.split.channel import Dial, Socket
from fedtune.split.facts import SplitFacts
from fedtune.split.frames import CHUNK, LONGEST
from fedtune.split.grpc_server import handler
from fedtune.split.selftest import digest
from fedtune.split.service import TERMS, Service, Terms
from fedtune.split.session import Offer, Tokens
from fedtune.trust import Identity

# --- the coordinator's machine ---


def body_service(
    recipe: Recipe, tokens: Tokens, over: Callable[[str, int], bool], terms: Terms = TERMS
) -> Service:
    """The body of a recipe's model, loaded alone, for whoever shows a token of a round that is not over. It
    is started.

    Which base it belongs to is not known here: its digest is what a site asks for, and a site checks its
    answers against the coordinator's card.
    Raises C104 for a method that splits nothing, S701, S702, S704, M301.
    """
    method = method_of(recipe)
    split = method.capabilities.split
    if split is None:
        raise FedtuneError(
            "C104",
            f"method.type = '{method.facts.type}' with a body service",
            "a method that splits the model",
            "start the exchange alone",
        )
    part = split.load_body(recipe.model, recipe.data.task)
    offer = Offer("", digest(part, "body"), part.cut.k, part.cut.m, part.width)
    merging = MERGING if split.merges else None
    return Service(Frozen(part), offer, tokens.admit, terms, merging, over).start()


def over(ledger: RoundLedger) -> Callable[[str, int], bool]:
    """For `body_service`: a round is over unless a verb of it is open in the exchange's book."""
    return lambda run, round: (
        not any(progress.open for progress in ledger.progress(run) if progress.round == round)
    )


def alongside(service: Service) -> dict[str, Any]:
    """For `exchange.serve(server_store, coordinator, address, **alongside(service))`; the service must have
    been started.

    Its streams take threads of the server's pool, a few more than there are sessions, for those who are told
    that there is no room.
    """
    return {"also": [behind(service)], "threads": service.terms.sessions + 8, "longest": LONGEST + CHUNK}


def behind(service: Service) -> Callable[[Door], grpc.GenericRpcHandler]:
    """The service's handler behind a door, which names and checks the peer."""
    return lambda door: handler(service, lambda context: door.peer(context).name.name)


# --- a site ---


def body_address(
    identity: Identity, address: str, run: str, told: SplitFacts, beat: float = 5.0
) -> BodyAddress:
    """The way to the body for one ticket, which is what `Client.body` is. Raises S702 for facts that no
    coordinator states.

    run   as in the ticket
    told  as the coordinator's `Split.describe` made it, with Tokens.issue(run, round, client's number,
          client's name)
    """
    return BodyAddress(
        dial(identity, address, beat), told.offer, run, lambda round, client: told.token, told.read_card()
    )


def dial(identity: Identity, address: str, beat: float = 5.0) -> Dial:
    """How a site reaches the body service, as the member that it is; each stream is a connection of its
    own."""

    def connect() -> Socket:
        return Socket(address, client_credentials(identity), [("grpc.use_local_subchannel_pool", 1)], beat)

    return connect
