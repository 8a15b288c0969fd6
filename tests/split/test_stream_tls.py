"""A session over TLS, and without it; a service that is not there."""

from __future__ import annotations

import datetime
from collections.abc import Iterator

import grpc
import pytest
import torch

from fedtune.errors import FedtuneError
from fedtune.split.channel import Socket
from fedtune.split.codec import Coding
from fedtune.split.grpc_server import serve
from fedtune.split.micro import Wishes
from fedtune.split.stream import Stream
from tests.split.plain import (
    OFFER,
    opened,
    run,
    served,
    turn,
)
from tests.split.test_stream import equal


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def authority() -> Iterator[tuple[bytes, bytes]]:
    """PEM of a key and its certificate: the authority itself, then as many members as are asked for."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")])
    signer = None
    while True:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = (
            name if signer is None else x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "member")])
        )
        made = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
        )
        made = made.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(
            now + datetime.timedelta(hours=1)
        )
        made = made.add_extension(x509.BasicConstraints(signer is None, None), True)
        made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), False)
        certificate = made.sign(signer or key, hashes.SHA256())
        signer = signer or key
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        yield pem, certificate.public_bytes(serialization.Encoding.PEM)


def test_mutual_tls() -> None:
    """A member trains; a stranger with a certificate of its own, and one without any, are not even heard."""
    made = authority()
    (_, root), (server_key, server_cert), (client_key, client_cert) = next(made), next(made), next(made)
    stranger = authority()
    next(stranger)
    odd_key, odd_cert = next(stranger)
    service = served()
    peers: list[str] = []
    admit = service.admit
    service.admit = lambda hello, peer: (peers.append(peer), admit(hello, peer))[1]
    service.start()
    server, port = serve(
        service, "localhost:0", grpc.ssl_server_credentials([(server_key, server_cert)], root, True)
    )
    address = f"localhost:{port}"
    try:
        member = grpc.ssl_channel_credentials(root, client_key, client_cert)
        stream = Stream(
            lambda: Socket(address, member), OFFER, turn(peer="member"), Wishes(Coding("fp32"), 4)
        )
        assert equal(run(stream), run(None)) and peers == ["member"]
        stream.close()
        for credentials in (
            grpc.ssl_channel_credentials(root, odd_key, odd_cert),
            grpc.ssl_channel_credentials(root),
        ):
            with pytest.raises(FedtuneError, match="S711"):
                opened(lambda c=credentials: Socket(address, c), patience=0.0)
        assert len(peers) == 1
    finally:
        service.stop()
        server.stop(0)


@pytest.mark.parametrize("address", ["0.0.0.0:1", "[::]:1", "body.example.org:1", "192.168.1.2:1"])
def test_without_certificates_only_this_machine(address: str) -> None:
    with pytest.raises(FedtuneError, match="S716"):
        serve(served(), address)
    with pytest.raises(FedtuneError, match="S716"):
        Socket(address)


def test_a_service_that_is_not_there_is_said_after_the_patience() -> None:
    with pytest.raises(FedtuneError, match="S711: the body service did not answer after"):
        opened(lambda: Socket("127.0.0.1:9"), patience=0.3)
