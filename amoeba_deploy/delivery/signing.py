"""Signatures of bundles, by OpenSSF's model-signing: an in-toto statement of every file's sha256 in a Sigstore bundle.

All files of a bundle are signed but ``model.sig`` itself, so measurements and the release number too. Keys are
elliptic-curve pairs, bare or with a certificate. Nothing is asked of any server.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.bundle import RELEASE, SIGNATURE, bundle_files, verify_files
from amoeba_deploy.delivery.certificates import Fit, check_chain, check_signing
from amoeba_deploy.delivery.keys import PASSWORD, load_private_key
from amoeba_deploy.delivery.release import Release, new_release, read_release, write_release
from amoeba_deploy.delivery.statement import key_hint, read_statement
from amoeba_deploy.delivery.trust import Trust, require_signing
from amoeba_deploy.errors import BadInput, VerificationFailed

__all__ = ["Certificate", "Release", "Signed", "Trust", "read_release", "sign", "verify_signature"]


@dataclass(frozen=True)
class Certificate:
    """The certificate of a private key, and those between it and the authority that devices trust."""

    file: Path
    chain: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Signed:
    """A signature that holds: whose key or certificate it is by, and the sha256 of every file, found equal just now."""

    signer: str
    digests: dict[str, str]


def sign(
    folder: Path,
    private_key: Path,
    *,
    certificate: Certificate | None = None,
    serial: int | None = None,
    password: str | None = None,
) -> Release:
    """Sign a whole bundle, whose files must be those of its manifest; a signature that is there is replaced.

    Args:
        folder: the bundle.
        private_key: a PEM file of an elliptic-curve key (P-256, P-384 or P-521).
        certificate: of that key; left out, devices must know the public key itself.
        serial: the release number; seconds since 1970 where left out.
        password: of an encrypted key.

    Raises:
        BadInput: the key or the certificate cannot be used.
        VerificationFailed: the bundle is not whole.
    """
    require_signing()
    verify_files(folder)
    signer = _signer(private_key, certificate, password)
    release = new_release(serial)
    part = folder / f".{SIGNATURE}.part"
    try:
        (folder / SIGNATURE).unlink(missing_ok=True)
        write_release(folder, release)
        signer.sign(folder, part)
        part.replace(folder / SIGNATURE)
    except BaseException:
        for name in (part.name, RELEASE):
            (folder / name).unlink(missing_ok=True)
        raise
    return release


def _signer(private_key: Path, certificate: Certificate | None, password: str | None) -> Any:
    """model-signing's configuration to sign with a key; raises BadInput where the key or certificate is of no use."""
    from model_signing import hashing, signing

    config = signing.Config().set_hashing_config(hashing.Config().set_ignored_paths(paths=[SIGNATURE]))
    if certificate is None:
        load_private_key(private_key, password)
    else:
        check_certificate(private_key, certificate, password)
    try:
        if certificate is None:
            return config.use_elliptic_key_signer(
                private_key=private_key,
                password=password.encode() if password else None,  # what the key's reader takes, whatever it says
            )
        # The library wants a chain that is not empty.
        chain = certificate.chain or (certificate.file,)
        return config.use_certificate_signer(
            private_key=private_key, signing_certificate=certificate.file, certificate_chain=chain
        )
    except Exception as error:  # whatever the cryptography library says of a file that seemed right
        raise BadInput(f"{private_key}: cannot sign ({_line(error)}); give another key or certificate") from None


def check_certificate(private_key: Path, certificate: Certificate, password: str | None = None) -> Fit:
    """Until when a key's certificate is valid, and whom devices must trust; raises BadInput where it cannot sign."""
    for file in (certificate.file, *certificate.chain):
        if not file.is_file():
            raise BadInput(f"{file}: is no file; give the certificate that signs in PEM")
    if private_key.is_file() and b"ENCRYPTED" in private_key.read_bytes():
        raise BadInput(
            f"{private_key}: a key with a certificate cannot be encrypted; decrypt it with 'openssl ec -in "
            f"{private_key} -out plain.pem', and sign with that and without {PASSWORD}"
        )
    key = load_private_key(private_key, password)
    return check_signing(private_key, key.public_key(), certificate.file, certificate.chain)


def verify_signature(folder: Path, trust: Trust) -> Signed:
    """Check that a bundle was signed by a trusted key, and that every file is as it was then.

    Raises:
        VerificationFailed: it is not signed, by nobody who is trusted, by a certificate that is not valid now, or a
            file differs, is missing or was added.
        BadInput: no key is trusted, or one cannot be read.
    """
    require_signing()
    folder = folder.resolve()  # the library refuses a folder that is a link
    if not trust:
        raise BadInput("no key is trusted; give a public key that signatures are held against")
    bundle_files(folder)  # refuses links, which the library speaks of in words of its own
    statement = read_statement(folder)
    if statement.certificates:
        signer = check_chain(statement.certificates, trust.authorities, f"{folder / SIGNATURE}")
    else:
        signer = next((key.name for key in trust.keys if key_hint(key) == statement.key_hint), "")
        trust = Trust(tuple(key for key in trust.keys if key.name == signer))
    if not signer:
        raise VerificationFailed(f"{folder}: is signed by none of the trusted keys; get it from who signs for them")
    _verify(folder, trust, by_certificate=bool(statement.certificates))
    return Signed(signer, statement.digests)


def _verify(folder: Path, trust: Trust, by_certificate: bool) -> None:
    """Let model-signing check the signature, and every file against it."""
    from model_signing import verifying

    config = verifying.Config()
    try:
        with _quiet():
            if by_certificate:
                config.use_certificate_verifier(certificate_chain=trust.authorities)
            else:
                config.use_elliptic_key_verifier(public_key=trust.keys[0])
            config.verify(folder, folder / SIGNATURE)
    except Exception as error:  # the library raises what the cryptography below it does, too
        said = _line(error)
        if said.startswith("Signature mismatch"):
            raise VerificationFailed(
                f"{folder}: is not what was signed: {_changes(said)}; get the bundle again"
            ) from None
        raise VerificationFailed(
            f"{folder / SIGNATURE}: does not hold ({said}); get the bundle again from who signs for the trusted keys"
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's remarks on certificates, which say again what its errors say."""
    logger = logging.getLogger("model_signing")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _changes(said: str) -> str:
    """Which files the library found changed, added or missing, in few words."""
    changed = re.findall(r"Hash mismatch for \\*'(.+?)\\*': Expected", said)
    found = [f"{name} is changed" for name in changed]
    for kind, word in (("Extra files found", "added"), ("Missing files", "missing")):
        found += [f"{names} is {word}" for names in re.findall(rf"{kind} in model '.*?': (.+?)[\"']", said)]
    return ", ".join(found) or said


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
