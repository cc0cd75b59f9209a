"""Scalars and pictures of a run: TensorBoard event files, and one JSON line per log step for everything else."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fsmde_jax.errors import TrainingError

# tensorboardX imports PyTorch where it is installed, to take tensors, too: half of a training's start.
_loaded = "torch" in sys.modules
sys.modules.setdefault("torch", None)  # type: ignore[arg-type]  # None: not to be found
try:
    from tensorboardX import summary
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
finally:
    if not _loaded:
        del sys.modules["torch"]

LOG = "metrics.jsonl"


class Writer:
    """Writes `<workdir>/tensorboard/` and `<workdir>/metrics.jsonl`; use as a context manager.

    Every method raises `TrainingError` where a file cannot be written. Events are written at once, not by the thread
    of tensorboardX's SummaryWriter: on a full disk that one dies, and whoever writes next waits for ever.
    """

    def __init__(self, workdir: Path, first_step: int = 1, *, active: bool = True):
        """Opens the files. Lines at or beyond `first_step`, left by an interrupted run, are dropped.

        One of several processes is `active`; the others write nothing.
        """
        self._active = active
        if not active:
            return
        self._workdir, path, board = workdir, workdir / LOG, workdir / "tensorboard"
        with self._writing():
            board.mkdir(parents=True, exist_ok=True)
            _drop_from(path, first_step)
            self._lines = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
            self._board = EventsWriter(str(board / "events"))
            # TensorBoard hides what an interrupted run wrote at this step and beyond.
            self._event(first_step, session_log=SessionLog(status=SessionLog.START))
            self._board.flush()

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Writes scalars of one step; names with "/" are grouped by TensorBoard."""
        if not self._active:
            return
        numbers = {name: float(value) for name, value in values.items()}
        with self._writing():
            self._lines.write(json.dumps({"step": step, **numbers}) + "\n")
            self._lines.flush()
            for name, number in numbers.items():
                self._event(step, summary=summary.scalar(name, number))
            self._board.flush()

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Writes one picture [H, W, 3] uint8."""
        if self._active:
            with self._writing():
                self._event(step, summary=summary.image(name, picture, dataformats="HWC"))
                self._board.flush()

    def text(self, name: str, text: str) -> None:
        """Writes one Markdown text, e.g. the config."""
        if self._active:
            with self._writing():
                self._event(0, summary=summary.text(name, text))
                self._board.flush()

    def _event(self, step: int, **what: Any) -> None:
        self._board.write_event(Event(wall_time=time.time(), step=step, **what))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{self._workdir}: cannot write the log ({error.strerror or error}); earlier checkpoints stay. Free"
                " space, or give the folder write permission, and run the same command again: it resumes."
            ) from error

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if not self._active:
            return
        for file in (self._lines, self._board):
            try:
                with self._writing():
                    file.close()
            except TrainingError:
                if error is None:  # else the first error is the one to show
                    raise


def was_evaluated(workdir: Path, step: int) -> bool:
    """Whether the log holds an evaluation of this step: its line is written when all of an evaluation is done."""
    path = workdir / LOG
    lines = _lines(path) if path.is_file() else []
    return any(line["step"] == step and any(name.startswith("eval/") for name in line) for _, line in lines)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a log, as text and read; without one that a kill cut short."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            read = json.loads(line)
            if isinstance(read["step"], int):
                yield line, read
        except (json.JSONDecodeError, KeyError, TypeError):
            continue


def _drop_from(path: Path, step: int) -> None:
    """Keeps the lines before `step`; a line that a kill cut short is dropped too."""
    if not path.is_file():
        return
    kept = [line for line, read in _lines(path) if read["step"] < step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)
