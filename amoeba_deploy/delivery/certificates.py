"""Certificates of who signs: from the signer's own to an authority that is trusted, all valid now.

model-signing checks a chain as of the day on which the signer's certificate began, so one that expired passes there.
"""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Sequence
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
    now = datetime.datetime.now(datetime.UTC)
    for one in (*certificates, issuer):
        if one.not_valid_after_utc < now:
            raise VerificationFailed(
                f"{where}: the certificate '{_name(one)}' expired on {one.not_valid_after_utc:%Y-%m-%d}; have the "
                f"bundle signed again with a valid one"
            )
        if one.not_valid_before_utc > now:
            raise VerificationFailed(
                f"{where}: the certificate '{_name(one)}' is valid from {one.not_valid_before_utc:%Y-%m-%d} only; look "
                f"at this machine's clock"
            )
    return _name(certificates[0])


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
