"""Blobs from a registry into a folder that outlives a broken transfer: by their digest, whole or as far as they came.

``<hex>`` is a blob that is complete, ``<hex>.part`` one that is not. Digest and size are checked as the bytes come, and
what is there from an earlier time is read and checked too.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from amoeba_deploy.delivery.artifact import Blob
from amoeba_deploy.delivery.connection import BLOCK, TRIES, Connection, Dropped
from amoeba_deploy.errors import AmoebaError, BadInput, VerificationFailed

if TYPE_CHECKING:
    import requests

PROGRESS = 1 << 20
"""Bytes beyond what was ever had, after which a broken connection counts as the first again."""
OnBytes = Callable[[int], None]


class Stopped(Exception):
    """Another download failed, and this one needs not go on."""


@contextmanager
def staging_folder(folder: Path) -> Iterator[Path]:
    """A folder that downloads are kept in, made if need be and held by a lock; removed when the block ends well.

    Raises:
        BadInput: another process downloads into it, or it cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_symlink():
        raise BadInput(f"{folder}: is a link, and downloads are kept there; remove it")
    folder.mkdir(exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(f"{folder}: another pull is at work there; wait for its end") from None
        except OSError:
            pass  # a file system without locks
        yield folder
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        with suppress(OSError):
            folder.rmdir()  # where nothing came, nothing is kept
        os.close(descriptor)


def keep_only(folder: Path, blobs: Iterable[Blob]) -> None:
    """Remove from a staging folder what is no file or belongs to none of some blobs."""
    wanted = {name for blob in blobs for name in (blob.hex, f"{blob.hex}.part")}
    for path in folder.iterdir():
        if path.is_symlink() or not path.is_file():
            path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
        elif path.name not in wanted:
            path.unlink()


class Download:
    """One blob on its way into a staging folder.

    Args:
        connection: to the registry.
        blob: what is fetched.
        folder: the staging folder.
        on_bytes: told how many bytes were fetched, as they come.
        stop: set where another download failed.
    """

    def __init__(
        self, connection: Connection, blob: Blob, folder: Path, on_bytes: OnBytes, stop: threading.Event
    ) -> None:
        self.connection, self.blob, self.on_bytes, self.stop = connection, blob, on_bytes, stop
        self.whole, self.part = folder / blob.hex, folder / f"{blob.hex}.part"
        self.fetched = 0
        self._digest = hashlib.sha256()
        self._have = 0

    def run(self) -> int:
        """Fetch what is missing; returns the number of bytes that came from the registry.

        Raises:
            VerificationFailed: the registry's bytes are not those of the digest, or of another size.
            BadInput: the connection broke too often.
        """
        if self.whole.exists():
            self.whole.replace(self.part)  # it is checked again: a machine may have lost its power since
        try:
            self._check_part()
            with self.part.open("ab") as file:
                self._fill(file)
        except VerificationFailed:
            self.part.unlink(missing_ok=True)
            raise
        self.part.replace(self.whole)
        return self.fetched

    def _check_part(self) -> None:
        """Take up what an earlier transfer left; nothing where it cannot be the beginning of the blob."""
        size = self.part.stat().st_size if self.part.exists() else 0
        if size > self.blob.size:
            self.part.unlink()
            return
        if size:
            with self.part.open("rb") as file:
                while data := file.read(BLOCK):
                    self._digest.update(data)
            self._have = size
        if size == self.blob.size and not self._is_right():
            self._begin_again(None)

    def _begin_again(self, file: IO[bytes] | None) -> None:
        self._digest, self._have = hashlib.sha256(), 0
        if file is None:
            self.part.unlink(missing_ok=True)
        else:
            file.truncate(0)

    def _is_right(self) -> bool:
        return self._have == self.blob.size and self._digest.hexdigest() == self.blob.hex

    def _fill(self, file: IO[bytes]) -> None:
        """Fetch until all is there, over as many connections as that takes."""
        kept = resumed = self._have
        failures, furthest = 0, self._have
        while not self._is_right():
            if self._have == self.blob.size:
                if not resumed:
                    raise VerificationFailed(
                        f"{self.connection.reference}: the bytes sent for {self.blob.digest} have another digest; the "
                        f"registry or the way to it is damaged, try again"
                    )
                # What was kept from before was wrong, or what came after it; only a whole transfer tells.
                self._begin_again(file)
                resumed = 0
            try:
                self._fetch(file)
            except Dropped as dropped:
                if self.stop.is_set():
                    raise Stopped from None
                file.flush()
                resumed = resumed or self._have
                if self._have >= furthest + PROGRESS:
                    failures, furthest = 0, self._have
                failures += 1
                if failures >= TRIES:
                    raise self._given_up(dropped, kept) from None
                self.connection.pause(failures, dropped)

    def _given_up(self, dropped: Dropped, kept: int) -> AmoebaError:
        said = self.connection.given_up(dropped)
        more = f", {self._have} of {self.blob.size} bytes are kept" if self._have > kept or kept else ""
        return BadInput(f"{said}: the same command goes on from there{more}")

    def _fetch(self, file: IO[bytes]) -> None:
        """One request, from where the file ends.

        Raises:
            Dropped: it broke.
        """
        headers = {"Range": f"bytes={self._have}-"} if self._have else {}
        url = self.connection.url(f"blobs/{self.blob.digest}")
        response = self.connection.send_once("GET", url, headers=headers, stream=True)
        with self.connection.streaming(response):
            if response.status_code == 416 and self._have:
                self._begin_again(file)
                raise Dropped("the registry does not send the rest of a file")
            self.connection.check(response, 200, 206)
            self._expect(response, file)
            self._receive(response, file)

    def _expect(self, response: requests.Response, file: IO[bytes]) -> None:
        """Compare what an answer says of itself with what was asked for; a server may send all instead of the rest."""
        length = response.headers.get("Content-Length", "")
        total = int(length) if length.isdecimal() else None
        if response.status_code == 206:
            found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
            if found is None or int(found[1]) != self._have:
                self._begin_again(file)
                raise Dropped("the registry sends another part of a file than it was asked for")
            total = None if found[3] == "*" else int(found[3])
        elif self._have:
            self._begin_again(file)
        if total is not None and total != self.blob.size:
            raise self._wrong_size(f"{total} bytes")

    def _wrong_size(self, found: str) -> VerificationFailed:
        return VerificationFailed(
            f"{self.connection.reference}: {self.blob.digest} has {found} in the registry where {self.blob.size} are "
            f"listed; push the bundle again"
        )

    def _receive(self, response: requests.Response, file: IO[bytes]) -> None:
        """Write and hash a body as it comes, and no more than is listed."""
        for data in self._blocks(response):
            self._have += len(data)
            if self._have > self.blob.size:
                raise self._wrong_size("more bytes")
            file.write(data)
            self._digest.update(data)
            self.fetched += len(data)
            self.on_bytes(len(data))
            if self.stop.is_set():
                raise Stopped
        if self._have < self.blob.size:
            raise Dropped("the connection ends in the middle of a file")

    def _blocks(self, response: requests.Response) -> Iterator[Any]:
        """The body in large blocks."""
        from urllib3.exceptions import HTTPError

        while True:
            wanted = min(BLOCK, self.blob.size - self._have + 1)
            try:
                data = response.raw.read(wanted, decode_content=False)
            except (HTTPError, OSError) as error:
                raise self.connection.failure(error, response.url) from None
            if not data:
                return
            yield data


def copy_checked(source: Path, blob: Blob, folder: Path) -> bool:
    """Take a blob from a file that is here already; False where the file is another, and nothing is left then."""
    if source.is_symlink() or not source.is_file() or source.stat().st_size != blob.size:
        return False
    part, digest = folder / f"{blob.hex}.copy", hashlib.sha256()
    with suppress(OSError):
        with source.open("rb") as read, part.open("wb") as write:
            while data := read.read(BLOCK):
                digest.update(data)
                write.write(data)
        if digest.hexdigest() == blob.hex:
            part.replace(folder / blob.hex)
            return True
    part.unlink(missing_ok=True)
    return False
