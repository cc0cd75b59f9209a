"""Reads what `run_checkpoints` has written, for evaluation, prediction and export; folders of arrays with a card."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from fsmde_jax import checksums
from fsmde_jax.checkpoint_errors import ANEW, reading, without_warnings, writing
from fsmde_jax.errors import ConfigError, TrainingError
from fsmde_jax.models.projector import PROJECTOR_SCOPE
from fsmde_jax.models.teacher_head import TEACHER_BINS_SCOPE

CHECKPOINTS = "checkpoints"
BEST = "best"

CHECKSUMS = "checksums"  # in the JSON of a step: CRC-32C of what it holds

TRAINING_ONLY = (PROJECTOR_SCOPE, TEACHER_BINS_SCOPE)  # scopes that are trained beside a student, and left behind


def without_companions(model: dict[str, Any]) -> dict[str, Any]:
    """{"params", "batch_stats"} without what was trained beside the student: what is evaluated, kept and exported."""
    return {**model, "params": {key: value for key, value in model["params"].items() if key not in TRAINING_ONLY}}


def _steps(folder: Path) -> list[int]:
    return list(ocp.utils.checkpoint_steps(folder.resolve())) if folder.is_dir() else []


def has_checkpoint(workdir: Path) -> bool:
    """Whether a folder holds any checkpoint of a run."""
    return bool(_steps(workdir / BEST) or _steps(workdir / CHECKPOINTS))


def best_or_latest(workdir: Path) -> str:
    """Which of a run's checkpoints to start from: "best" if an evaluation has chosen one, otherwise "latest"."""
    return "best" if _steps(workdir / BEST) else "latest"


def read_parameters(workdir: Path, which: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Parameters of a run for evaluation, prediction or fine-tuning, whatever devices it was trained on.

    Args:
      workdir: a run's folder.
      which: "best" or "latest".

    Returns:
      ({"params", "batch_stats"} as nested dicts of NumPy arrays, meta, step).

    Raises:
      TrainingError: there is no such checkpoint, or it is damaged.
    """
    folder = workdir / (BEST if which == "best" else CHECKPOINTS)
    steps = _steps(folder)
    if not steps:
        other = "latest" if which == "best" else "best"
        raise TrainingError(
            f"{workdir}: no {which} checkpoint in {folder.name}/; train first (--mode train), choose another --workdir,"
            f" or use --config.eval.checkpoint={other}"
        )
    place = (folder / str(step := max(steps))).resolve()
    with reading(folder / str(step)):
        item = "average" if (place / "average").is_dir() else "model"
        model = _arrays(place / item)
        meta, written = read_meta(place)
        checksums.check({item: model}, written)
    return without_companions(model), meta, step


def read_meta(place: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """(what the step in folder `place` says of itself, its checksums); `ValueError` where it was not written so."""
    meta = json.loads((place / "meta" / "metadata").read_text(encoding="utf-8"))
    written = meta.pop(CHECKSUMS, {})
    checksums.check_json({"meta": meta}, written)
    return meta, written


def _arrays(place: Path) -> Any:
    """Nested dicts of NumPy arrays of one saved item."""
    with without_warnings(), ocp.StandardCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(place).item_metadata
        if shapes is None:
            raise ValueError("its list of arrays cannot be read")
        template = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), dict(shapes.tree))
        return checkpointer.restore(place, template)


def write_tree(folder: Path, tree: Any, card: dict[str, Any]) -> None:
    """Writes arrays and a JSON card as a new folder, under a temporary name until it is whole.

    The card gets the checksum of the arrays, which `read_tree` compares them with.

    Raises:
      ConfigError: there is something at `folder` already.
      TrainingError: it cannot be written.
    """
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; choose another folder or delete it")
    temporary = folder.with_name(f".{folder.name}.unfinished").absolute()
    with writing(folder, ANEW):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(temporary / "model", tree)
            dump_json(temporary / "card.json", {**card, CHECKSUMS: checksums.checksums({"model": tree})})
            temporary.rename(folder)
        finally:
            # Room on a full disk. What threads of tensorstore may still write after it, the next try removes.
            shutil.rmtree(temporary, ignore_errors=True)


def read_tree(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Arrays and card of a folder of `write_tree`.

    Raises:
      TrainingError: it is no such folder, or it is damaged.
    """
    if not (folder / "card.json").is_file():
        raise TrainingError(f"{folder}: no card.json in it")
    with reading(folder):
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        tree = _arrays((folder / "model").resolve())
        checksums.check({"model": tree}, card.pop(CHECKSUMS, {}))
    return tree, card


def dump_json(path: Path, value: Any) -> None:
    """Writes JSON by rename."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)
