"""The local servers' secrets: generated once, kept in one file that only its owner can read."""

import ipaddress
import json
import os
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import Field, SecretStr, ValidationError

from infra.records import Record

VALID_FOR = timedelta(days=3650)


def _access_key() -> SecretStr:
    return SecretStr("CONVOY" + secrets.token_hex(7).upper())


def _secret() -> SecretStr:
    return SecretStr(secrets.token_hex(32))


class Credentials(Record):
    """Keys of the local object store. The first two are for clients, the others for its own parts only."""

    access_key_id: SecretStr = Field(default_factory=_access_key)
    secret_access_key: SecretStr = Field(default_factory=lambda: SecretStr(secrets.token_urlsafe(30)))
    filer_write: SecretStr = Field(default_factory=_secret)
    filer_read: SecretStr = Field(default_factory=_secret)
    volume_write: SecretStr = Field(default_factory=_secret)
    volume_read: SecretStr = Field(default_factory=_secret)


def load_or_create(path: Path) -> Credentials:
    """Read the credentials in `path`, or make new ones there if there are none that can be read."""
    try:
        found = Credentials.model_validate_json(path.read_bytes())
        path.chmod(0o600)
        return found
    except (OSError, ValidationError):
        pass
    created = Credentials()
    plain = {name: getattr(created, name).get_secret_value() for name in Credentials.model_fields}
    _write_private(path, json.dumps(plain).encode())
    return created


def ensure_certificate(certificate: Path, key: Path) -> None:
    """Make a self-signed certificate and its key, unless both files exist.

    It is its own authority: those who hold it and its key trust each other and nobody else (mutual TLS).
    """
    if certificate.exists() and key.exists():
        return
    from cryptography import x509  # needed once in the life of a state folder, so not at the top
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    private = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Convoy local stack")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + VALID_FOR)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(private, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    plain = private.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write_private(key, plain)
    _write_private(certificate, signed.public_bytes(encoding))


def _write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read at any moment, and that appears whole or not at all."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    partial.replace(path)
