"""What a signature file says: the digests that it speaks of, and which key or certificates it names.

``model.sig`` is a Sigstore bundle (https://docs.sigstore.dev/about/bundle/) with an in-toto statement in a DSSE
envelope. Nothing here is proven until the signature is verified.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.bundle import SIGNATURE
from amoeba_deploy.delivery.trust import require_signing
from amoeba_deploy.errors import BadInput, VerificationFailed

SIGNATURE_LIMIT = 32 * 2**20
"""Bytes of a signature that are read at most: a hundred thousand files."""


@dataclass(frozen=True)
class Statement:
    """sha256 by file, the certificates (DER) from the signer's on, or the hint of the key where there are none."""

    digests: dict[str, str]
    certificates: tuple[bytes, ...]
    key_hint: str | None


def key_hint(public_key: Path) -> str:
    """What model-signing writes of a key: the sha256 of its PEM; raises BadInput where it cannot be read."""
    from cryptography.hazmat.primitives import serialization

    try:
        key = serialization.load_pem_public_key(public_key.read_bytes())
    except Exception as error:  # files that are damaged in many ways
        raise BadInput(f"{public_key}: is no public key in PEM ({error}); export it again") from None
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(pem).hexdigest()


def read_statement(folder: Path) -> Statement:
    """The statement of a signed bundle.

    A file that says the same in other bytes than model-signing writes is refused: what is not covered by the signature
    must not be open to change either.

    Raises:
        VerificationFailed: there is no signature, or it is damaged.
    """
    file = folder / SIGNATURE
    if not file.is_file():
        raise VerificationFailed(f"{folder}: is not signed; sign it with 'amoeba bundle sign', or get a signed one")
    if file.stat().st_size > SIGNATURE_LIMIT:
        raise VerificationFailed(f"{file}: is larger than any signature; get the bundle again")
    from sigstore_models.bundle.v1 import Bundle

    try:
        text = file.read_text(encoding="utf-8")
        value = json.loads(text)
        same = Bundle.from_dict(value).to_json() == text
        material = value["verificationMaterial"]
        statement = json.loads(base64.b64decode(value["dsseEnvelope"]["payload"], validate=True))
        digests = _digests(statement)
        chain = material.get("x509CertificateChain", {}).get("certificates", [])
        certificates = tuple(base64.b64decode(entry["rawBytes"], validate=True) for entry in chain)
        hint = None if certificates else str(material["publicKey"]["hint"])
    except Exception:  # anything may stand in the file
        same = False
    if not same:
        raise VerificationFailed(f"{file}: is damaged, or no signature of 'amoeba bundle sign'; get the bundle again")
    return Statement(digests, certificates, hint)


def check_statement(folder: Path, digests: Mapping[str, str]) -> None:
    """Check that a bundle's signature, if it has one, speaks of its files as they are; by whom it is, is not asked.

    ``digests`` are the sha256 of all its files, which were just computed.

    Raises:
        VerificationFailed: it is damaged, or a file was changed, added or removed after signing.
    """
    if not (folder / SIGNATURE).is_file():
        return
    require_signing()
    signed, found = read_statement(folder).digests, {k: v for k, v in digests.items() if k != SIGNATURE}
    if signed != found:
        first = min(name for name in {*signed, *found} if signed.get(name) != found.get(name))
        what = "missing" if first not in found else "added" if first not in signed else "changed"
        raise VerificationFailed(
            f"{folder}: is not what was signed: {first} is {what}; sign it again with 'amoeba bundle sign'"
        )


def _digests(statement: Any) -> dict[str, str]:
    found = {str(entry["name"]): str(entry["digest"]) for entry in statement["predicate"]["resources"]}
    if {entry["algorithm"] for entry in statement["predicate"]["resources"]} - {"sha256"}:
        raise ValueError("digests of another kind")
    return found
