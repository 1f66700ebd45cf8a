"""Certificates of incarnations, and which ones are believed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID
from hypothesis import given
from hypothesis import strategies as st

from lockmgr.cluster.certificates import (
    MAX_CERTIFICATE_BYTES,
    BadCertificate,
    check_certificate,
    make_credentials,
    server_context,
)
from lockmgr.cluster.peers import DEFAULT_PORT, Address, Believed, Peer, parse_address, peers_in
from lockmgr.cluster.view import NodeId, SlotState, View, ViewSlot

OURS, THEIRS, OTHER = make_credentials(), make_credentials(), make_credentials()
DER = serialization.Encoding.DER


def forged(
    *,
    name: str | None = None,
    key: Any = None,
    signer: Any = None,
    begin: int = 1970,
    end: int = 9999,
    authority: bool = False,
    more: x509.ExtensionType | None = None,
) -> bytes:
    """A certificate that is like the real ones but for what is said."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    spki = key.public_key().public_bytes(DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    name = hashlib.sha256(spki).hexdigest()[:32] if name is None else name
    full = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        x509.CertificateBuilder()
        .subject_name(full)
        .issuer_name(full)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(datetime(begin, 1, 1))
        .not_valid_after(datetime(end, 12, 31))
        .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    )
    if more is not None:
        builder = builder.add_extension(more, critical=False)
    return builder.sign(signer or key, hashes.SHA256()).public_bytes(DER)


def test_each_is_its_own_and_fits() -> None:
    made = [make_credentials() for _ in range(20)]
    assert len({one.fingerprint for one in made}) == 20
    for one in made:
        check_certificate(one.certificate)
        assert len(one.certificate) <= MAX_CERTIFICATE_BYTES // 2
        assert one.fingerprint == hashlib.sha256(one.certificate).digest()
        assert b"PRIVATE" not in repr(one).encode() and "PRIVATE" not in str(one)
    check_certificate(forged())


def test_private_keys_touch_no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[object] = []
    real = open

    def spy(file: Any, *arguments: Any, **named: Any) -> Any:
        opened.append(file)
        return real(file, *arguments, **named)

    monkeypatch.setattr("builtins.open", spy)
    server_context(OURS, [THEIRS.certificate])
    assert all(isinstance(file, int) for file in opened), opened


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: b"", "cannot be used"),
        (lambda: bytes(300), "cannot be used"),
        (lambda: OURS.certificate + b"\0", "cannot be used"),
        (lambda: OURS.certificate + THEIRS.certificate, "cannot be used"),
        (lambda: OURS.certificate[:-1], "cannot be used"),
        (lambda: bytes(MAX_CERTIFICATE_BYTES + 1), "1153 bytes"),
        (lambda: forged(name="node1"), "name is not made of its key"),
        (lambda: forged(authority=True), "claims more"),
        (lambda: forged(more=x509.SubjectAlternativeName([x509.DNSName("a")])), "claims more"),
        (lambda: forged(begin=2000), "not valid at all times"),
        (lambda: forged(end=2030), "not valid at all times"),
        (lambda: forged(signer=ec.generate_private_key(ec.SECP256R1())), "cannot be used"),
        (lambda: forged(key=ec.generate_private_key(ec.SECP384R1())), "not P-256"),
        (lambda: forged(key=rsa.generate_private_key(65537, 2048)), "not P-256"),
    ],
)
def test_others_are_refused(make: Callable[[], bytes], words: str) -> None:
    with pytest.raises(BadCertificate, match=words):
        check_certificate(make())


@given(st.integers(0, len(OURS.certificate) - 1), st.integers(1, 255))
def test_a_changed_byte(position: int, change: int) -> None:
    changed = bytearray(OURS.certificate)
    changed[position] ^= change
    with pytest.raises(BadCertificate):
        check_certificate(bytes(changed))


@given(st.binary(max_size=400))
def test_hostile_bytes(data: bytes) -> None:
    with pytest.raises(BadCertificate):
        check_certificate(data)


# -- who is believed ---------------------------------------------------------------------------
def test_believed() -> None:
    one, two = Peer(NodeId(1, 1), THEIRS.certificate), Peer(NodeId(2, 1), OTHER.certificate)
    believed = Believed(OURS, [one, two])
    assert believed.who(OTHER.certificate) is two
    assert believed.who(OURS.certificate) is None
    assert len(believed.for_incoming.get_ca_certs()) == 0, "no authorities"
    assert believed.for_incoming.cert_store_stats()["x509"] == 2
    assert believed.for_dialing(one).cert_store_stats()["x509"] == 1
    with pytest.raises(ValueError, match="two peers"):
        Believed(OURS, [one, Peer(NodeId(2, 1), THEIRS.certificate)])
    with pytest.raises(ValueError, match="own"):
        Believed(OURS, [Peer(NodeId(1, 1), OURS.certificate)])


def test_peers_in_a_view(caplog: pytest.LogCaptureFixture) -> None:
    def slot(fingerprint: bytes, state: SlotState, *addresses: str) -> ViewSlot:
        return ViewSlot(1, state, 255, fingerprint, fingerprint.hex(), addresses=addresses)

    bad = forged(authority=True)
    bad_print = hashlib.sha256(bad).digest()
    missing = bytes(range(32))
    view = replace(
        View.empty(8),
        slots=(
            slot(OURS.fingerprint, SlotState.ACTIVE, "192.0.2.1"),
            slot(THEIRS.fingerprint, SlotState.JOINING, "192.0.2.2:99", "a b", "2001:db8::1"),
            slot(OTHER.fingerprint, SlotState.NEEDS_REPLAY, "192.0.2.3"),
            slot(bad_print, SlotState.ACTIVE),
            slot(missing, SlotState.ACTIVE),
            ViewSlot(),
        ),
    )
    known = {one.fingerprint: one.certificate for one in (OURS, THEIRS, OTHER)}
    known |= {bad_print: bad, missing: OTHER.certificate}
    with caplog.at_level(logging.INFO):
        found = peers_in(view, known, NodeId(0, 1))
    expected = (Address("192.0.2.2", 99), Address("2001:db8::1", DEFAULT_PORT))
    assert found == (Peer(NodeId(1, 1), THEIRS.certificate, expected),)
    assert len(caplog.messages) == 3


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1", Address("192.0.2.1", DEFAULT_PORT)),
        ("192.0.2.1:7", Address("192.0.2.1", 7)),
        ("2001:DB8::0:1", Address("2001:db8::1", DEFAULT_PORT)),
        ("[2001:db8::1]", Address("2001:db8::1", DEFAULT_PORT)),
        ("[2001:db8::1]:65535", Address("2001:db8::1", 65535)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    assert parse_address(text) == address
    assert parse_address(str(address)) == address


@pytest.mark.parametrize(
    "text",
    [
        ":",
        "host",
        "host:1",
        "1.2.3.4:0",
        "1.2.3.4:65536",
        "1.2.3.4:+1",
        "[::1",
        "::",
        "[::1]1",
        "[::1]:x",
        "0.0.0.0",
        "224.0.0.1",
        "1.2.3.4:²",
        "1.2.3",
    ],
)
def test_bad_addresses(text: str) -> None:
    with pytest.raises(ValueError, match=r"is no|has no port|is not one") as caught:
        parse_address(text)
    assert len(str(caught.value)) < 150
