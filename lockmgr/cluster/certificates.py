"""A key pair and a self-signed certificate for each incarnation. No authority, nothing on disk.

Who has seen the certificate in a join or slot block, and its fingerprint in the view, believes who
proves to have its key. A certificate therefore says nothing but its key: its name is made of the
key, it signs no other, and it is valid at any time, because the clock of a host may be wrong. Names
made of keys matter: OpenSSL looks up what it trusts by name, and a second certificate with the name
of a first one would keep the first one out.

The private key is kept in memory only. Python's ssl reads keys from files, so it is given one that
has no name and is nowhere but in memory (memfd_create).
"""

from __future__ import annotations

import hashlib
import os
import ssl
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

MAX_CERTIFICATE_BYTES: Final = 1152
"""What a join block and a slot block have room for."""

_BEGIN: Final = datetime(1970, 1, 1)
_END: Final = datetime(9999, 12, 31, 23, 59, 59)
"""RFC 5280 4.1.2.5: no well-defined expiration."""


class BadCertificate(ValueError):
    """Not a certificate that `make_credentials` makes; in words."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What an incarnation proves itself with. Whoever has it is that incarnation: the daemon, and
    its supervisor, which speaks for it once it is dead."""

    certificate: bytes
    """DER."""
    key_pem: bytes = field(repr=False)
    """PKCS #8, not encrypted."""

    @property
    def fingerprint(self) -> bytes:
        return fingerprint_of(self.certificate)


def fingerprint_of(certificate: bytes) -> bytes:
    """SHA-256 of the DER bytes, as the view has it."""
    return hashlib.sha256(certificate).digest()


def make_credentials() -> Credentials:
    """A new P-256 key pair (which FIPS 140 hosts have too) and its certificate, some 330 bytes."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name_for(key.public_key())
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_BEGIN)
        .not_valid_after(_END)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.DER)
    )
    assert len(certificate) <= MAX_CERTIFICATE_BYTES
    return Credentials(
        certificate,
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )


def _name_for(key: ec.EllipticCurvePublicKey) -> x509.Name:
    der = key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    digest = hashlib.sha256(der).hexdigest()[:32]
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, digest)])


@lru_cache(maxsize=256)
def check_certificate(certificate: bytes) -> None:
    """Raises `BadCertificate` for what `make_credentials` would not have made."""
    if len(certificate) > MAX_CERTIFICATE_BYTES:
        raise BadCertificate(f"a certificate of {len(certificate)} bytes")
    try:
        parsed = x509.load_der_x509_certificate(certificate)
        key = parsed.public_key()
        if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
            raise BadCertificate("a certificate with a key that is not P-256")
        if parsed.subject != _name_for(key):
            raise BadCertificate("a certificate whose name is not made of its key")
        parsed.verify_directly_issued_by(parsed)
        constraints = parsed.extensions.get_extension_for_class(x509.BasicConstraints)
        if constraints.value.ca or len(parsed.extensions) != 1:
            raise BadCertificate("a certificate that claims more than its key")
        if parsed.not_valid_before_utc.year > 1970 or parsed.not_valid_after_utc.year < 9999:
            raise BadCertificate("a certificate that is not valid at all times")
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=certificate)
    except BadCertificate:
        raise
    except Exception as error:  # whatever the parsers say of hostile bytes
        words = str(error).partition("\n")[0][:80] or type(error).__name__
        raise BadCertificate(f"a certificate that cannot be used: {words}") from None


# -- TLS ---------------------------------------------------------------------------------------
def server_context(ours: Credentials, believed: Iterable[bytes]) -> ssl.SSLContext:
    """For connections that come in: who has none of these certificates' keys is refused.

    It is still to be asked whose certificate it was, and whether that is believed *now*.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, ours, believed)
    context.num_tickets = 0  # a resumed session would show a certificate that nobody proved
    return context


def client_context(ours: Credentials, expected: bytes) -> ssl.SSLContext:
    """For a connection to the one node with that certificate."""
    return _context(ssl.PROTOCOL_TLS_CLIENT, ours, (expected,))


def _context(protocol: int, ours: Credentials, believed: Iterable[bytes]) -> ssl.SSLContext:
    """TLS 1.3, and both sides prove themselves. Raises `BadCertificate` for one of ``believed``.

    A self-signed certificate that is itself in the trust store verifies; nothing that it signed
    does, because it says that it is no authority.
    """
    context = ssl.SSLContext(protocol)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.options |= ssl.OP_NO_TICKET
    for certificate in believed:
        check_certificate(certificate)
        context.load_verify_locations(cadata=certificate)
    load_own(context, ours)
    return context


def load_own(context: ssl.SSLContext, ours: Credentials) -> None:
    """Show this certificate, and prove to have its key."""
    pem = ours.key_pem + ssl.DER_cert_to_PEM_cert(ours.certificate).encode()
    fd = os.memfd_create("lockmgr-credentials", os.MFD_CLOEXEC)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(pem)
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
