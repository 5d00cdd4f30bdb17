"""After a build: signing bundles and pushing them to a registry, as a project's targets say."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from amoeba_deploy.bundle import SIGNATURE
from amoeba_deploy.delivery.keys import PASSWORD, key_file, load_private_key
from amoeba_deploy.delivery.trust import require_signing
from amoeba_deploy.errors import AmoebaError, BadInput
from amoeba_deploy.progress import Progress
from amoeba_deploy.project.config import Loaded
from amoeba_deploy.project.result import Result


def signed(loaded: Loaded, result: Result, serial: int | None) -> Result:
    """The result with its bundle signed, unless it holds such a signature, or its target names no key."""
    target = loaded.targets[result.name]
    if target.private_key is None or not result.good:
        return result
    from amoeba_deploy.delivery.signing import Certificate, sign

    own = None
    if target.certificate is not None:
        own = Certificate(loaded.path(target.certificate), tuple(loaded.path(file) for file in target.chain))
    password = os.environ.get(PASSWORD) or None
    try:
        with key_file(target.private_key, loaded.folder) as file:
            if own is None and _is_signed_by(result.output, file, password, serial):
                return result
            release = sign(result.output, file, certificate=own, serial=serial, password=password)
    except Exception as error:  # one target's failure is its own
        return result.failed(error)
    return replace(result, signed=release.serial)


def _is_signed_by(bundle: Path, key: Path, password: str | None, serial: int | None) -> bool:
    """Whether a bundle holds a signature by a key, with a serial where one is asked for."""
    if not (bundle / SIGNATURE).is_file():
        return False
    from cryptography.hazmat.primitives import serialization

    from amoeba_deploy.delivery.signing import Trust, read_release, verify_signature

    pem, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    try:
        secret = load_private_key(key, password)
        with tempfile.NamedTemporaryFile(prefix="amoeba-key-", suffix=".pub") as public:
            public.write(secret.public_key().public_bytes(pem, form))
            public.flush()
            verify_signature(bundle, Trust((Path(public.name),)))
        release = read_release(bundle)
    except (AmoebaError, OSError):
        return False  # signing says what is wrong with a key
    return release is not None and serial in (None, release.serial)


def check_shipping(loaded: Loaded, names: Sequence[str], sign: bool, push: bool, tag: str | None) -> list[str]:
    """What can be said before anything is built; returns remarks on targets that are not signed or pushed.

    Raises:
        BadInput: a key is not there, a reference is none, or no target names a key or a registry.
    """
    remarks = []
    for wanted, entry, word in ((sign, "private_key", "signed"), (push, "registry", "pushed")):
        lacking = [name for name in names if wanted and getattr(loaded.targets[name], entry) is None]
        spelt = entry.replace("_", "-")
        if names and len(lacking) == len(names):
            raise BadInput(
                f"{loaded.file}: nothing would be {word}, no target names a {spelt}; add it, or leave that out"
            )
        remarks += [f"note: {name} is not {word}, it names no {spelt}" for name in lacking]
    for name in names:
        target = loaded.targets[name]
        if sign and target.private_key is not None:
            require_signing()
            try:
                with key_file(target.private_key, loaded.folder) as file:
                    load_private_key(file, os.environ.get(PASSWORD) or None)
            except BadInput as error:
                raise BadInput(f"{loaded.file}: private-key of [targets.{name}]: {error}") from None
        if push and target.registry is not None:
            from amoeba_deploy.delivery.reference import Reference

            try:
                Reference.parse(_tagged(target.registry, tag))
            except BadInput as error:
                raise BadInput(f"{loaded.file}: registry of [targets.{name}]: {error}") from None
    return remarks


def pushed(loaded: Loaded, result: Result, tag: str | None, plain_http: bool, progress: Progress) -> Result:
    """The result with its bundle pushed, unless its target names no registry."""
    reference = loaded.targets[result.name].registry
    if reference is None or not result.good:
        return result
    from amoeba_deploy.delivery.registry import push

    try:
        done = push(result.output, _tagged(reference, tag), progress=progress, plain_http=plain_http)
    except Exception as error:  # one target's failure is its own
        return result.failed(error)
    return replace(result, pushed=asdict(done))


def _tagged(reference: str, tag: str | None) -> str:
    """A reference with another tag."""
    if tag is None:
        return reference
    return re.sub(r"(:[^:/@]+)?(@.*)?$", "", reference) + f":{tag}"
