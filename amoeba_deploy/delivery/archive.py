"""Bundles in one file: a tar archive, compressed with zstd, that is the same for the same bundle.

Names are sorted; times, owners and modes are fixed, as are level and settings of the compression. What is unpacked may
come from anywhere: an archive is refused whose entries are anything but files and folders that stay in their folder,
that is truncated or goes on after its end, or that unpacks to more than it says or a disk holds.
"""

from __future__ import annotations

import hashlib
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from amoeba_deploy.bundle import UNLISTED, verify_files
from amoeba_deploy.delivery.artifact import MAX_SIZE
from amoeba_deploy.delivery.paths import TakenPaths, check_paths
from amoeba_deploy.errors import AmoebaError, BadInput, ToolchainMissing
from amoeba_deploy.files import check_new_file, check_target, system_refusal, whole_file, whole_folder

LEVEL: Final = 3
"""zstd's own default; weights hardly compress at any level."""
MAX_WINDOW: Final = 8 << 20
"""Bytes of memory that unpacking may need for its window: what the format asks every decoder to have."""
BLOCK: Final = 1 << 20
"""Bytes that are read and written at a time."""
SPARE_BYTES: Final = 1 << 20
"""What must be left on a disk beside what is unpacked."""

_MAGIC = b"\x28\xb5\x2f\xfd"


@dataclass(frozen=True)
class Packed:
    """An archive that was written: its digest, how many files it holds, their bytes, and its own."""

    path: Path
    digest: str
    files: int
    bytes: int
    packed_bytes: int


@dataclass(frozen=True)
class Unpacked:
    """A bundle that was unpacked: how many files, and their bytes."""

    path: Path
    files: int
    bytes: int


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise ToolchainMissing(
            "archives need zstandard, which is not installed; run pip install 'amoeba-deploy[deliver]'"
        ) from None
    return zstandard


def pack(folder: Path, file: Path, *, force: bool = False) -> Packed:
    """Write a whole bundle, checked, into one file that appears when it is complete.

    Raises:
        BadInput: the folder is no bundle, or the file may not be written.
        VerificationFailed: a file of the bundle is changed, missing or not listed.
        ToolchainMissing: zstandard is not installed.
    """
    zstandard = _zstandard()
    check_new_file(file, force)
    manifest = verify_files(folder)
    names = sorted({*manifest["files"], *(name for name in UNLISTED if (folder / name).is_file())})
    check_paths(names, str(folder))
    digest = hashlib.sha256()
    with whole_file(file, force) as part, part.open("wb") as raw:
        hashed = _Hashed(raw, digest)
        compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True, write_content_size=False, threads=0)
        with (
            compressor.stream_writer(hashed, closefd=False) as compressed,
            tarfile.open(fileobj=compressed, mode="w|", format=tarfile.PAX_FORMAT, bufsize=BLOCK) as archive,
        ):
            size = sum(_add(archive, folder, name) for name in names)
    return Packed(file, f"sha256:{digest.hexdigest()}", len(names), size, file.stat().st_size)


class _Hashed:
    """A file that is hashed as it is written."""

    def __init__(self, raw: IO[bytes], digest: Any) -> None:
        self.raw, self.digest = raw, digest

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.raw.write(data)

    def flush(self) -> None:
        self.raw.flush()


def _add(archive: tarfile.TarFile, folder: Path, name: str) -> int:
    """Add a file with nothing of this machine or this day; returns its bytes."""
    entry = tarfile.TarInfo(name)
    entry.mode, entry.mtime, entry.uid, entry.gid = 0o644, 0, 0, 0
    with (folder / name).open("rb") as file:
        entry.size = (folder / name).stat().st_size
        archive.addfile(entry, file)
    return entry.size


def unpack(file: Path, output: Path, *, force: bool = False) -> Unpacked:
    """Unpack a bundle into a folder, which appears when all of it is there and its files are those of its manifest.

    Raises:
        BadInput: the file is no archive of a bundle, is damaged or not to be trusted, or the output may not be written.
        VerificationFailed: a file is not what the bundle's manifest lists.
        ToolchainMissing: zstandard is not installed.
    """
    _zstandard()
    if not file.is_file():
        raise BadInput(f"{file}: is no file; give an archive that 'amoeba bundle pack' wrote")
    check_target(output, force, (file,))
    with whole_folder(output, force, (file,)) as work:
        _extract(file, work)
        try:
            manifest = verify_files(work)
        except AmoebaError as error:  # it names a folder that is gone when this is read
            raise type(error)(str(error).replace(str(work), str(file))) from None
    sizes = [path.stat().st_size for path in output.rglob("*") if path.is_file()]
    return Unpacked(output, max(len(sizes), len(manifest["files"])), sum(sizes))


def _extract(file: Path, work: Path) -> None:
    """Write the entries of an archive below an empty folder.

    Raises:
        BadInput: it is damaged, or an entry must not be unpacked.
    """
    zstandard = _zstandard()
    _check_frame(file)
    try:
        with _decompressed(file) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:  # type: ignore[call-overload]
            taken = TakenPaths(str(file))
            for entry in archive:
                _check_entry(entry, taken, file)
                if entry.isdir():
                    (work / entry.name).mkdir(parents=True, exist_ok=True)
                else:
                    _write(archive, entry, work, file)
            stream.finish()
    except (tarfile.TarError, zstandard.ZstdError, EOFError, ValueError, OverflowError, RecursionError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"{file}: is damaged or no archive of a bundle ({said}); get it again") from None


def _check_entry(entry: tarfile.TarInfo, taken: TakenPaths, file: Path) -> None:
    """Raise BadInput where an entry is not a file or folder that an archive of a bundle holds."""
    if entry.type not in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE) or entry.sparse:
        raise BadInput(f"{file}: its entry {entry.name[:100]!r} is no plain file; it is not to be trusted")
    if not 0 <= entry.size <= MAX_SIZE:
        raise BadInput(f"{file}: its entry {entry.name[:100]!r} has an impossible size; it is not to be trusted")
    taken.add_folder(entry.name) if entry.isdir() else taken.add_file(entry.name)


def _write(archive: tarfile.TarFile, entry: tarfile.TarInfo, work: Path, file: Path) -> None:
    """Write one file; raises BadInput where the disk has no room, the archive ends in it, or the name is taken."""
    free = shutil.disk_usage(work).free
    if entry.size + SPARE_BYTES > free:
        raise BadInput(
            f"{file}: its entry {entry.name!r} has {entry.size / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free at "
            f"{work.parent}; free some there, if you trust the archive"
        )
    source, target, left = archive.extractfile(entry), work / entry.name, entry.size
    if source is None:
        raise BadInput(f"{file}: its entry {entry.name!r} has no content; it is not to be trusted")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write = target.open("xb")
    except FileExistsError:
        raise BadInput(f"{file}: holds {entry.name!r} twice, or a file where it needs a folder; get it again") from None
    except OSError as error:
        raise BadInput(f"{file}: {entry.name!r} cannot be written: {system_refusal(error)}") from None
    with write:
        while left and (data := source.read(min(BLOCK, left))):
            write.write(data)
            left -= len(data)
    if left:
        raise BadInput(f"{file}: ends in the middle of {entry.name!r}; get it again")


def _check_frame(file: Path) -> None:
    """Walk over the blocks of a zstd file: it must be one frame, and end where that ends.

    The library reads a truncated frame as far as it goes, and does not look behind the end. See RFC 8878, section 3.

    Raises:
        BadInput: it is no zstd file, needs too much memory, is truncated, or something follows.
    """
    zstandard, size = _zstandard(), file.stat().st_size
    with file.open("rb") as raw:
        head = raw.read(18)
        if not head.startswith(_MAGIC):
            raise BadInput(f"{file}: is no zstd archive; give one that 'amoeba bundle pack' wrote")
        try:
            frame = zstandard.get_frame_parameters(head)
            position = zstandard.frame_header_size(head)
        except zstandard.ZstdError as error:
            raise BadInput(f"{file}: its zstd header is damaged ({error}); get it again") from None
        if frame.window_size > MAX_WINDOW:
            raise BadInput(
                f"{file}: needs {frame.window_size >> 20} MB of memory to unpack where {MAX_WINDOW >> 20} are allowed; "
                f"pack it with 'amoeba bundle pack'"
            )
        last = False
        while not last:
            raw.seek(position)
            block = int.from_bytes(head := raw.read(3), "little")
            last, kind = bool(block & 1), block >> 1 & 3
            position += 3 + (1 if kind == 1 else block >> 3)
            if len(head) < 3 or position > size:
                raise BadInput(f"{file}: is truncated; get it again")
        end = position + (4 if frame.has_checksum else 0)
    if end != size:
        raise BadInput(f"{file}: {'is truncated' if end > size else 'goes on after its end'}; get it again")


@contextmanager
def _decompressed(file: Path) -> Iterator[_Forward]:
    zstandard = _zstandard()
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
    with file.open("rb") as raw, decompressor.stream_reader(raw, read_size=BLOCK) as reader:
        yield _Forward(reader)


class _Forward:
    """What tarfile reads from: only forwards, and never much at a time, whatever a header says."""

    def __init__(self, reader: Any) -> None:
        self.reader, self.position = reader, 0

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= BLOCK:
            raise tarfile.ReadError("a header of it is too large")
        parts = []
        while size and (data := self.reader.read(size)):
            parts.append(data)
            size -= len(data)
        found = parts[0] if len(parts) == 1 else b"".join(parts)
        self.position += len(found)
        return found

    def tell(self) -> int:
        return self.position

    def seek(self, position: int) -> int:
        if position < self.position:
            raise tarfile.ReadError("it cannot be read in one go")
        while self.position < position and self.read(min(BLOCK, position - self.position)):
            pass
        return self.position

    def finish(self) -> None:
        """Read on to the end: after the last entry there is nothing but zeros, and not many."""
        rest = self.read(tarfile.RECORDSIZE)
        if rest.strip(b"\0") or self.read(1):
            raise tarfile.ReadError("something follows its last entry")
