"""Scalars and pictures of a run: TensorBoard event files, and one JSON line per log step for everything else."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter


class Writer:
    """Writes `<workdir>/tensorboard/` and `<workdir>/metrics.jsonl`; use as a context manager."""

    def __init__(self, workdir: Path, first_step: int = 1, *, active: bool = True):
        """Opens the files. Lines at or beyond `first_step`, left by an interrupted run, are dropped.

        One of several processes is `active`; the others write nothing.
        """
        self._active = active
        if not active:
            return
        workdir.mkdir(parents=True, exist_ok=True)
        self._path = workdir / "metrics.jsonl"
        _drop_from(self._path, first_step)
        self._lines = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 (closed in __exit__)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)

    def scalars(self, step: int, values: dict[str, Any]) -> None:
        """Writes scalars of one step; names with "/" are grouped by TensorBoard."""
        if not self._active:
            return
        numbers = {name: float(value) for name, value in values.items()}
        for name, number in numbers.items():
            self._board.add_scalar(name, number, step)
        self._lines.write(json.dumps({"step": step, **numbers}) + "\n")
        self._lines.flush()

    def picture(self, step: int, name: str, picture: np.ndarray) -> None:
        """Writes one picture [H, W, 3] uint8."""
        if self._active:
            self._board.add_image(name, picture, step, dataformats="HWC")

    def text(self, name: str, text: str) -> None:
        """Writes one Markdown text, e.g. the config."""
        if self._active:
            self._board.add_text(name, text, 0)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            self._lines.close()
            self._board.close()


def _drop_from(path: Path, step: int) -> None:
    """Keeps the lines before `step`; a line that a kill cut short is dropped too."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    temporary.replace(path)
