"""What a signature is held against: public keys, and certificate authorities."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from amoeba_deploy.errors import BadInput, ToolchainMissing

SUFFIXES = (".pub", ".pem", ".crt", ".cer")
"""Files of a trust folder that are read; others, such as a README, are not."""


def require_signing() -> None:
    """Raise ToolchainMissing where the libraries that sign and verify are not installed."""
    from importlib.util import find_spec

    if find_spec("model_signing") is None or find_spec("OpenSSL") is None:
        raise ToolchainMissing(
            "signatures need model-signing and pyOpenSSL, which are not installed; run pip install "
            "'amoeba-deploy[deliver]'"
        )


@dataclass(frozen=True)
class Trust:
    """PEM files of elliptic-curve public keys, and of certificate authorities."""

    keys: tuple[Path, ...] = ()
    authorities: tuple[Path, ...] = ()

    @classmethod
    def of(cls, paths: Iterable[Path]) -> Trust:
        """The keys and authorities in some files, and in the folders among them.

        Raises:
            BadInput: a file is missing, or holds neither a public key nor a certificate.
        """
        keys: list[Path] = []
        authorities: list[Path] = []
        for path in paths:
            files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES) if path.is_dir() else [path]
            for file in files:
                (authorities if _is_certificate(file) else keys).append(file)
        return cls(tuple(keys), tuple(authorities))

    @classmethod
    def of_folder(cls, folder: Path) -> Trust:
        """The keys and authorities in a folder; none where there is no such folder."""
        return cls.of([folder]) if folder.is_dir() else cls()

    def __bool__(self) -> bool:
        return bool(self.keys or self.authorities)


def _is_certificate(file: Path) -> bool:
    """Whether a PEM file holds certificates; raises BadInput where it holds no public key either."""
    try:
        text = file.read_bytes()[: 1 << 20]
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror}); give a public key or a certificate") from None
    if b"-----BEGIN CERTIFICATE-----" in text:
        return True
    if b"PRIVATE KEY-----" in text:
        raise BadInput(
            f"{file}: is a private key, which stays with whoever signs; make its public key with 'openssl ec -in "
            f"{file} -pubout -out key.pub'"
        )
    if b"-----BEGIN PUBLIC KEY-----" not in text:
        raise BadInput(f"{file}: is neither a public key nor a certificate in PEM")
    return False
