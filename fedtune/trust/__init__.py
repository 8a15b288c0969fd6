"""Who speaks, and that it is so: keys, certificates, the allow list, signed envelopes and receipts."""

from fedtune.trust.allowed import AllowList
from fedtune.trust.certificates import Peer
from fedtune.trust.envelope import Envelope
from fedtune.trust.identity import Identity, load, peer_from_tls
from fedtune.trust.names import COORDINATOR, Name
from fedtune.trust.receipt import Receipt
from fedtune.trust.replay import Replays
from fedtune.trust.signed import Signed
from fedtune.trust.ticket import Ticket

__all__ = [
    "COORDINATOR",
    "AllowList",
    "Envelope",
    "Identity",
    "Name",
    "Peer",
    "Receipt",
    "Replays",
    "Signed",
    "Ticket",
    "load",
    "peer_from_tls",
]
