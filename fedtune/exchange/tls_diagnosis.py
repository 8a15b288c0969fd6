"""Why a secure connection does not come about. gRPC says "UNAVAILABLE" for all of it; one handshake by hand
says the reason."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fedtune.errors import FedtuneError
from fedtune.trust import Identity, private
from fedtune.trust.certificates import member_of, read_certificate, utc_now

SECONDS = 5.0
NAMES, DATES = (
    (62, 64),
    (9, 10),
)  # X509_V_ERR_HOSTNAME_MISMATCH, IP_ADDRESS_MISMATCH; CERT_NOT_YET_VALID, CERT_HAS_EXPIRED


def reason(identity: Identity, address: str) -> FedtuneError | None:
    """What one of the two ends has against the other, or None where nobody answers or all is well: then
    trying again may help."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    for turn in range(3):  # a coordinator that is just ending may hang up on anybody, three times it means us
        if turn:
            time.sleep(0.3)
        try:
            with (
                socket.create_connection((host, int(port)), SECONDS) as plain,
                context(identity).wrap_socket(plain, server_hostname=host) as secure,
            ):
                if secure.recv(
                    1
                ):  # in TLS 1.3 the server judges our certificate after our half of the handshake
                    return None
        except ssl.SSLCertVerificationError as error:
            return theirs(error, host)
        except ssl.SSLError as error:
            return spoken(error)
        except (OSError, ValueError):
            return None
    return ours(identity)


def unreachable(address: str) -> str:
    """Why no connection to HOST:PORT can be made from here, without a proxy; "" where one can."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), SECONDS):
            return ""
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)


def context(identity: Identity) -> ssl.SSLContext:
    """Our end, as gRPC would present it."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.load_verify_locations(cadata=identity.authority_pem.decode())
    made.set_alpn_protocols(["h2"])
    with unlisted(identity.key + identity.certificate) as path:
        made.load_cert_chain(path)
    return made


@contextlib.contextmanager
def unlisted(content: bytes) -> Iterator[str]:
    """A path to read a secret from, as Python's ssl wants one: in memory where the system can (Linux), else a
    private file for a moment."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("identity"), "wb", buffering=0) as file:
            file.write(content)
            yield f"/proc/self/fd/{file.fileno()}"
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "identity.pem"
        private.write(path, content)
        yield str(path)


def theirs(error: ssl.SSLCertVerificationError, host: str) -> FedtuneError:
    """What we have against the coordinator's certificate."""
    if error.verify_code in NAMES:
        do = f"use a name that is in its certificate, or run: fedtune keys renew coordinator --host {host}"
        return FedtuneError(
            "E802", sentence=f"the coordinator's certificate is not for the name {host!r}", do=do
        )
    if error.verify_code in DATES:
        do = "check this machine's clock, or run: fedtune keys renew coordinator"
        return FedtuneError(
            "T704", sentence=f"the coordinator's certificate is not valid now ({error.verify_message})", do=do
        )
    return FedtuneError(
        "T705",
        f"a coordinator of another authority ({error.verify_message})",
        "one of this federation",
        "check the address, or take the right keys",
    )


def ours(identity: Identity) -> FedtuneError:
    """What the coordinator may have against our certificate. gRPC hangs up without an alert, so we look at it
    ourselves."""
    try:
        member_of(read_certificate(identity.certificate, "these keys"), identity.authority, utc_now())
    except FedtuneError as error:
        return error
    return FedtuneError(
        "E802",
        sentence="the coordinator closes the connection when it sees the certificate of "
        f"'{identity.name.name}', which looks valid here",
        do=f"compare the clocks of both machines, or run: fedtune keys renew {identity.name.name}",
    )


def spoken(error: ssl.SSLError) -> FedtuneError | None:
    """What else was said instead of a handshake."""
    text = (error.reason or str(error)).lower().replace("_", " ")
    if "wrong version" in text or "record layer" in text:
        return FedtuneError(
            "E802", sentence="the program at this address does not use TLS", do="check host and port"
        )
    if "alert" in text:
        return FedtuneError(
            "E802",
            sentence=f"the other end refused the TLS handshake ({text})",
            do="check that fedtune's coordinator is at this address",
        )
    return None
