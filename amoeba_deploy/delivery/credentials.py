"""Who one is at a registry: what ``docker login`` wrote, in $DOCKER_CONFIG or ~/.docker, or Docker's helpers know."""

from __future__ import annotations

import base64
import binascii
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import read_json_object

HELPER_SECONDS = 30
DOCKER_HUB = "https://index.docker.io/v1/"


def docker_config() -> Path:
    """The file that ``docker login`` writes."""
    folder = os.environ.get("DOCKER_CONFIG")
    return (Path(folder) if folder else Path.home() / ".docker") / "config.json"


def credentials_for(host: str) -> tuple[str, str] | None:
    """User and password for a registry, or None where nothing is known of it.

    Raises:
        BadInput: the file, or what it says of this host, is damaged.
    """
    file = docker_config()
    if not file.is_file():
        return None
    config = read_json_object(file)
    names = _names(host)
    helpers = config.get("credHelpers")
    own = {name: helpers[name] for name in names if name in helpers} if isinstance(helpers, dict) else {}
    for name, helper in own.items():
        return _ask(str(helper), name)
    if isinstance(config.get("credsStore"), str):
        for name in names:
            found = _ask(config["credsStore"], name)
            if found:
                return found
    auths = config.get("auths")
    entries = [auths[name] for name in names if name in auths] if isinstance(auths, dict) else []
    return next((_entry(entry, host, file) for entry in entries if entry), None)


def _names(host: str) -> list[str]:
    """Under which names a registry can stand in the file."""
    if host in ("docker.io", "index.docker.io"):
        return [DOCKER_HUB, "index.docker.io", "docker.io"]
    return [host, f"https://{host}", f"http://{host}", f"https://{host}/v1/", f"https://{host}/v2/"]


def _entry(entry: Any, host: str, file: Path) -> tuple[str, str] | None:
    """User and password in an entry of ``auths``."""
    encoded = entry.get("auth") if isinstance(entry, dict) else None
    if not encoded:
        return None
    try:
        user, colon, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (TypeError, binascii.Error, UnicodeDecodeError):
        colon = ""
    if not colon:
        raise BadInput(f"{file}: what it holds for {host} cannot be read; run 'docker login {host}' again") from None
    return user, password.rstrip("\0")


def _ask(helper: str, name: str) -> tuple[str, str] | None:
    """What Docker's credential helper says; None where it knows nothing or is not installed."""
    try:
        done = subprocess.run(
            [f"docker-credential-{helper}", "get"],
            input=name,
            capture_output=True,
            text=True,
            check=True,
            timeout=HELPER_SECONDS,
        )
        answer = json.loads(done.stdout)
        user, secret = answer["Username"], answer["Secret"]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        return None
    if user == "<token>" or not isinstance(user, str) or not isinstance(secret, str):
        return None  # an OAuth2 refresh token, for which there is no password
    return user, secret
