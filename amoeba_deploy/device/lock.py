"""One command at a time changes a device's folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from amoeba_deploy.errors import BadInput

LOCK = "lock"


@contextmanager
def locked(root: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a device's folder, which is made if need be.

    Raises:
        BadInput: another command holds it and this one is not to ``wait``, or the folder cannot be written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise BadInput(f"{root}: cannot be written ({error.strerror}); check its permissions and room") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BadInput(
                f"{root}: another install, rollback or recovery is at work there; try again when it is done, or add "
                f"--wait"
            ) from None
        except OSError as error:
            raise BadInput(
                f"{root / LOCK}: cannot be locked ({error.strerror}); choose a folder on a disk of this machine"
            ) from None
        yield
    finally:
        os.close(descriptor)
