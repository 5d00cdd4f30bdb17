"""All that can be checked of a bundle: its files, form and signature, and that its engine gives what it should."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amoeba_deploy.bundle import SIGNATURE, check_provenance, run_selftest, verify_files
from amoeba_deploy.delivery.release import read_release
from amoeba_deploy.delivery.trust import Trust
from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.manifest import check_manifest
from amoeba_deploy.progress import Progress
from amoeba_deploy.selftest import read_selftest


@dataclass(frozen=True)
class Checked:
    """What was found of a bundle that is whole."""

    path: Path
    files: int
    signed: bool
    """Whether there is a signature."""
    signer: str | None
    """Whose signature it is; None where it was not held against any key."""
    serial: int | None
    """Of its release; nothing vouches for it where the signature was not held against a key."""
    selftest_tokens: int | None
    """Tokens that the engine was compared on; None where it cannot run here."""
    not_run: str | None
    """Why it cannot."""

    def to_json(self) -> dict[str, Any]:
        """The object that ``bundle verify --json`` prints."""
        return {
            "path": str(self.path),
            "files": self.files,
            "signed": self.signed,
            "signer": self.signer,
            "serial": self.serial,
            "selftest_tokens": self.selftest_tokens,
            "not_run": self.not_run,
        }

    def text(self) -> str:
        """The same for people."""
        found = [f"{self.files} files intact"]
        if self.signer:
            found.append(f"signed by {self.signer} as release {self.serial}")
        elif self.signed:
            release = f"release {self.serial}, " if self.serial is not None else ""
            found.append(f"{release}its signature was not checked (give --public-key)")
        if self.not_run is None:
            found.append(f"{self.selftest_tokens} self-test tokens equal")
        else:
            found.append(f"self-test not run: {self.not_run}")
        return f"{self.path}: {', '.join(found)}"


def check_bundle(folder: Path, trusted: Sequence[Path], progress: Progress) -> Checked:
    """Check a bundle; ``trusted`` are keys, authorities and folders of them, one of which must have signed it.

    Raises:
        VerificationFailed: a file, the signature or the engine is not what it should be.
        BadInput: the folder is no bundle, or its manifest is not of the form.
    """
    signer = None
    if trusted:
        from amoeba_deploy.delivery.signing import verify_signature

        trust = Trust.of(trusted)
        if not trust:
            raise BadInput(f"{trusted[0]}: holds no public key or certificate (.pub, .pem, .crt); put one there")
        signed = verify_signature(folder, trust)
        signer = signed.signer
        manifest = verify_files(folder, signed.digests)
    else:
        manifest = verify_files(folder)
    release = read_release(folder)
    check_manifest(manifest, folder)
    read_selftest(folder)
    progress.say("files intact, running the self-test")
    count, reason = None, None
    try:
        count = run_selftest(folder, manifest)
    except ToolchainMissing as error:
        reason = str(error).removeprefix(f"{folder}: ")
    check_provenance(folder)
    serial = release.serial if release else None
    return Checked(folder, len(manifest["files"]), (folder / SIGNATURE).is_file(), signer, serial, count, reason)
