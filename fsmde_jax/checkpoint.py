"""Checkpoints of a run: state, data iterator and what the run is made of, in one orbax step each.

`<workdir>/checkpoints/<step>/` holds the newest few for resuming, `<workdir>/best/<step>/` the one best evaluation
(parameters only). Orbax writes to a temporary name and renames, so a step that was killed while being written is never
taken for a whole one.
"""

import json
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from fsmde_jax.errors import ConfigError, TrainingError
from fsmde_jax.state import TrainState

CHECKPOINTS = "checkpoints"
BEST = "best"

# A change of these keys makes another network or other numbers of the same shape; everything else may change on resume.
_FIXED_KEYS = ("model", "data.image_size", "data.cameras", "seed")


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


def check_config(saved: dict[str, Any], config: dict[str, Any], where: str) -> None:
    """Raises `ConfigError` showing every difference that forbids using checkpoint `where` with `config`."""
    found = [d for key in _FIXED_KEYS for d in differences(_select(saved, key), _select(config, key), key)]
    if found:
        lines = "\n  ".join(found)
        raise ConfigError(
            f"{where} was made with another config:\n  {lines}\n"
            "Undo the change, or choose a new --workdir (with --init_from to start from these parameters)."
        )


class Checkpoints:
    """The checkpoints of one run; use as a context manager, so that writing ends before the process does."""

    def __init__(self, workdir: Path, keep: int):
        self.workdir = workdir
        self._latest = _manager(workdir / CHECKPOINTS, keep)
        self._best = _manager(workdir / BEST, 1)

    @property
    def latest_step(self) -> int | None:
        return self._latest.latest_step()

    def save(self, state: TrainState, iterator: Any, meta: dict[str, Any]) -> None:
        """Starts writing one step; `meta` is JSON (identity, best value so far).

        Raises:
          TrainingError: the disk is full or not writable; earlier checkpoints stay as they are.
        """
        step = int(state.step)
        if step in self._latest.all_steps():
            return
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=grain.checkpoint.CheckpointSave(iterator),
            meta=ocp.args.JsonSave(meta),
        )
        try:
            self._latest.wait_until_finished()  # an earlier asynchronous failure surfaces here
            self._latest.save(step, args=arguments)
        except OSError as error:
            raise TrainingError(
                f"{self.workdir}: cannot write checkpoint {step} ({error}); free space and start again"
            ) from error

    def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest (state, meta), on the devices of `state`, which serves as the template."""
        step = self._latest.latest_step()
        template = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(template))
        restored = self._latest.restore(step, args=arguments)
        return restored["state"], self.latest_meta()

    def restore_iterator(self, iterator: Any) -> Any:
        """The data iterator where the newest checkpoint left it."""
        arguments = ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(iterator))
        return self._latest.restore(self._latest.latest_step(), args=arguments)["data"]

    def latest_meta(self) -> dict[str, Any]:
        """The JSON that was saved with the newest checkpoint."""
        arguments = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._latest.restore(self._latest.latest_step(), args=arguments)["meta"]

    def save_best(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Replaces the best checkpoint; the old one is deleted after the new one is whole."""
        step = int(state.step)
        if step in self._best.all_steps():
            return
        inference = {"params": state.params, "batch_stats": state.batch_stats}
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(inference), meta=ocp.args.JsonSave(meta))
        self._best.wait_until_finished()
        self._best.save(step, args=arguments)

    def wait(self) -> None:
        """Returns when everything that was begun is written."""
        self._latest.wait_until_finished()
        self._best.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()
        self._latest.close()
        self._best.close()


def read_parameters(workdir: Path, which: str) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Parameters of a run for evaluation, prediction or fine-tuning.

    Args:
      workdir: a run's folder.
      which: "best" (falls back to nothing: an error says so) or "latest".

    Returns:
      ({"params", "batch_stats"} as nested dicts of host arrays, meta, step).

    Raises:
      TrainingError: there is no such checkpoint.
    """
    folder = workdir / (BEST if which == "best" else CHECKPOINTS)
    steps = ocp.utils.checkpoint_steps(folder.resolve()) if folder.is_dir() else []
    if not steps:
        other = "latest" if which == "best" else "best"
        raise TrainingError(
            f"{workdir}: no {which} checkpoint in {folder.name}/; train first (--mode train), choose another --workdir,"
            f" or use --config.eval.checkpoint={other}"
        )
    with _manager(folder, keep=None) as manager:  # type: ignore[arg-type]
        step = max(steps)
        restored = manager.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
        )
    tree = restored["state"]
    return {"params": tree["params"], "batch_stats": tree["batch_stats"]}, restored["meta"], step


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
