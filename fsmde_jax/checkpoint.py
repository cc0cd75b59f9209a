"""Checkpoints of a run: state, data iterator and what the run is made of, in one orbax step each.

`<workdir>/checkpoints/<step>/` holds the newest few for resuming, `<workdir>/best/<step>/` the one best evaluation
(parameters only). Orbax writes to a temporary name and renames, so a step that was killed while being written is never
taken for a whole one.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import absl.logging
import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from fsmde_jax.errors import ConfigError, TrainingError
from fsmde_jax.models.projector import PROJECTOR_SCOPE
from fsmde_jax.models.teacher_head import TEACHER_BINS_SCOPE
from fsmde_jax.state import TrainState

CHECKPOINTS = "checkpoints"
BEST = "best"

# A change of these keys makes another network or other numbers of the same shape; everything else may change on resume.
_FIXED_KEYS = ("task", "data.image_size", "data.cameras", "seed", "distill")
_FIXED_BY_TASK = {"student": ("model",), "teacher": ("teacher.variant", "teacher.longer_side")}
TRAINING_ONLY = (PROJECTOR_SCOPE, TEACHER_BINS_SCOPE)  # scopes that are trained beside a student, and left behind


def _manager(folder: Path, keep: int) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
    try:
        return ocp.CheckpointManager(folder.resolve(), options=options)
    except OSError as error:
        raise TrainingError(f"{folder}: cannot write here ({error}); choose another --workdir") from error


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """One line per dotted key at which two nested dicts differ, with both values; lists and tuples are the same."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{path}.{key}".strip("."))]
    as_list = [list(v) if isinstance(v, (tuple, list)) else v for v in (old, new)]
    return [] if as_list[0] == as_list[1] else [f"{path}: checkpoint has {old!r}, config has {new!r}"]


def _select(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def model_of(config: dict[str, Any]) -> dict[str, Any]:
    """The section `model` of a saved config. Runs from before `expectation` could be chosen took the mean of depth."""
    return {"expectation": "depth", **config.get("model", {})}


def check_config(saved: dict[str, Any], config: dict[str, Any], where: str) -> None:
    """Raises `ConfigError` showing every difference that forbids using checkpoint `where` with `config`."""
    # Runs of older versions do not say these: they trained students, without a teacher.
    alone = {**config.get("distill", {}), "w_ckd": 0.0, "w_vr": 0.0, "baseline": ""}
    saved, config = ({"task": "student", "distill": alone, **c, "model": model_of(c)} for c in (saved, config))
    taught = any(c["distill"].get(key) for c in (saved, config) for key in ("w_ckd", "w_vr", "baseline"))
    keys = [key for key in _FIXED_KEYS + _FIXED_BY_TASK[config["task"]] if taught or key != "distill"]
    lines = "\n  ".join(d for key in keys for d in differences(_select(saved, key), _select(config, key), key))
    if lines:
        raise ConfigError(
            f"{where} was made with another config:\n  {lines}\n"
            "Undo the change, or choose a new --workdir (with --init_from to start from these parameters)."
        )


@contextlib.contextmanager
def _writing(what: Path) -> Iterator[None]:
    """Turns the many kinds of errors of a failed write (tensorstore raises ValueError) into one message."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise TrainingError(
            f"{what}: cannot write a checkpoint ({reason}); earlier ones are as they were. Free space, or give the"
            " folder write permission, and run the same command again: it resumes."
        ) from error


@contextlib.contextmanager
def _reading(what: Path) -> Iterator[None]:
    """Turns the errors of a damaged checkpoint into one message; our own errors pass."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        raise TrainingError(
            f"{what}: damaged checkpoint ({reason}); delete this folder, then the one before it is used"
        ) from error


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Orbax warns when one item of a step is read by itself, although that is what is wanted."""
    level = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    finally:
        absl.logging.set_verbosity(level)


class Checkpoints:
    """The checkpoints of one run; use as a context manager, so that writing ends before the process does.

    A step holds `model` (parameters and batch statistics), `training` (step and optimiser), `data` (iterator) and
    `meta` (JSON).
    """

    def __init__(self, workdir: Path, keep: int):
        self.workdir = workdir
        self._latest = _manager(workdir / CHECKPOINTS, keep)
        self._best = _manager(workdir / BEST, 1)

    @property
    def latest_step(self) -> int | None:
        return self._latest.latest_step()

    @property
    def best_steps(self) -> list[int]:
        return sorted(self._best.all_steps())

    def save(self, state: TrainState, iterator: Any, meta: dict[str, Any]) -> None:
        """Starts writing one step; `meta` is JSON (identity, best value so far).

        Raises:
          TrainingError: this or an earlier write failed; complete checkpoints stay as they are.
        """
        step = int(state.step)
        if step in self._latest.all_steps():
            return
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(_model(state)),
            training=ocp.args.StandardSave({"step": state.step, "opt_state": state.opt_state}),
            data=grain.checkpoint.CheckpointSave(iterator),
            meta=ocp.args.JsonSave(meta),
        )
        with _writing(self.workdir / CHECKPOINTS):
            self._latest.wait_until_finished()  # an earlier asynchronous failure surfaces here
            self._latest.save(step, args=items)

    def restore(self, state: TrainState, iterator: Any) -> tuple[TrainState, Any]:
        """The newest (state, iterator), on the devices of `state`, which serves as the template.

        Raises:
          TrainingError: the checkpoint is damaged, or the iterator belongs to another layout of the data.
        """
        step = self._latest.latest_step()
        training = {"step": state.step, "opt_state": state.opt_state}
        self._check_shapes(step, state)
        shapes = [jax.tree.map(ocp.utils.to_shape_dtype_struct, tree) for tree in (_model(state), training)]
        items = ocp.args.Composite(
            model=ocp.args.StandardRestore(shapes[0]),
            training=ocp.args.StandardRestore(shapes[1]),
            data=grain.checkpoint.CheckpointRestore(iterator),
        )
        with _reading(self.workdir / CHECKPOINTS / str(step)):
            got = self._latest.restore(step, args=items)
        restored = TrainState(params=got["model"]["params"], batch_stats=got["model"]["batch_stats"], **got["training"])
        return restored, got["data"]

    def _check_shapes(self, step: int | None, state: TrainState) -> None:
        """Raises `ConfigError` where the newest checkpoint holds other trained parameters than `state`."""
        folder = self.workdir / CHECKPOINTS / str(step)
        with _reading(folder), _without_warnings(), ocp.StandardCheckpointer() as checkpointer:
            saved = checkpointer.metadata((folder / "model").resolve()).item_metadata
            if saved is None:
                raise ValueError("its list of arrays cannot be read")
            found = _flat_shapes(dict(saved.tree))
        if lines := differences(found, _flat_shapes(_model(state))):
            shown = "\n  ".join(lines[:10] + [f"and {len(lines) - 10} more"] * (len(lines) > 10))
            raise ConfigError(
                f"{folder} holds other trained parameters than this config:\n  {shown}\nUndo the change (of the"
                " teacher, say), or choose a new --workdir (with --init_from to start from these parameters)."
            )

    def latest_meta(self) -> dict[str, Any]:
        """The JSON that was saved with the newest checkpoint."""
        step = self._latest.latest_step()
        with _reading(self.workdir / CHECKPOINTS / str(step)):
            return self._latest.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def save_best(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Replaces the best checkpoint; the old one is deleted after the new one is whole. Steps must grow."""
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(without_companions(_model(state))), meta=ocp.args.JsonSave(meta)
        )
        with _writing(self.workdir / BEST):
            self._best.wait_until_finished()
            if not self._best.save(int(state.step), args=items):
                raise ValueError(f"step {int(state.step)} is not after {self.best_steps}")

    def forget_best_after(self, step: int) -> None:
        """Deletes best checkpoints of steps that a resumed run has yet to reach: another trajectory wrote them."""
        for old in self.best_steps:
            if old > step:
                self._best.delete(old)

    def wait(self) -> None:
        """Returns when everything that was begun is written (`TrainingError` if that failed)."""
        with _writing(self.workdir):
            self._latest.wait_until_finished()
            self._best.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self.wait()
        for manager in (self._latest, self._best):
            try:
                manager.close()
            except (OSError, ValueError, RuntimeError):
                if error is None:  # else the first error is the one to show
                    raise


def _model(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "batch_stats": state.batch_stats}


def _flat_shapes(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): list(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def without_companions(model: dict[str, Any]) -> dict[str, Any]:
    """{"params", "batch_stats"} without what was trained beside the student: what is evaluated, kept and exported."""
    return {**model, "params": {key: value for key, value in model["params"].items() if key not in TRAINING_ONLY}}


def _steps(folder: Path) -> list[int]:
    return list(ocp.utils.checkpoint_steps(folder.resolve())) if folder.is_dir() else []


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
    with _reading(folder / str(step)):
        model = _arrays(place / "model")
        meta = json.loads((place / "meta" / "metadata").read_text(encoding="utf-8"))
    return without_companions(model), meta, step


def _arrays(place: Path) -> Any:
    """Nested dicts of NumPy arrays of one saved item."""
    with _without_warnings(), ocp.StandardCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(place).item_metadata
        if shapes is None:
            raise ValueError("its list of arrays cannot be read")
        template = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), dict(shapes.tree))
        return checkpointer.restore(place, template)


def write_tree(folder: Path, tree: Any, card: dict[str, Any]) -> None:
    """Writes arrays and a JSON card as a new folder, under a temporary name until it is whole.

    Raises:
      ConfigError: there is something at `folder` already.
      TrainingError: it cannot be written.
    """
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; choose another folder or delete it")
    temporary = folder.with_name(f".{folder.name}.unfinished").absolute()
    with _writing(folder):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(temporary / "model", tree)
        dump_json(temporary / "card.json", card)
        temporary.rename(folder)


def read_tree(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Arrays and card of a folder of `write_tree`.

    Raises:
      TrainingError: it is no such folder, or it is damaged.
    """
    if not (folder / "card.json").is_file():
        raise TrainingError(f"{folder}: no card.json in it")
    with _reading(folder):
        card = json.loads((folder / "card.json").read_text(encoding="utf-8"))
        return _arrays((folder / "model").resolve()), card


def fit_parameters(template: Any, source: Any, where: str) -> Any:
    """`source` placed like `template`, after checking that names and shapes agree.

    Raises:
      TrainingError: listing every missing, extra and misshapen parameter.
    """

    def flat(tree: Any) -> dict[str, Any]:
        return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    wanted, found = flat(template), flat(source)
    problems = [f"missing {name}" for name in sorted(set(wanted) - set(found))]
    problems += [f"not expected {name}" for name in sorted(set(found) - set(wanted))]
    problems += [
        f"{name}: {found[name].shape} instead of {wanted[name].shape}"
        for name in sorted(set(wanted) & set(found))
        if found[name].shape != wanted[name].shape
    ]
    if problems:
        raise TrainingError(f"{where} does not fit this config's model:\n  " + "\n  ".join(problems))
    return jax.tree.map(lambda t, s: jax.device_put(s, t.sharding), template, source)


def dump_json(path: Path, value: Any) -> None:
    """Writes JSON by rename."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)
