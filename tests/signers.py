"""Keys and certificates that tests sign with, made with the cryptography library."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from amoeba_deploy.delivery import certificates

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class KeyPair:
    """A private key and its public key, in PEM files."""

    private: Path
    public: Path


def make_key(folder: Path, name: str = "key", password: bytes | None = None, curve: type = ec.SECP256R1) -> KeyPair:
    """A new key pair ``name.key`` and ``name.pub``."""
    key = ec.generate_private_key(curve())
    secret = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    folder.mkdir(parents=True, exist_ok=True)
    pair = KeyPair(folder / f"{name}.key", folder / f"{name}.pub")
    pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    pair.private.write_bytes(key.private_bytes(pem, form, secret))
    pair.public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return pair


@dataclass(frozen=True)
class Authority:
    """A certificate authority: its certificate's file, and what it signs with."""

    file: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _valid(days: tuple[int, int]) -> tuple[datetime.datetime, datetime.datetime]:
    now = datetime.datetime.now(datetime.UTC)
    return now + days[0] * DAY, now + days[1] * DAY


def make_authority(
    folder: Path, name: str = "authority", days: tuple[int, int] = (-400, 400), above: Authority | None = None
) -> Authority:
    """An authority, self-signed or issued by another; ``days`` from now between which its certificate is valid."""
    key = ec.generate_private_key(ec.SECP256R1())
    begin, end = _valid(days)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(above.certificate.subject if above else _name(name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    certificate = builder.sign(above.key if above else key, hashes.SHA256())
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.crt"
    file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return Authority(file, certificate, key)


@contextmanager
def at_day(days: float) -> Iterator[None]:
    """Let certificates be looked at so many days from now."""
    moment = datetime.datetime.now(datetime.UTC) + days * DAY
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(certificates, "_now", lambda: moment)
        yield


def make_certificate(
    folder: Path,
    authority: Authority,
    name: str = "signer",
    days: tuple[int, int] = (-30, 30),
    signs: bool = True,
    extended: x509.ObjectIdentifier | None = None,
) -> tuple[KeyPair, Path]:
    """A key pair, and the certificate for it that an authority issued; ``signs`` is its key usage."""
    pair = make_key(folder, name)
    key = serialization.load_pem_private_key(pair.private.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    begin, end = _valid(days)
    usage = dict.fromkeys(
        (
            *("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
            *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
        ),
        False,
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(name))
        .issuer_name(authority.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=signs, **{**usage, "key_agreement": not signs}), critical=True)
    )
    if extended:
        builder = builder.add_extension(x509.ExtendedKeyUsage([extended]), critical=False)
    certificate = builder.sign(authority.key, hashes.SHA256())
    file = folder / f"{name}.crt"
    file.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return pair, file
