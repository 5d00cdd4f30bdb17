"""What a tuning run reports of its steps: lines of JSON, TensorBoard, and a bar or a few lines on standard error.

The JSON lines of a run that was interrupted and resumed are those of an undisturbed one, except for ``seconds``: what
a killed run reported behind the state that it is resumed from is dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from amoeba_deploy.errors import BadInput, ToolchainMissing
from amoeba_deploy.files import whole_file
from amoeba_deploy.progress import Progress

_LINES = 20
"""About so many a run where no terminal shows a bar."""
_MEMORY = 0.95
"""What of a smoothed value remains at the next step: about twenty steps count."""


class TuningLog:
    """The reports of one run. To be closed, best by ``with``."""

    def __init__(
        self,
        file: Path,
        tensorboard: Path | None,
        progress: Progress,
        steps: int,
        start: int = 0,
        *,
        main: bool = True,
    ) -> None:
        """Open what is reported to.

        Args:
            file: the JSON lines; what it holds up to step ``start`` stays, the rest goes.
            tensorboard: a folder for TensorBoard's events, if any.
            progress: standard error.
            steps: the number of the run's last step; the first is 1.
            start: the step behind which the run goes on.
            main: whether this process is the one that reports; the others' logs do nothing.

        Raises:
            ToolchainMissing: TensorBoard is asked for and not installed.
            BadInput: the disk refuses.
        """
        self._file, self._main, self._steps, self._start = file, main, steps, start
        self._progress, self._smooth = progress, _Smooth()
        self._every = max(1, -(-steps // _LINES))
        self._open = ExitStack()
        if not main:
            return
        self._board = None if tensorboard is None else _open_board(tensorboard, start)
        if self._board is not None:
            self._open.callback(self._board.close)
        _keep_until(file, start)
        with _writing(file):
            self._lines = self._open.enter_context(file.open("a", encoding="utf-8"))
        self._advance = self._open.enter_context(progress.bar("tuning", steps, start))

    def step(
        self, number: int, losses: Mapping[str, float], *, rate: float, gradient: float, tokens: int, seconds: float
    ) -> None:
        """Report one step.

        Args:
            number: of the step, from 1.
            losses: the loss of each shape of this step, in their order: the largest, the smallest, then random ones
                (a random one that is one of the first two is not told apart from it).
            rate: the learning rate.
            gradient: the gradient's norm before it was clipped.
            tokens: positions of its rows, with prompts and padding, over all processes.
            seconds: that the step took, above zero.
        """
        if not self._main:
            return
        line = {
            "step": number,
            "loss": {shape: _finite(loss) for shape, loss in losses.items()},
            "lr": rate,
            "gradient_norm": _finite(gradient),
            "tokens": tokens,
            "seconds": round(seconds, 3),
        }
        with _writing(self._file):
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()
        roles = _roles(losses)
        if self._board is not None:
            _report(self._board, number, losses, roles, {"lr": rate, "gradient_norm": gradient}, tokens / seconds)
        self._smooth.add(roles | {"tokens": tokens, "seconds": seconds})
        self._show(number, list(losses))

    def _show(self, number: int, shapes: list[str]) -> None:
        lasting = [
            f"{shape} {self._smooth[role]:.3f}" for shape, role in zip(shapes, ("largest", "smallest"), strict=False)
        ]
        self._advance("  ".join([*lasting, *shapes[2:]]))
        due = number % self._every == 0 or number in (self._start + 1, self._steps)
        if self._progress.on_terminal or not due:
            return
        others = [f"random {self._smooth['random']:.3f}"] if "random" in self._smooth else []
        speed = f"{self._smooth['tokens'] / self._smooth['seconds']:.0f} tokens/s"
        left = (self._steps - number) * self._smooth["seconds"]
        ending = [f"{time_text(left)} left"] if number < self._steps else []
        self._progress.say("  ".join([f"step {number}/{self._steps}", *lasting, *others, speed, *ending]))

    def close(self) -> None:
        """End the bar and close the files."""
        self._open.close()

    def __enter__(self) -> TuningLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _Smooth:
    """Running means in which the latest steps count most, by name; without a bias towards zero at the beginning."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if math.isfinite(value):
                total, weight = self._sums.get(name, (0.0, 0.0))
                self._sums[name] = _MEMORY * total + value, _MEMORY * weight + 1

    def __contains__(self, name: str) -> bool:
        return name in self._sums

    def __getitem__(self, name: str) -> float:
        total, weight = self._sums.get(name, (math.nan, 1.0))
        return total / weight


def _roles(losses: Mapping[str, float]) -> dict[str, float]:
    """The losses of the largest shape, the smallest, and the mean of the random ones, as far as there are some."""
    values = list(losses.values())
    roles = dict(zip(("largest", "smallest"), values, strict=False))
    return roles | ({"random": sum(values[2:]) / len(values[2:])} if values[2:] else {})


def _finite(value: float) -> float | None:
    """JSON knows no infinity and no NaN."""
    return value if math.isfinite(value) else None


@contextmanager
def _writing(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise BadInput(f"{file}: cannot be written ({error.strerror})") from None


def _keep_until(file: Path, step: int) -> None:
    """Drop the lines behind a step, and one that a killed process left half-written."""
    if not file.exists():
        return
    kept = [line for line in file.read_bytes().splitlines(keepends=True) if _step_of(line) <= step]
    with whole_file(file, force=True) as work:
        work.write_bytes(b"".join(kept))


def _step_of(line: bytes) -> float:
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def require_board() -> Any:
    """The class of TensorBoard's writers; raises ToolchainMissing where it is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ToolchainMissing(
            "events for TensorBoard need the package tensorboard, which is not installed; "
            "run pip install 'amoeba-deploy[tensorboard]'"
        ) from None
    return SummaryWriter


def _open_board(folder: Path, start: int) -> Any:
    """TensorBoard's writer, which has it forget what a killed run wrote behind the step ``start``."""
    return require_board()(str(folder), purge_step=start + 1)


def _report(
    board: Any,
    number: int,
    losses: Mapping[str, float],
    roles: Mapping[str, float],
    others: Mapping[str, float],
    speed: float,
) -> None:
    depths: dict[str, list[float]] = {}
    for shape, loss in losses.items():
        depths.setdefault(shape.partition("x")[0], []).append(loss)
    scalars = {f"loss/{role}": loss for role, loss in roles.items()}
    scalars |= {f"loss_by_depth/{depth}": sum(found) / len(found) for depth, found in depths.items()}
    for name, value in (scalars | dict(others) | {"tokens_per_second": speed}).items():
        board.add_scalar(name, value, number)


def time_text(seconds: float) -> str:
    """A time as it is read: 40 s, 12 min, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
