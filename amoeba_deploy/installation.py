"""What is installed: packages and their versions by what needs them, as the package's own metadata names it.

Nothing is imported. ``requirements`` groups packages by extra; the name of what every installation has is empty.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

from amoeba_deploy.backends import flow_names, load_backend

DISTRIBUTION = "amoeba-deploy"
_PACKAGE = re.compile(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)\s*(?:\[([^\]]*)\])?")
_EXTRA = re.compile(r"\bextra\s*==\s*['\"]([^'\"]+)")
_OF_DEVELOPERS = ("test", "lint", "docs")
_PLATFORM = re.compile(r"\bsys_platform\s*==\s*['\"]([^'\"]+)")


def plain(name: str) -> str:
    """A package's name as indexes spell it: small letters, and hyphens."""
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def requirements() -> dict[str, frozenset[str]]:
    """Names of the packages that each extra needs on this platform, those of the extras that it names included.

    Empty where the package runs from a folder without being installed.
    """
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        return {}
    return grouped(lines)


def grouped(lines: list[str]) -> dict[str, frozenset[str]]:
    """Packages by extra of the lines ``Requires-Dist`` of some metadata."""
    packages: dict[str, set[str]] = {"": set()}
    others: dict[str, set[str]] = {}
    for line in lines:
        extra, platform, found = _EXTRA.search(line), _PLATFORM.search(line), _PACKAGE.match(line)
        if found is None or (platform and platform[1] != sys.platform):
            continue
        group = plain(extra[1]) if extra else ""
        packages.setdefault(group, set())
        if plain(found[1]) == DISTRIBUTION:
            others.setdefault(group, set()).update(plain(name) for name in (found[2] or "").split(",") if name.strip())
        else:
            packages[group].add(plain(found[1]))
    return {group: frozenset(_all(group, packages, others, set())) for group in packages}


def _all(group: str, packages: dict[str, set[str]], others: dict[str, set[str]], seen: set[str]) -> set[str]:
    if group in seen:
        return set()
    seen.add(group)
    found = set(packages.get(group, ()))
    for other in others.get(group, ()):
        found |= _all(other, packages, others, seen)
    return found


def installed(package: str) -> str | None:
    """The version of a package, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def missing_of(extra: str, without: str = "") -> list[str]:
    """Packages of an extra that are not installed, sorted; those of another extra left out."""
    known = requirements()
    wanted = known.get(extra, frozenset()) - (known.get(without, frozenset()) if without else frozenset())
    return sorted(package for package in wanted if installed(package) is None)


def package_versions() -> dict[str, str]:
    """Versions of everything that the package or one of its extras names, as far as it is installed."""
    groups = [packages for extra, packages in requirements().items() if extra not in _OF_DEVELOPERS]
    names = sorted(set().union(*groups))
    found = {name: installed(name) for name in names}
    return {name: known for name, known in found.items() if known is not None}


def engine_versions() -> dict[str, dict[str, str]]:
    """Versions of each flow's engine, as far as it is installed; flows of others that cannot be loaded are left out."""
    found = {}
    for flow in flow_names():
        try:
            found[flow] = dict(load_backend(flow).toolchain().versions)
        except Exception:  # whatever another package's flow raises
            continue
    return found


_PACKAGE_OF = {"yaml": "pyyaml", "OpenSSL": "pyopenssl"}
"""Packages whose modules have another name."""


def extra_of(module: str) -> str | None:
    """The extra that brings a module, that of all builds before those of single engines; None where none does."""
    package = plain(_PACKAGE_OF.get(module.partition(".")[0], module.partition(".")[0]))
    known = requirements()
    order = sorted(
        known, key=lambda extra: (extra not in ("build", "deliver"), extra == "all", extra.startswith("device"), extra)
    )
    return next((extra for extra in order if package in known[extra] and extra not in ("", *_OF_DEVELOPERS)), None)
