"""Certificates of who signs: from the signer's own to an authority that is trusted, all valid now.

model-signing checks a chain as of the day on which the signer's certificate began, so one that expired passes there.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from amoeba_deploy.errors import BadInput, VerificationFailed

if TYPE_CHECKING:
    from cryptography.x509 import Certificate


def check_chain(chain: Sequence[bytes], authorities: Sequence[Path], where: str) -> str:
    """Check the certificates (DER) of a signature; returns the signer's name.

    Raises:
        VerificationFailed: one is not valid now, was not issued by the next, or the last by no trusted authority.
        BadInput: an authority's file is damaged.
    """
    from cryptography import x509

    try:
        certificates = [x509.load_der_x509_certificate(der) for der in dict.fromkeys(chain)]
    except ValueError:
        raise VerificationFailed(f"{where}: holds a damaged certificate; get the bundle again") from None
    trusted = [certificate for file in authorities for certificate in _read(file)]
    issuer = next((one for one in trusted if _issued(certificates[-1], one) or certificates[-1] == one), None)
    linked = all(_issued(one, above) for one, above in itertools.pairwise(certificates))
    if issuer is None or not linked:
        raise VerificationFailed(
            f"{where}: its certificate '{_name(certificates[0])}' comes from no trusted authority; trust the one that "
            f"issued it, or get the bundle from who is trusted"
        )
    for one in (*certificates, issuer):
        said = _out_of_time(one)
        if said is not None:
            how = (
                "have the bundle signed again with a valid one" if "expired" in said else "look at this machine's clock"
            )
            raise VerificationFailed(f"{where}: the certificate '{_name(one)}' {said}; {how}")
    return _name(certificates[0])


@dataclass(frozen=True)
class Fit:
    """What a certificate says that can sign."""

    until: datetime.datetime
    """Up to when it, and those above it that come along, are valid (UTC)."""
    issuer: str | None
    """Which authority devices must trust; None where the last that comes along is that authority itself."""


def check_signing(private_key: Path, public_key: object, file: Path, chain: Sequence[Path]) -> Fit:
    """Check that devices will accept what is signed now with a key and its certificate.

    Args:
        private_key: the key's file, to name it.
        public_key: what belongs to the key.
        file: the certificate, in PEM.
        chain: files of those above it.

    Raises:
        BadInput: a certificate is of another key, not valid now, not for signing, or not issued by the next.
    """
    own = _read(file)
    certificates = list(dict.fromkeys([own[0], *(one for each in chain or (file,) for one in _read(each))]))
    first = certificates[0]
    if first.public_key() != public_key:
        raise BadInput(
            f"{file}: does not match {private_key}, it is the certificate of another key; give the one that was issued "
            f"for this key"
        )
    for one in certificates:
        said = _out_of_time(one)
        if said is not None:
            raise BadInput(f"{file}: the certificate '{_name(one)}' {said}; sign with one that is valid now")
    if not _may_sign(first):
        raise BadInput(
            f"{file}: the certificate '{_name(first)}' is not meant for signing; have one issued with the key usage "
            f"digitalSignature or the extended key usage codeSigning"
        )
    for one, above in itertools.pairwise(certificates):
        if not _issued(one, above) or not _is_authority(above):
            raise BadInput(
                f"{file}: the certificate '{_name(one)}' was not issued by '{_name(above)}' as an authority (CA:TRUE), "
                f"which comes next; give --chain from the certificate upwards"
            )
    last = certificates[-1]
    issuer = None if _issued(last, last) else last.issuer.rfc4514_string() or "without a name"
    return Fit(min(one.not_valid_after_utc for one in certificates), issuer)


def _out_of_time(certificate: Certificate) -> str | None:
    """Why a certificate is not valid now, or None."""
    if certificate.not_valid_after_utc < _now():
        return f"expired on {certificate.not_valid_after_utc:%Y-%m-%d}"
    if certificate.not_valid_before_utc > _now():
        return f"is valid from {certificate.not_valid_before_utc:%Y-%m-%d} only"
    return None


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def _may_sign(certificate: Certificate) -> bool:
    """Whether model-signing accepts a certificate for signatures."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    try:
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
        if usage.value.digital_signature:
            return True
    except (x509.ExtensionNotFound, ValueError):
        pass
    try:
        extended = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    except (x509.ExtensionNotFound, ValueError):
        return False
    return ExtendedKeyUsageOID.CODE_SIGNING in extended.value


def _is_authority(certificate: Certificate) -> bool:
    from cryptography import x509

    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except (x509.ExtensionNotFound, ValueError):
        return False


def _read(file: Path) -> list[Certificate]:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(file.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInput(f"{file}: holds no certificate in PEM ({error}); export it again") from None


def _issued(certificate: Certificate, issuer: Certificate) -> bool:
    """Whether an issuer's key signed a certificate."""
    try:
        certificate.verify_directly_issued_by(issuer)
    except Exception:  # another name, another kind of key, or a signature that does not hold
        return False
    return True


def _name(certificate: Certificate) -> str:
    return certificate.subject.rfc4514_string() or "without a name"
