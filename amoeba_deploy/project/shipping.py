"""After a build: signing bundles and pushing them to a registry, as a project's targets say."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from amoeba_deploy.bundle import SIGNATURE
from amoeba_deploy.errors import BadInput
from amoeba_deploy.progress import Progress
from amoeba_deploy.project.config import Loaded
from amoeba_deploy.project.result import Result

ENVIRONMENT = "env:"
PASSWORD = "AMOEBA_KEY_PASSWORD"


@contextmanager
def private_key(loaded: Loaded, reference: str) -> Iterator[Path]:
    """The file of a key: a path, or ``env:NAME`` of a variable that holds a path or the PEM itself.

    Raises:
        BadInput: the variable is not set.
    """
    if not reference.startswith(ENVIRONMENT):
        yield loaded.path(reference)
        return
    name = reference.removeprefix(ENVIRONMENT)
    value = os.environ.get(name, "").strip()
    if not value:
        raise BadInput(f"{loaded.file}: the key is to be in the environment variable {name}, which is not set")
    if not value.startswith("-----BEGIN"):
        yield Path(value)
        return
    with tempfile.TemporaryDirectory(prefix="amoeba-key-") as folder:
        file = Path(folder, "key.pem")
        file.touch(0o600)
        file.write_text(value + "\n", encoding="utf-8")
        yield file


def signed(loaded: Loaded, result: Result, serial: int | None) -> Result:
    """The result with its bundle signed, unless it was already, or its target names no key."""
    key = loaded.targets[result.name].private_key
    if key is None or not result.good or (result.output / SIGNATURE).is_file():
        return result
    from amoeba_deploy.delivery.signing import sign

    try:
        with private_key(loaded, key) as file:
            release = sign(result.output, file, serial=serial, password=os.environ.get(PASSWORD) or None)
    except Exception as error:  # one target's failure is its own
        return result.failed(error)
    return replace(result, signed=release.serial)


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
