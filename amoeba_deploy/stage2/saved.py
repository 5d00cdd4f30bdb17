"""An unfinished tuning run, kept beside its output so that ``--resume`` goes on from it exactly.

The folder ``CHECKPOINT.tuning`` holds ``run.json``, the settings that the run was begun with; ``log.jsonl``; and the
last states as ``state-XXXXXXXX.safetensors``, one for each step that was saved. A state appears whole or not at all,
and its last tensor is a digest of everything before it: whatever a crash or a bad disk left of one is recognised, and
the state before it is taken. Settings must be those that the run was begun with: no run is the mixture of two.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from amoeba_deploy import __version__
from amoeba_deploy.errors import BadInput
from amoeba_deploy.files import json_text, read_json, whole_file
from amoeba_deploy.progress import Progress
from amoeba_deploy.tensors import Array, OpenFile, TensorSource, read_header, write_tensors

if TYPE_CHECKING:
    import torch

RUN_FORMAT = "amoeba.tuning/1"
RUN, LOG, LOCK = "run.json", "log.jsonl", "lock"
DIGEST = "sha256"
"""The tensor at the end of a state: the digest of its step and of all other tensors."""
KEPT_STATES = 2
_STATE = re.compile(r"state-(\d{8,})\.safetensors")
_LEFTOVERS = ".*.part"
_TORCH_OF = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_DTYPES = {f"torch.{name}": dtype for dtype, name in _TORCH_OF.items()}


def run_folder(output: Path) -> Path:
    """Where the run that writes a checkpoint keeps its state."""
    output = output.absolute()
    return output.parent / f"{output.name}.tuning"


def write_state(file: Path, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one state, flushed to the disk; each tensor is on the processor only while it is written."""
    import torch

    if DIGEST in tensors:
        raise AssertionError(f"a tensor is named {DIGEST}, as the digest is")
    kinds = {name: (_DTYPES[str(tensor.dtype)], tuple(tensor.shape)) for name, tensor in tensors.items()}
    digest = _begun(step, kinds)

    def parts(tensor: torch.Tensor) -> Iterator[Array]:
        values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        digest.update(values.data)
        yield values

    sources = {
        name: TensorSource(*kinds[name], lambda tensor=tensor: parts(tensor))  # type: ignore[misc]  # bound now
        for name, tensor in tensors.items()
    }
    # One thread writes in the order of the mapping, so the digest is complete when its turn comes.
    sources[DIGEST] = TensorSource("U8", (32,), lambda: [np.frombuffer(digest.digest(), np.uint8)])
    with whole_file(file, force=True) as work:
        write_tensors(work, sources, {"step": str(step)})
        _flush(work)
    with suppress(OSError):  # not every file system flushes folders
        _flush(file.parent)


def read_state(file: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """The step and the tensors of one state.

    Raises:
        BadInput: the file is missing or damaged.
    """
    import torch

    infos, metadata = read_header(file)
    found = _STATE.fullmatch(file.name)
    if found is None or not isinstance(metadata, dict) or metadata.get("step") != str(int(found[1])):
        raise BadInput(f"{file}: is not the state that its name says")
    step, stored = int(found[1]), infos.pop(DIGEST, None)
    if stored is None or stored.length != 32 or any(info.dtype not in _TORCH_OF for info in infos.values()):
        raise BadInput(f"{file}: is not a state of a tuning run")
    digest = _begun(step, {name: (info.dtype, info.shape) for name, info in infos.items()})
    opened, tensors = OpenFile(file), {}
    for name, info in infos.items():
        tensors[name] = torch.empty(info.shape, dtype=getattr(torch, _TORCH_OF[info.dtype]))
        values = tensors[name].reshape(-1).view(torch.uint8).numpy()
        opened.read_into(values, info.offset)
        digest.update(values.data)
    wanted = np.empty(32, np.uint8)
    opened.read_into(wanted, stored.offset)
    if digest.digest() != wanted.tobytes():
        raise BadInput(f"{file}: its content is not what was written")
    return step, tensors


def newest_step(folder: Path) -> int | None:
    """The step of the newest state in a run folder, whether it is whole or not; None where there is none."""
    return max(_states(folder), default=None)


def latest_state(folder: Path, progress: Progress) -> tuple[int, dict[str, torch.Tensor]] | None:
    """The newest state of a run folder that is whole; None where the folder holds no state.

    Raises:
        BadInput: it holds states, all of them damaged.
    """
    damaged: list[str] = []
    for file in reversed(_states(folder).values()):
        try:
            found = read_state(file)
        except (BadInput, OSError) as error:
            damaged.append(str(error))
            continue
        if damaged:
            progress.say(f"{damaged[0]}; the run goes on from step {found[0]}")
        return found
    if damaged:
        raise BadInput(f"{damaged[0]}, and no older state is whole; begin again with --force instead of --resume")
    return None


class SavedRun:
    """The folder of one run, which no other process may use at the same time. Made by ``begin``."""

    def __init__(self, folder: Path, progress: Progress, lock: BinaryIO) -> None:
        self.folder = folder
        self._progress = progress
        self._lock = lock

    @classmethod
    def begin(
        cls, folder: Path, settings: Mapping[str, Any], *, resume: bool, force: bool, progress: Progress
    ) -> SavedRun:
        """Take a run folder for a run, new or gone on with.

        Args:
            folder: as ``run_folder`` gives it.
            settings: everything that decides the run's result, as JSON values. Names are those of options, such as
                ``top_k`` for --top-k; a name with a space in it, such as ``base model``, is shown as it is.
            resume: go on with the run that is there; begin one, and say so, where there is none.
            force: begin again although there is an unfinished run, which is then lost. ``resume`` comes first.
            progress: where remarks go.

        Raises:
            BadInput: the folder is not a run's or is in use; it holds an unfinished run, and neither ``resume`` nor
                ``force`` is asked for; or the run was begun with other settings or by another version.
        """
        wanted = {"format": RUN_FORMAT, "tool": f"amoeba-deploy {__version__}", "settings": _plain(settings)}
        folder = folder.absolute()
        try:
            _require_ours(folder)
            run = cls(folder, progress, _locked(folder))
        except OSError as error:
            raise BadInput(f"{folder}: cannot be written ({error.strerror})") from None
        try:
            run._begin(wanted, resume, force)
        except OSError as error:
            run.close()
            raise BadInput(f"{folder}: cannot be written ({error.strerror})") from None
        except BaseException:
            run.close()
            raise
        return run

    def _begin(self, wanted: dict[str, Any], resume: bool, force: bool) -> None:
        for left in self.folder.glob(_LEFTOVERS):
            left.unlink()
        states = _states(self.folder)  # without one there is nothing to lose and nothing to go on with
        if states and resume:
            _require_same(self.folder, read_json(self.folder / RUN, RUN_FORMAT), wanted)
            return
        if states and not force:
            raise BadInput(
                f"{self.folder}: holds an unfinished run of step {max(states)}; go on with --resume, or --force to "
                f"begin again"
            )
        if resume:
            self._progress.say(f"{self.folder}: holds no unfinished run to resume; beginning one")
        self._clear()
        with whole_file(self.folder / RUN, force=True) as file:
            file.write_text(json_text(wanted), encoding="utf-8")
            _flush(file)

    @property
    def log(self) -> Path:
        """Where the run's log belongs."""
        return self.folder / LOG

    def latest(self) -> tuple[int, dict[str, torch.Tensor]] | None:
        """The step and the tensors of the newest state that is whole, or None where there is no state yet.

        A damaged one is passed over, and said to be.

        Raises:
            BadInput: there are states, all of them damaged.
        """
        return latest_state(self.folder, self._progress)

    def write(self, step: int, tensors: Mapping[str, torch.Tensor]) -> None:
        """Save the state behind a step, and remove all but the last of those before it.

        Raises:
            BadInput: the disk refuses; the states before stay.
        """
        write_state(self.folder / f"state-{step:08d}.safetensors", step, tensors)
        states = _states(self.folder)
        kept = [each for each in states if each <= step][-KEPT_STATES:]
        for each, file in states.items():
            if each not in kept:  # also later ones: they were damaged, or the run would have gone on from them
                file.unlink()

    def remove(self) -> None:
        """Forget the run: its result is written. Files that are not the run's stay, and their folder with them."""
        self._clear()
        (self.folder / LOCK).unlink(missing_ok=True)
        if not any(self.folder.iterdir()):
            self.folder.rmdir()
        self.close()

    def close(self) -> None:
        """Let other processes use the folder; what is saved stays."""
        self._lock.close()

    def __enter__(self) -> SavedRun:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _clear(self) -> None:
        for file in (*_states(self.folder).values(), self.log, self.folder / RUN):  # last what says whose it is
            file.unlink(missing_ok=True)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as they are when read back: tuples are lists, keys are texts."""
    found: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    return found


def _begun(step: int, kinds: Mapping[str, tuple[str, tuple[int, ...]]]) -> hashlib._Hash:
    """The digest of a state before its tensors' values."""
    return hashlib.sha256(json.dumps([step, list(kinds.items())]).encode())


def _states(folder: Path) -> dict[int, Path]:
    """The files of states by their step, ascending."""
    if not folder.is_dir():
        return {}
    found = {int(match[1]): file for file in folder.iterdir() if (match := _STATE.fullmatch(file.name))}
    return dict(sorted(found.items()))


def _require_ours(folder: Path) -> None:
    """Raise BadInput where a folder holds anything and is not a run's; one without run.json was left half-made."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BadInput(f"{folder}: is a file, and the run's folder belongs there; move it away")
    if (folder / RUN).is_file():
        try:
            read_json(folder / RUN, RUN_FORMAT)
        except BadInput as error:
            raise BadInput(f"{error}; move the folder away to begin a run") from None
        return
    foreign = sorted(entry.name for entry in folder.iterdir() if entry.name != LOCK and not entry.match(_LEFTOVERS))
    if foreign:
        raise BadInput(
            f"{folder}: holds {foreign[0]} and no run of amoeba tune; move it away, or choose another output"
        )


def _require_same(folder: Path, begun: dict[str, Any], wanted: dict[str, Any]) -> None:
    if begun.get("tool") != wanted["tool"]:
        raise BadInput(
            f"{folder}: the run was begun by {begun.get('tool')} and this is {wanted['tool']}; finish it with that "
            f"version, or give --force instead of --resume to begin again"
        )
    before, now = begun.get("settings"), wanted["settings"]
    if not isinstance(before, dict):
        raise BadInput(f"{folder / RUN}: holds no settings; give --force instead of --resume to begin again")
    names = [*now, *(name for name in before if name not in now)]
    different = [
        f"{name if ' ' in name else '--' + name.replace('_', '-')} is {_shown(now.get(name))} where the run was begun "
        f"with {_shown(before.get(name))}"
        for name in names
        if before.get(name) != now.get(name)
    ]
    if different:
        raise BadInput(
            f"{folder}: {', '.join(different)}; resume with what the run was begun with, or give --force instead of "
            f"--resume to begin again"
        )


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return value if isinstance(value, str) else json.dumps(value)


def _locked(folder: Path) -> BinaryIO:
    """A run folder's lock, held until it is closed or the process ends. File systems without locks give none."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / LOCK
        stream = file.open("ab")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise BadInput(f"{folder}: is in use by another process; wait for it, or choose another output") from None
        except OSError:
            return stream
        if file.exists() and os.path.samestat(os.fstat(stream.fileno()), file.stat()):
            return stream
        stream.close()  # the run that held it has removed its folder


def _flush(path: Path) -> None:
    """Have a file, or a folder's names, on the disk itself: a state must outlive the machine's sudden end."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
