"""The local servers' secrets: generated once, and kept in files that only their owner can read."""

import ipaddress
import json
import secrets
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import Field, SecretStr

from infra.machine.files import atomic_file
from infra.records import Record

CERTIFICATE_LIFETIME = timedelta(days=3650)


def _secret() -> SecretStr:
    return SecretStr(secrets.token_hex(32))


class Credentials(Record):
    """Keys of the local object store. Clients use the first two; only the store's own parts use the others."""

    access_key_id: SecretStr = Field(default_factory=lambda: SecretStr("CONVOY" + secrets.token_hex(7).upper()))
    secret_access_key: SecretStr = Field(default_factory=lambda: SecretStr(secrets.token_urlsafe(30)))
    filer_write: SecretStr = Field(default_factory=_secret)
    filer_read: SecretStr = Field(default_factory=_secret)
    volume_write: SecretStr = Field(default_factory=_secret)
    volume_read: SecretStr = Field(default_factory=_secret)


def load_or_create(path: Path) -> Credentials:
    """Returns the credentials in `path`; creates them if the file is missing or cannot be read as credentials."""
    if found := Credentials.from_file(path):
        path.chmod(0o600)
        return found
    created = Credentials()
    plain = {name: getattr(created, name).get_secret_value() for name in Credentials.model_fields}
    _write_private(path, json.dumps(plain).encode())
    return created


def ensure_certificate(certificate: Path, key: Path) -> None:
    """Creates a self-signed certificate and its key, unless both files exist.

    The certificate is its own authority: processes that hold it and its key trust only each other (mutual TLS).
    """
    if certificate.exists() and key.exists():
        return
    from cryptography import x509  # needed once per state folder, so not at the top
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
        .not_valid_after(now + CERTIFICATE_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(private, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    plain = private.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    _write_private(key, plain)
    _write_private(certificate, signed.public_bytes(encoding))


def _write_private(path: Path, data: bytes) -> None:
    """Writes a file atomically; only its owner can read it, also while it is being written."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with atomic_file(path) as partial:  # mode 0600
        partial.write_bytes(data)
