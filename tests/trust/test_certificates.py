"""Certificates: what stands in them, who judges them besides us, and which of them are nobody's."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedtune.errors import FedtuneError
from fedtune.trust import Name
from fedtune.trust.certificates import (
    SIGNING,
    SKEW,
    federation_of,
    host,
    key_hash,
    make_authority,
    make_member,
    member_of,
    peer_of,
    read_certificate,
    usage,
)
from tests.refusals import code_of

NOW = datetime(2026, 1, 1, tzinfo=UTC)
KEY, SIGNER = ec.generate_private_key(ec.SECP256R1()), ed25519.Ed25519PrivateKey.generate()
AUTHORITY_KEY = ec.generate_private_key(ec.SECP256R1())
AUTHORITY = make_authority("hospitals", AUTHORITY_KEY, NOW)
HOSTS = ("fed.example.org", "10.0.0.7", "::1")


def member(
    name: str = "site-a", federation: str = "hospitals", hosts: tuple[str, ...] = ()
) -> x509.Certificate:
    return make_member(
        Name(federation, name),
        KEY.public_key(),
        SIGNER.public_key(),
        AUTHORITY,
        AUTHORITY_KEY,
        NOW,
        30,
        hosts,
    )


def critical(certificate: x509.Certificate) -> dict[str, bool]:
    return {one.oid._name or one.oid.dotted_string: one.critical for one in certificate.extensions}


def test_what_stands_in_certificates_is_as_rfc_5280_wants() -> None:
    """Sections 4.2.1.1 to 4.2.1.12: what a reader must understand is critical, the identifiers of keys never are."""
    authority, made = make_authority("hospitals", AUTHORITY_KEY, NOW), member()
    assert critical(authority) == {"basicConstraints": True, "keyUsage": True, "subjectKeyIdentifier": False}
    assert critical(made) == {
        "basicConstraints": True,
        "keyUsage": True,
        "extendedKeyUsage": False,
        "subjectAltName": False,
        "Unknown OID": False,  # the signing key
        "subjectKeyIdentifier": False,
        "authorityKeyIdentifier": False,
    }
    constraints = [
        one.extensions.get_extension_for_class(x509.BasicConstraints).value for one in (authority, made)
    ]
    assert [(one.ca, one.path_length) for one in constraints] == [(True, 0), (False, None)]
    assert [one.extensions.get_extension_for_class(x509.KeyUsage).value for one in (authority, made)] == [
        usage(sign_certificates=True),
        usage(sign_certificates=False),
    ]
    of = made.extensions.get_extension_for_class
    keys = [
        x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest for key in (KEY, AUTHORITY_KEY)
    ]
    assert [
        of(x509.SubjectKeyIdentifier).value.digest,
        of(x509.AuthorityKeyIdentifier).value.key_identifier,
    ] == keys
    assert (
        made.extensions.get_extension_for_oid(SIGNING).value.value == SIGNER.public_key().public_bytes_raw()
    )


def test_keys_of_members_sign_no_certificates_and_the_authoritys_signs_nothing_else() -> None:
    words = [
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
    ]
    for signs, only in ((True, "key_cert_sign"), (False, "digital_signature")):
        made = usage(sign_certificates=signs)
        assert [word for word in words if getattr(made, word)] == [only]


def test_names_hosts_dates_and_serials() -> None:
    coordinator, site = member("coordinator", hosts=HOSTS), member()
    names = coordinator.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [
        x509.UniformResourceIdentifier("spiffe://fedtune/hospitals/coordinator"),
        x509.DNSName("fed.example.org"),
        x509.IPAddress(ip_address("10.0.0.7")),
        x509.IPAddress(ip_address("::1")),
    ]
    roles = [
        one.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value for one in (coordinator, site)
    ]
    client, server = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
    assert [set(one) for one in roles] == [{client, server}, {client}]
    for made, common in ((AUTHORITY, "fedtune authority"), (site, "site-a"), (coordinator, "coordinator")):
        assert made.issuer == AUTHORITY.subject and federation_of(made) == "hospitals"
        assert [one.value for one in made.subject.get_attributes_for_oid(NameOID.COMMON_NAME)] == [common]
    assert (site.not_valid_before_utc, site.not_valid_after_utc) == (NOW - SKEW, NOW + timedelta(days=30))
    assert AUTHORITY.not_valid_before_utc == NOW - SKEW
    assert AUTHORITY.not_valid_after_utc == NOW + timedelta(days=3650)
    assert len({one.serial_number for one in (AUTHORITY, coordinator, site, member())}) == 4
    assert timedelta(hours=1) == SKEW


def test_another_library_believes_what_we_sign_and_nothing_that_a_member_signs() -> None:
    """cryptography's path validation (RFC 5280, section 6, with the rules of the CA/Browser Forum)."""
    authority = make_authority("hospitals", AUTHORITY_KEY, NOW)
    builder = PolicyBuilder().store(Store([authority])).time(NOW + timedelta(days=1))
    client = builder.build_client_verifier()
    assert client.verify(member(), []).subjects
    for name in (
        x509.DNSName(HOSTS[0]),
        x509.IPAddress(ip_address(HOSTS[1])),
        x509.IPAddress(ip_address(HOSTS[2])),
    ):
        server = builder.build_server_verifier(name)
        assert len(server.verify(member("coordinator", hosts=HOSTS), [])) == 2
        with pytest.raises(VerificationError):  # a site is no server, whatever its names
            server.verify(member(hosts=HOSTS), [])
    site = member()
    below = make_member(
        Name("hospitals", "site-b"), KEY.public_key(), SIGNER.public_key(), site, KEY, NOW, 30
    )
    with pytest.raises(VerificationError):
        client.verify(below, [site])


@pytest.mark.parametrize(
    "text", ["localhost", "a.example.org", "10.0.0.7", "::1", ".".join(["a" * 49] * 5)[:253]]
)
def test_hosts(text: str) -> None:
    assert str(host(text).value) == text


@pytest.mark.parametrize("text", ["", "https://x", "x:80", "x/y", "a b", "é.example.org", "a" * 254])
def test_what_is_no_host(text: str) -> None:
    with pytest.raises(FedtuneError, match=r"^T708"):
        host(text)


def test_a_certificate_is_good_from_its_first_to_its_last_second() -> None:
    made = member()
    peer, second = peer_of(made), timedelta(seconds=1)
    assert (peer.starts, peer.ends) == (NOW - SKEW, NOW + timedelta(days=30))
    assert (peer.key, peer.signing_key) == (
        key_hash(KEY.public_key()),
        SIGNER.public_key().public_bytes_raw(),
    )
    for at in (peer.starts, NOW, peer.ends):
        assert member_of(made, AUTHORITY, at) == peer
    for at in (peer.starts - second, peer.ends + second):
        assert code_of(lambda at=at: member_of(made, AUTHORITY, at)) == "T704"


def test_certificates_of_others_are_nobodys() -> None:
    other_key = ec.generate_private_key(ec.SECP256R1())
    others = make_authority("hospitals", other_key, NOW)
    assert code_of(lambda: member_of(member(), others, NOW)) == "T705"
    assert code_of(lambda: member_of(member(federation="banks"), AUTHORITY, NOW)) == "T705"
    assert code_of(lambda: member_of(AUTHORITY, AUTHORITY, NOW)) == "T705"
    for bad in (b"", b"none", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"):
        assert code_of(lambda bad=bad: read_certificate(bad, "here")) == "T702"


URI = x509.UniformResourceIdentifier("spiffe://fedtune/hospitals/client/site-a")
RAW = SIGNER.public_key().public_bytes_raw()


@pytest.mark.parametrize(
    ("uris", "signing", "tls_key"),
    [
        ([], RAW, KEY),
        ([URI], None, KEY),
        ([x509.DNSName("site-a")], RAW, KEY),
        ([URI, URI], RAW, KEY),
        ([x509.UniformResourceIdentifier("spiffe://fedtune/hospitals/site-a")], RAW, KEY),
        ([URI], RAW[:-1], KEY),
        ([URI], RAW + b"\0", KEY),
        ([URI], RAW, SIGNER),
    ],
    ids=[
        "no name",
        "no signing key",
        "a host",
        "two names",
        "another form",
        "short",
        "long",
        "another kind of key",
    ],
)
def test_a_certificate_without_one_name_and_both_keys_is_no_members(
    uris: list[x509.GeneralName],
    signing: bytes | None,
    tls_key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey,
) -> None:
    builder = x509.CertificateBuilder().subject_name(x509.Name([])).issuer_name(AUTHORITY.subject)
    builder = builder.public_key(tls_key.public_key()).serial_number(7)
    builder = builder.not_valid_before(NOW).not_valid_after(NOW + timedelta(days=1))
    if uris:
        builder = builder.add_extension(x509.SubjectAlternativeName(uris), critical=False)
    if signing is not None:
        builder = builder.add_extension(x509.UnrecognizedExtension(SIGNING, signing), critical=False)
    made = builder.sign(AUTHORITY_KEY, hashes.SHA256())
    assert federation_of(made) == ""
    assert code_of(lambda: member_of(made, AUTHORITY, NOW)) == "T705"
