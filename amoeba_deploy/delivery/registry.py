"""Bundles in OCI registries: ``push`` and ``pull``.

A registry keeps every file once, by its digest: what it has is not sent again, and what two bundles share, such as the
tokenizer of two shapes of one checkpoint, is sent with the first alone. A pull that breaks goes on where it broke.
"""

from __future__ import annotations

import io
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urljoin

from amoeba_deploy.bundle import verify_files
from amoeba_deploy.delivery import known_blobs, media_types
from amoeba_deploy.delivery.artifact import Blob, Layer, artifact_of, digest_of, read_document, read_layers
from amoeba_deploy.delivery.connection import Body, Connection, Dropped
from amoeba_deploy.delivery.download import Download, OnBytes, copy_checked, keep_only, staging_folder
from amoeba_deploy.delivery.reference import DEFAULT_TAG, Reference, is_digest
from amoeba_deploy.errors import AmoebaError, BadInput, VerificationFailed
from amoeba_deploy.files import check_target, sha256_of, system_refusal, whole_folder
from amoeba_deploy.progress import Progress

AT_ONCE = 4
"""Blobs on their way at a time."""
SPARE_BYTES = 1 << 20
"""What must be left on a disk beside what is pulled."""

Way = Literal["sent", "mounted", "present"]


@dataclass(frozen=True)
class Pushed:
    """What a push did: layers and bytes that went to the registry, that it took from another repository of its own
    (mounted), and that it had; equal layers are sent once and had from then on."""

    reference: str
    digest: str
    layers_sent: int
    layers_mounted: int
    layers_present: int
    bytes_sent: int
    bytes_mounted: int
    bytes_present: int


@dataclass(frozen=True)
class Pulled:
    """What a pull did; ``unchanged`` where the output was that bundle already. ``bytes_kept`` were here before: from
    a pull that broke, or in files to take from. Files that are equal are fetched once."""

    reference: str
    digest: str
    path: Path
    files: int
    bytes: int
    bytes_fetched: int
    bytes_kept: int
    unchanged: bool


def push(
    folder: Path,
    reference: Reference | str,
    *,
    progress: Progress,
    plain_http: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> Pushed:
    """Push a bundle; the tag, ``latest`` where none is given, names it only when all of it is there.

    Args:
        folder: the bundle.
        reference: where it goes; with a digest it must be that of the bundle.
        progress: told of what is done.
        plain_http: speak HTTP without TLS to a host that is not this machine.
        sleep: waits between tries.

    Raises:
        BadInput: the folder is no bundle, or the registry cannot be reached or refuses.
        VerificationFailed: the bundle is not whole, or the registry holds other bytes afterwards.
        ToolchainMissing: oras is not installed.
    """
    target = _parsed(reference)
    connection = Connection(target, plain_http=plain_http, sleep=sleep)
    artifact = artifact_of(folder)
    if target.digest not in (None, artifact.digest):
        raise BadInput(f"{target}: the bundle {folder} has the digest {artifact.digest}; push it with a tag instead")
    bodies: dict[Blob, Body] = {Blob.of(artifact.config): artifact.config}
    with _bytes_bar(progress, "pushing", sum(layer.blob.size for layer in artifact.layers)) as on_bytes:
        for layer in artifact.layers:
            bodies.setdefault(layer.blob, _opener(folder / layer.path, on_bytes) if layer.blob.size else b"")
        ways = _send_all(connection, bodies, on_bytes)
    _put_manifest(connection, artifact.manifest, artifact.digest)
    known_blobs.remember(target.host, target.name, bodies)
    return _pushed(target, artifact.digest, artifact.layers, ways)


def _parsed(reference: Reference | str) -> Reference:
    return Reference.parse(reference) if isinstance(reference, str) else reference


class _Counted(io.FileIO):
    """A file that says how much of it is read."""

    def __init__(self, file: Path, on_bytes: OnBytes) -> None:
        super().__init__(file)
        self._on_bytes = on_bytes

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(-1 if size is None else size)
        self._on_bytes(len(data or b""))
        return data or b""


def _opener(file: Path, on_bytes: OnBytes) -> Callable[[], Any]:
    return lambda: _Counted(file, on_bytes)


def _pushed(target: Reference, digest: str, layers: Sequence[Layer], ways: Mapping[Blob, Way]) -> Pushed:
    """Count layers by how they got there; a layer's equal, later ones were there when their turn came."""
    counts: Counter[Way] = Counter()
    sizes: Counter[Way] = Counter()
    seen: set[Blob] = set()
    for layer in layers:
        way: Way = "present" if layer.blob in seen else ways[layer.blob]
        seen.add(layer.blob)
        counts[way] += 1
        sizes[way] += layer.blob.size
    return Pushed(
        reference=str(replace(target, tag=target.tag or (None if target.digest else DEFAULT_TAG))),
        digest=digest,
        layers_sent=counts["sent"],
        layers_mounted=counts["mounted"],
        layers_present=counts["present"],
        bytes_sent=sizes["sent"],
        bytes_mounted=sizes["mounted"],
        bytes_present=sizes["present"],
    )


def _send_all(connection: Connection, bodies: Mapping[Blob, Body], on_bytes: OnBytes) -> dict[Blob, Way]:
    """Bring all blobs into the repository; how each got there."""
    ways: dict[Blob, Way] = {}

    def one(blob: Blob) -> None:
        ways[blob] = _bring(connection, blob, bodies[blob])
        if ways[blob] != "sent":
            on_bytes(blob.size)

    _each(one, list(bodies))
    return ways


def _each(work: Callable[[Blob], None], blobs: Sequence[Blob], stop: Callable[[], None] = lambda: None) -> None:
    """Do some work for every blob, several at once and the largest first; the first failure ends it.

    ``stop`` is to end the others' work, when one failed or the user interrupts.
    """
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        running = [pool.submit(work, blob) for blob in sorted(blobs, key=lambda blob: -blob.size)]
        finished, _ = wait(running, return_when=FIRST_EXCEPTION)
        for future in finished:
            future.result()
    except BaseException:
        stop()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _bring(connection: Connection, blob: Blob, body: Body) -> Way:
    """One blob into the repository, unless it is there."""
    found = connection.send("HEAD", connection.url(f"blobs/{blob.digest}"))
    if found.status_code != 404:
        connection.check(found, 200)
        return "present"
    return connection.trying(lambda: _upload(connection, blob, body))


def _upload(connection: Connection, blob: Blob, body: Body) -> Way:
    """Mount a blob from where the registry has it, or send it; raises Dropped."""
    started = None
    elsewhere = known_blobs.repository_of(connection.reference.host, blob)
    if elsewhere and elsewhere != connection.reference.name:
        asked = connection.url(f"blobs/uploads/?mount={blob.digest}&from={elsewhere}")
        # Who may not read there, or is not given it for another reason, sends it.
        with suppress(BadInput, Dropped):
            started = connection.send_once("POST", asked)
        if started is not None and started.status_code == 201:
            return "mounted"
    if started is None or started.status_code != 202:
        started = connection.send_once("POST", connection.url("blobs/uploads/"))
    connection.check(started, 202)
    location = urljoin(started.url, started.headers.get("Location", ""))
    connection.check_address(location)
    headers = {"Content-Type": "application/octet-stream"}
    joint = "&" if "?" in location else "?"
    answer = connection.send_once("PUT", f"{location}{joint}digest={blob.digest}", headers=headers, body=body)
    connection.check(answer, 201, 204)
    return "sent"


def _put_manifest(connection: Connection, manifest: bytes, digest: str) -> None:
    """Give the artifact its name, which makes it visible."""
    target = connection.reference
    headers = {"Content-Type": media_types.MANIFEST}
    name = target.tag or target.wanted
    answer = connection.send("PUT", connection.url(f"manifests/{name}"), headers=headers, body=manifest)
    connection.check(answer, 201)
    found = answer.headers.get("Docker-Content-Digest")
    if found is not None and found != digest:
        raise VerificationFailed(f"{target}: the registry gives the digest {found} where {digest} was sent; push again")


def pull(
    reference: Reference | str,
    output: Path,
    *,
    progress: Progress,
    force: bool = False,
    staging: Path | None = None,
    reuse: Sequence[Path] = (),
    plain_http: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> Pulled:
    """Pull a bundle into a folder, which appears when all of it is there and every digest is right.

    What came is kept in ``staging`` when the transfer breaks, and the next pull goes on from there.

    Args:
        reference: of the bundle; a tag is resolved to a digest first.
        output: the folder to write. Where it is that bundle already, nothing is done.
        progress: told of what is done.
        force: replace an output that is another bundle.
        staging: a folder for what came so far, on the disk of the output; left out, ``.NAME.pull`` beside it.
        reuse: folders of other bundles, whose equal files are copied instead of fetched.
        plain_http: speak HTTP without TLS to a host that is not this machine.
        sleep: waits between tries.

    Raises:
        BadInput: the registry cannot be reached or refuses, the artifact is no bundle or not to be trusted, or the
            output may not be written.
        VerificationFailed: bytes differ from their digest.
        ToolchainMissing: oras is not installed.
    """
    target, output = _parsed(reference), output.absolute()
    connection = Connection(target, plain_http=plain_http, sleep=sleep)
    digest, layers = resolve(connection)
    size, distinct = sum(layer.blob.size for layer in layers), sum(blob.size for blob in {x.blob for x in layers})
    named = "" if target.digest else f"is {digest}, "
    progress.say(f"{target}: {named}{len(layers)} files, {size / 1e6:.1f} MB")
    if _holds(output, layers):
        return Pulled(str(target), digest, output, len(layers), size, 0, distinct, True)
    check_target(output, force)
    try:
        with staging_folder(staging or output.with_name(f".{output.name}.pull")) as folder:
            keep_only(folder, (layer.blob for layer in layers))
            fetched = _fetch_all(connection, layers, folder, [*reuse, *([output] if output.is_dir() else [])], progress)
            with whole_folder(output, force) as work:
                _assemble(folder, layers, work)
                try:
                    verify_files(work, {layer.path: layer.blob.hex for layer in layers})
                except AmoebaError as error:  # it names a folder that is gone when this is read
                    raise type(error)(str(error).replace(str(work), str(target))) from None
    except OSError as error:
        raise BadInput(f"{output}: was not written: {system_refusal(error)}") from error
    return Pulled(str(target), digest, output, len(layers), size, fetched, max(0, distinct - fetched), False)


def resolve(connection: Connection) -> tuple[str, tuple[Layer, ...]]:
    """The digest that a reference stands for now, and the files of that bundle.

    Raises:
        BadInput: there is no such artifact, it is no bundle or not to be trusted.
        VerificationFailed: the registry's bytes are not those of the digest.
    """
    where = str(connection.reference)
    wanted = connection.reference.wanted
    body = _document(connection, wanted)
    value = read_document(body, where)
    if isinstance(value.get("manifests"), list) and "layers" not in value:
        wanted = _only_model(value["manifests"], where)
        body = _document(connection, wanted)
        value = read_document(body, where)
    return digest_of(body), read_layers(value, where)


def _document(connection: Connection, wanted: str) -> bytes:
    """A manifest or an index by its tag or digest, checked against that."""
    headers = {"Accept": f"{media_types.MANIFEST}, {media_types.INDEX}"}
    answer = connection.check(connection.send("GET", connection.url(f"manifests/{wanted}"), headers=headers), 200)
    body, said = answer.content, answer.headers.get("Docker-Content-Digest")
    expected = wanted if is_digest(wanted) else said if is_digest(said) else None
    if expected is not None and digest_of(body) != expected:
        raise VerificationFailed(
            f"{connection.reference}: the registry's manifest has the digest {digest_of(body)} and not {expected}; the "
            f"registry or the way to it is damaged, try again"
        )
    return body


def _only_model(entries: Sequence[Any], where: str) -> str:
    """The digest of the one model that an index lists."""
    models = [
        entry["digest"]
        for entry in entries
        if isinstance(entry, dict)
        and entry.get("artifactType") == media_types.ARTIFACT
        and is_digest(entry.get("digest"))
    ]
    if len(models) != 1:
        raise BadInput(f"{where}: is an index of {len(models)} models where one is needed; name the one by its digest")
    return str(models[0])


def _holds(output: Path, layers: Sequence[Layer]) -> bool:
    """Whether a folder is exactly a bundle of these files."""
    if output.is_symlink() or not output.is_dir():
        return False
    sizes = {layer.path: layer.blob.size for layer in layers}
    found = {}
    for path in output.rglob("*"):
        if path.is_symlink():
            return False
        if path.is_file():
            found[path.relative_to(output).as_posix()] = path.stat().st_size
    return found == sizes and all(sha256_of(output / layer.path) == layer.blob.hex for layer in layers)


def _fetch_all(
    connection: Connection, layers: Sequence[Layer], folder: Path, reuse: Sequence[Path], progress: Progress
) -> int:
    """Bring all blobs into the staging folder; how many bytes the registry sent for that."""
    blobs = {layer.blob: layer.path for layer in layers}
    missing = [blob for blob in blobs if not (folder / blob.hex).exists()]
    _require_space(folder, missing)
    copied = {blob for blob in missing if any(copy_checked(other / blobs[blob], blob, folder) for other in reuse)}
    # What is complete from an earlier pull is checked again, as a download of which nothing is missing.
    rest = [blob for blob in blobs if blob not in copied]
    stop, fetched = threading.Event(), []
    with _bytes_bar(progress, "pulling", sum(blob.size for blob in rest)) as on_bytes:

        def one(blob: Blob) -> None:
            fetched.append(Download(connection, blob, folder, on_bytes, stop).run())

        def end() -> None:
            stop.set()
            connection.abort()

        _each(one, rest, end)
    return sum(fetched)


def _require_space(folder: Path, blobs: Sequence[Blob]) -> None:
    """Raise BadInput where a disk has no room for what is still to come."""
    needed = 0
    for blob in blobs:
        part = folder / f"{blob.hex}.part"
        needed += max(0, blob.size - (part.stat().st_size if part.exists() else 0))
    free = shutil.disk_usage(folder).free
    if needed and needed + SPARE_BYTES > free:
        raise BadInput(
            f"{folder.parent}: has {free / 1e6:.0f} MB free, and {needed / 1e6:.0f} MB are to come; free some there"
        )


@contextmanager
def _bytes_bar(progress: Progress, label: str, size: int) -> Iterator[OnBytes]:
    """A bar in MB that is told of bytes, from any thread."""
    lock, count = threading.Lock(), 0
    with progress.bar(f"{label}, MB", size // 10**6) as advance:

        def on_bytes(more: int) -> None:
            nonlocal count
            with lock:
                before, count = count, count + more
                for _ in range(count // 10**6 - before // 10**6):
                    advance()

        yield on_bytes


def _assemble(folder: Path, layers: Sequence[Layer], work: Path) -> None:
    """Move the blobs of a staging folder to where they belong; a blob of several files is copied but for the last."""
    left = Counter(layer.blob for layer in layers)
    for layer in layers:
        target = work / layer.path
        target.parent.mkdir(parents=True, exist_ok=True)
        left[layer.blob] -= 1
        if left[layer.blob]:
            shutil.copyfile(folder / layer.blob.hex, target)
        else:
            shutil.move(folder / layer.blob.hex, target)
        target.chmod(0o644)
