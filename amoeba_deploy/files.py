"""Files and folders that appear whole or not at all, and their digests."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from amoeba_deploy.errors import AmoebaError, BadInput


def sha256_of(file: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while part := stream.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def folder_bytes(folder: Path) -> int:
    """The size of all files below a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def copy_tree(source: Path, target: Path) -> None:
    """Copy the files below a folder into another; raises OSError, with the file, at the first that cannot be copied."""
    for root, _, files in os.walk(source):
        folder = target / Path(root).relative_to(source)
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            shutil.copyfile(Path(root) / name, folder / name)


def json_text(value: Any) -> str:
    """JSON as all files of the project hold it: keys in the order given, two spaces, one line feed at the end."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write one JSON file in the project's form."""
    path.write_text(json_text(value), encoding="utf-8")


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON file that others' tools wrote; raises BadInput where it is missing or holds no object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{file}: is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise BadInput(f"{file}: is not a JSON object")
    return value


def read_json(path: Path, form: str) -> dict[str, Any]:
    """A JSON file that names its format, such as ``amoeba.plan/1``.

    Raises:
        BadInput: the file is missing, is no JSON object, or is of another format or major version.
    """
    value = read_json_object(path)
    if value.get("format") != form:
        raise BadInput(
            f"{path}: has format {value.get('format')!r} where {form!r} was expected; this version reads no other"
        )
    return value


WRITTEN_BY_US = ("manifest.json", "subnet.json", "amoeba.json", "selection.json", "kit.json")
"""One of these lies in every folder that Amoeba writes; ``--force`` replaces no other folder that holds anything."""


def check_target(target: Path, force: bool, inputs: Sequence[Path] = ()) -> None:
    """Raise BadInput where an output folder may not be written; for commands that work long before they write."""
    target = target.absolute()
    if not target.exists():
        return
    if not target.is_dir():
        raise BadInput(f"{target}: is a file, and a folder belongs there; choose another output")
    if not force:
        raise BadInput(f"{target}: exists already; choose another output or add --force to replace it")
    real = target.resolve()
    for needed in (Path.cwd(), *(path.resolve() for path in inputs)):
        if needed == real or real in needed.parents:
            raise BadInput(f"{target}: holds {needed}, which this command needs; choose another output")
    if any(target.iterdir()) and not any((target / name).is_file() for name in WRITTEN_BY_US):
        raise BadInput(f"{target}: was not written by amoeba, so --force does not replace it; choose another output")


def require_inside(folder: Path, files: Iterable[Path]) -> None:
    """Raise BadInput where a file is a link out of its folder, whose content could be anything on this machine.

    The hub's cache is built of links: a snapshot's files lie among the blobs of the same repository.
    """
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    for file in files:
        if not file.is_symlink():
            continue
        found = file.resolve()
        if not any(place in found.parents for place in homes):
            raise BadInput(f"{file}: is a link to {found}, outside its folder; put the file itself there")


_PARTS = ".part", ".old"


def _remove_abandoned(target: Path) -> None:
    """Remove what killed commands left beside a target: temporary names whose owner holds no lock any more."""
    for suffix in _PARTS if target.exists() else _PARTS[:1]:  # without its target an .old is all that is left of it
        for left in target.parent.glob(f".{target.name}.????????{suffix}"):
            try:
                with held(left):
                    shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
            except OSError:
                continue


@contextmanager
def held(path: Path, needed: bool = True) -> Iterator[None]:
    """Hold a lock on a temporary file or folder, which ends with the process.

    Raises OSError where it is held already, or where the file system has no locks and one is ``needed``.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if needed:
                raise
        yield
    finally:
        os.close(descriptor)


@contextmanager
def lock_file(file: Path, wait: bool = True) -> Iterator[None]:
    """Hold the lock of a file that is there for that alone, and stays; it and its folder are made if need be.

    Raises OSError where it cannot be made or locked, and BlockingIOError where another holds it and none is to wait.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(target: Path, force: bool = False, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """A temporary folder beside ``target`` that takes its name when the block ends well, and vanishes otherwise.

    ``force`` replaces a folder that Amoeba wrote, unless it is or holds one of ``inputs`` or the working folder.

    Raises:
        BadInput: the target exists and may not be replaced, or the disk refuses.
    """
    target = target.absolute()
    check_target(target, force, inputs)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise BadInput(f"{target}: cannot be written ({error.strerror})") from None
    try:
        work.chmod(0o755)
        with held(work, needed=False):
            yield work
            _replace(work, target)
    except OSError as error:
        raise BadInput(f"{target}: was not written: {system_refusal(error)}") from error
    except Exception as error:
        # Engines' own writers report a full disk in words of their own.
        if not isinstance(error, AmoebaError) and (full := _full_disk(work)):
            raise BadInput(
                f"{target}: was not written: no space left at {full} ({error}); free some there, or choose another "
                f"output"
            ) from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


FULL_BYTES = 2**16
"""A disk with less free than this is full."""


def _full_disk(work: Path) -> Path | None:
    places = (work.parent, Path(tempfile.gettempdir()))
    return next((place for place in places if shutil.disk_usage(place).free < FULL_BYTES), None)


def system_refusal(error: OSError) -> str:
    """What the system refused, at which file, and what to do, as half a sentence."""
    advice = "look at its folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free some there, or choose another output"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        advice = "check its permissions, or choose another path"
    elif error.errno == errno.ENOENT:
        advice = "check its name"
    where = f" at {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}; {advice}"


def _replace(work: Path, target: Path) -> None:
    if not target.exists():
        work.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    target.rename(old / target.name)
    try:
        work.rename(target)
    except OSError:
        (old / target.name).rename(target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def check_new_file(target: Path, force: bool) -> None:
    """Raise BadInput where an output file may not be written; for commands that work long before they write."""
    if target.is_dir():
        raise BadInput(f"{target}: is a folder, and a file belongs there; choose another output")
    if target.exists() and not force:
        raise BadInput(f"{target}: exists already; choose another output or add --force to replace it")


@contextmanager
def whole_file(target: Path, force: bool = False) -> Iterator[Path]:
    """As ``whole_folder``, for one file: the path to write to, renamed to ``target`` when the block ends well."""
    target = target.absolute()
    check_new_file(target, force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(target)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        os.close(handle)
    except OSError as error:
        raise BadInput(f"{target}: cannot be written ({error.strerror})") from None
    work = Path(name)
    try:
        with held(work, needed=False):
            yield work
            work.chmod(0o644)
            work.replace(target)
    except OSError as error:
        raise BadInput(f"{target}: was not written: {system_refusal(error)}") from error
    finally:
        work.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where measurements are kept: ``$AMOEBA_CACHE``, else the platform's user cache."""
    if os.environ.get("AMOEBA_CACHE"):
        return Path(os.environ["AMOEBA_CACHE"])
    from platformdirs import user_cache_dir

    return Path(user_cache_dir("amoeba"))
