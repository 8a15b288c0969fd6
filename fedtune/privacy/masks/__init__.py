"""Sums that nobody can read before they are sums: pairwise masks that cancel, and what removes the masks of
those who drop out.

Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (CCS, doi
10.1145/3133956.3133982), with double masks. One sum takes four steps; every member may be lost at any of
them:

    keys     each member makes two X25519 keys and a seed of its own, for this sum alone
    shares   each splits its second key and its seed among all members, and seals every share for one of them
    answers  each adds the stream of its seed, and for each other member a stream that this member subtracts
    opening  each gives, of every member, one share: of the seed of whose answer came, of the key of whose
             did not

The server then knows the seeds of those in the sum and the keys of those outside of it, never both of one
member: what is left is the sum of the answers, to the bit (numbers modulo 2**32 or 2**64 in numpy).

    client.py  a member's half: a `Session`, which refuses what would show more than the sum
    server.py  the server's half: `Roll`, who takes part with which keys, and `unmask`
    shamir.py, sealing.py, stream.py  secrets in shares, keys for pairs, masks from a cipher

Held by: an honest server that is curious, with fewer members than the threshold on its side. A server that
lies about who dropped out is refused where it contradicts itself to one member; one that tells members
different stories gets nothing while the threshold is above two thirds. Keys are bound to the list of all
keys, so members who were given different lists share no mask. Without signed keys a server may put members
of its own into a sum.
"""

from fedtune.privacy.masks.client import LEAST, Session, least
from fedtune.privacy.masks.sealing import KEYS, SEALED
from fedtune.privacy.masks.server import Roll, unmask
from fedtune.privacy.masks.shamir import SHARE

__all__ = ["KEYS", "LEAST", "SEALED", "SHARE", "Roll", "Session", "least", "unmask"]
