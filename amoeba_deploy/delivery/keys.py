"""Private keys that sign: where they are found, and which of them can.

A key is a PEM file of an elliptic curve. In a build that runs elsewhere it is a secret in a variable: ``env:NAME``.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from amoeba_deploy.errors import AmoebaError, BadInput

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

ENVIRONMENT = "env:"
PASSWORD = "AMOEBA_KEY_PASSWORD"
CURVES = {"secp256r1": "P-256", "secp384r1": "P-384", "secp521r1": "P-521"}
HOW = "make one with 'openssl ecparam -name prime256v1 -genkey -noout -out key.pem'"


@contextmanager
def key_file(reference: str, folder: Path) -> Iterator[Path]:
    """The file of a key: a path, relative to a folder, or ``env:NAME`` of a variable with a path or the PEM itself.

    A PEM is in a file of its own for as long as this lasts, and errors name the variable instead.

    Raises:
        BadInput: the variable is not set.
    """
    if not reference.startswith(ENVIRONMENT):
        yield folder / Path(reference).expanduser()
        return
    name = reference.removeprefix(ENVIRONMENT)
    value = os.environ.get(name, "").strip()
    if not value:
        raise BadInput(
            f"{reference}: the environment variable {name} is not set; put the path of a key there, or its PEM"
        )
    if not value.startswith("-----BEGIN"):
        yield Path(value)
        return
    with tempfile.TemporaryDirectory(prefix="amoeba-key-") as place:
        file = Path(place, "key.pem")
        file.touch(0o600)
        file.write_text(value + "\n", encoding="utf-8")
        try:
            yield file
        except AmoebaError as error:
            raise type(error)(str(error).replace(str(file), reference)) from None


def load_private_key(file: Path, password: str | None) -> EllipticCurvePrivateKey:
    """The key in a PEM file; raises BadInput where it cannot sign."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    if not file.is_file():
        raise BadInput(f"{file}: is no file; give the key that signs in PEM")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror}); check its permissions") from None
    try:
        key = serialization.load_pem_private_key(data, password.encode() if password else None)
    except Exception as error:  # whatever the cryptography library says of a wrong file
        raise BadInput(_refusal(file, data, password, error)) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise BadInput(f"{file}: is {_kind(key)} key; signing takes an elliptic-curve key ({_curves()}): {HOW}")
    if key.curve.name not in CURVES:
        raise BadInput(f"{file}: is a key of the curve {key.curve.name}; signing takes one of {_curves()}: {HOW}")
    return key


def _refusal(file: Path, data: bytes, password: str | None, error: Exception) -> str:
    """Why a key cannot be read."""
    said = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, TypeError) and password is None:
        return f"{file}: is encrypted; put its password into {PASSWORD}"
    if isinstance(error, TypeError):
        return f"{file}: is not encrypted, and {PASSWORD} is set; unset it, or give the key that it is of"
    if password is not None and "ncorrect password" in said:
        return f"{file}: the password in {PASSWORD} is not that of this key; set the right one"
    if b"PRIVATE KEY-----" not in data:
        return f"{file}: holds no private key in PEM; {HOW}"
    return f"{file}: is damaged or no key that signs ({said}); {HOW}"


def _curves() -> str:
    return ", ".join(CURVES.values())


def _kind(key: object) -> str:
    """An RSA, a DSA, an Ed25519, ..."""
    name = type(key).__name__.removesuffix("PrivateKey").lstrip("_")
    return f"{'a' if name.startswith('D') else 'an'} {name}"
