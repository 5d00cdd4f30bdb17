"""Names of bundles in registries: ``host[:port]/name[:tag|@sha256:...]``."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from amoeba_deploy.errors import BadInput

# The grammar of the OCI distribution specification.
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
NAME = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
DEFAULT_TAG = "latest"
MAX_NAME = 255
SCHEMES = ("https://", "http://", "oci://", "docker://")
"""What addresses begin with, and references do not."""


def names_host(text: str) -> bool:
    """Whether a reference begins with what can be a registry's host, and not with a repository's name."""
    host, slash, _ = text.partition("/")
    return bool(slash) and ("." in host or ":" in host or host == "localhost")


def is_digest(value: object) -> bool:
    """Whether a value is ``sha256:`` and 64 hex digits."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


@dataclass(frozen=True)
class Reference:
    """A registry's host with its port, the repository's name there, and a tag, a digest or both."""

    host: str
    name: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read a reference; raises BadInput where it is none. A host is needed: no registry is the default."""
        scheme = next((each for each in SCHEMES if text.startswith(each)), None)
        if scheme is not None:
            raise BadInput(f"{text!r}: leave out {scheme}, and write {text.removeprefix(scheme)!r}")
        host, _, rest = text.partition("/")
        rest, at, digest = rest.partition("@")
        name, colon, tag = rest.partition(":")
        if not names_host(text) or not _HOST.fullmatch(host):
            raise BadInput(
                f"{text!r} names no registry; write its host, a name and a tag, such as "
                f"registry.example:5000/team/model:1"
            )
        if not NAME.fullmatch(name) or len(name) > MAX_NAME:
            raise BadInput(
                f"{text!r}: {name!r} cannot be a repository's name; write small letters, digits, '.', '_', '-' and '/'"
            )
        if colon and not _TAG.fullmatch(tag):
            raise BadInput(f"{text!r}: {tag!r} cannot be a tag; write letters, digits, '.', '_' and '-'")
        if at and not is_digest(digest):
            raise BadInput(f"{text!r}: {digest!r} is no digest; write sha256: and 64 hex digits in small letters")
        return cls(host, name, tag or None, digest or None)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.host}/{self.name}{tag}" + (f"@{self.digest}" if self.digest else "")

    @property
    def wanted(self) -> str:
        """What a registry is asked for: the digest, else the tag."""
        return self.digest or self.tag or DEFAULT_TAG

    @property
    def address(self) -> str:
        """The host that answers; Docker Hub's is not the one in its references."""
        return "registry-1.docker.io" if self.host in ("docker.io", "index.docker.io") else self.host


def is_loopback(host: str) -> bool:
    """Whether a host, with a port or without, is this machine itself."""
    name = re.sub(r":[0-9]+$", "", host).strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
