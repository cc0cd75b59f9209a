"""The checkpoints that a training run writes and goes on from: state, data iterator and what the run is made of.

`<workdir>/checkpoints/<step>/` holds the newest few for resuming, `<workdir>/best/<step>/` the best evaluation
(parameters only), each one orbax step; earlier best ones stay for as long as a checkpoint is kept that would go on from
them. Orbax writes to a temporary name and renames, so a step that was killed while being written is never taken for a
whole one.
"""

import copy
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from fsmde_jax import checksums
from fsmde_jax.checkpoint import BEST, CHECKPOINTS, CHECKSUMS, read_meta, without_companions
from fsmde_jax.checkpoint_errors import DamagedError, reading, without_warnings, writing
from fsmde_jax.compatible import differences
from fsmde_jax.errors import ConfigError, TrainingError
from fsmde_jax.state import TrainState

DAMAGED = "damaged"  # where a checkpoint goes that cannot be read


def remove_unfinished(workdir: Path) -> None:
    """Deletes what killed runs left half written; to be called where nothing else writes into `workdir`."""
    if removed := _remove_halves(workdir):
        print(f"{workdir}: removed {removed} checkpoint(s) whose writing was interrupted")


def _remove_halves(workdir: Path) -> int:
    left = [path for name in (CHECKPOINTS, BEST) for path in (workdir / name).glob("*.orbax-checkpoint-tmp*")]
    for path in left:
        shutil.rmtree(path, ignore_errors=True)
    return len(left)


def _manager(folder: Path, keep: int | None) -> ocp.CheckpointManager:
    # Of several processes: the end of one manager's write and the begin of another's would meet at one barrier.
    barriers = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=folder.name)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, enable_async_checkpointing=True, multiprocessing_options=barriers,
        single_host_load_and_broadcast=True,  # a file server may not show all processes the same
    )  # fmt: skip
    try:
        return ocp.CheckpointManager(folder.resolve(), options=options)
    except OSError as error:
        raise TrainingError(f"{folder}: cannot write here ({error}); choose another --workdir") from error


class Checkpoints:
    """The checkpoints of one run; use as a context manager, so that writing ends before the process does.

    A step holds `model` (parameters and batch statistics), `average` (theirs, where kept), `training` (step and
    optimiser), `data` (position of the iterator) and `meta` (JSON). With several processes every one calls every
    method, and all see one file system.

    A write that fails in the background costs no more than itself: it is reported, and the next state is tried, and
    waited for. With several processes it is an error, since a broken write leaves orbax's barriers out of step.
    """

    def __init__(self, workdir: Path, keep: int):
        self.workdir = workdir
        self.tried = -1  # the step that was last given to `save`
        self._latest = _manager(workdir / CHECKPOINTS, keep)
        self._best = _manager(workdir / BEST, None)  # `tidy_best` deletes
        self._owing = False  # the last write has failed

    @property
    def latest_step(self) -> int | None:
        return self._latest.latest_step()

    @property
    def best_steps(self) -> list[int]:
        return sorted(self._best.all_steps())

    def failed(self) -> bool:
        """Whether the last write has failed by now, so that the next state should be saved at once. Costs no waiting.

        Several processes might not agree on it, so there it is found out by the next `save`.
        """
        if jax.process_count() == 1 and not self._latest.is_saving_in_progress():
            self._settle()
        return self._owing

    def _settle(self) -> None:
        """Waits for the write that is under way; says its failure (several processes: raises `TrainingError`)."""
        try:
            with writing(self.workdir / CHECKPOINTS):
                self._latest.wait_until_finished()
        except TrainingError as error:
            if jax.process_count() > 1:
                raise
            print(f"warning: {str(error).split('; earlier')[0]}; the next state is tried", file=sys.stderr)
            self._latest.reload()
            self._owing = True

    def save(self, state: TrainState, iterator: Any, meta: dict[str, Any]) -> None:
        """Starts writing one step; `meta` is JSON (identity, best value so far). A step that is there is left alone.

        Raises:
          TrainingError: this write failed at once, or it failed after the one before had; complete checkpoints stay as
            they are. Several processes: an earlier write failed.
        """
        self.tried = step = int(state.step)
        self._settle()
        if step in self._latest.all_steps():
            return
        arrays = {name: ocp.args.StandardSave(tree) for name, tree in _arrays_of(state).items()}
        # The position is the same in every process, and means the same with any number of them.
        position, text = iterator.get_state(), copy.deepcopy(meta)  # JSON is written in the background
        written = checksums.checksums(_arrays_of(state))
        written |= {"data": checksums.of_json(position), "meta": checksums.of_json(text)}
        items = ocp.args.Composite(
            **arrays, data=ocp.args.JsonSave(position), meta=ocp.args.JsonSave({**text, CHECKSUMS: written})
        )
        with writing(self.workdir / CHECKPOINTS):
            if not self._latest.save(step, args=items):
                raise ValueError(f"step {step} is not after {sorted(self._latest.all_steps())}")
            if self._owing:
                self._latest.wait_until_finished()
        self._owing = False

    def restore(
        self, state: TrainState, iterator: Any, check: Callable[[dict[str, Any], str], None] = lambda meta, where: None
    ) -> tuple[TrainState, Any, dict[str, Any]]:
        """The newest whole (state, iterator, meta), on the devices of `state`, which serves as the template.

        A checkpoint that cannot be read, twice, is passed over with a warning for the one before it, and moved to
        `damaged/`. Several processes might not agree on that, so there it is an error.

        Args:
          state: of the shapes and on the devices that are wanted.
          iterator: whose position is set.
          check: (meta, where), called before anything else is read; raises what forbids going on.

        Raises:
          TrainingError: no checkpoint is whole, or the iterator belongs to another layout of the data.
          ConfigError: the checkpoint holds other parameters than `state`.
        """
        damaged: list[tuple[int, DamagedError]] = []
        for step in sorted(self._latest.all_steps(), reverse=True):
            try:
                restored = self._restore(step, state, iterator, check)
            except DamagedError:
                if jax.process_count() > 1:
                    raise
                time.sleep(1)  # a file server may have hesitated
                try:
                    restored = self._restore(step, state, iterator, check)
                except DamagedError as error:
                    damaged.append((step, error))
                    continue
            for bad, why in damaged:
                place = self._set_aside(bad)
                print(f"warning: {str(why).split('; delete')[0]}: moved to {place}", file=sys.stderr)
                print(f"warning: going on from step {step} instead of {bad}", file=sys.stderr)
            return restored
        if len(damaged) > 1:
            raise TrainingError(
                f"{self.workdir / CHECKPOINTS}: all {len(damaged)} checkpoints are damaged; the newest: {damaged[0][1]}"
            )
        raise damaged[0][1] if damaged else TrainingError(f"{self.workdir / CHECKPOINTS}: no checkpoint to go on from")

    def _restore(
        self, step: int, state: TrainState, iterator: Any, check: Callable[[dict[str, Any], str], None]
    ) -> tuple[TrainState, Any, dict[str, Any]]:
        folder = self.workdir / CHECKPOINTS / str(step)
        if list((folder / "data").glob("process_*-of-*.json")):
            raise ConfigError(
                f"{folder}: written by an older version, whose data position cannot be read; start anew from its"
                " parameters: another --workdir, with --init_from"
            )
        read = {name: ocp.args.JsonRestore() for name in ("meta", "data")}
        with reading(folder):
            texts = self._latest.restore(step, args=ocp.args.Composite(**read))
            written = texts["meta"].pop(CHECKSUMS, {})
            checksums.check_json({name: texts[name] for name in read}, written)
        check(texts["meta"], str(folder))
        self._check_shapes(folder, state)
        templates = {
            name: ocp.args.StandardRestore(jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))
            for name, tree in _arrays_of(state).items()
        }
        with reading(folder):
            got = self._latest.restore(step, args=ocp.args.Composite(**templates))
            checksums.check({name: got[name] for name in templates}, written)
        iterator.set_state(texts["data"])
        average = got["average"] if "average" in templates else None
        return TrainState(**got["model"], **got["training"], average=average), iterator, texts["meta"]

    def _set_aside(self, step: int) -> Path:
        """Moves a damaged checkpoint out of the way; where it is now."""
        place, number = self.workdir / DAMAGED / str(step), 1
        while place.exists():
            number += 1
            place = place.with_name(f"{step}_{number}")
        place.parent.mkdir(exist_ok=True)
        (self.workdir / CHECKPOINTS / str(step)).rename(place)
        self._latest.reload()
        return place

    def _check_shapes(self, folder: Path, state: TrainState) -> None:
        """Raises `ConfigError` where a checkpoint holds other arrays than `state`: that is no damage."""
        found, training = (_saved_shapes(folder, name) for name in ("model", "training"))
        if lines := differences(found, _flat_shapes(_model(state))):
            shown = "\n  ".join(lines[:10] + [f"and {len(lines) - 10} more"] * (len(lines) > 10))
            raise ConfigError(
                f"{folder} holds other trained parameters than this config:\n  {shown}\nUndo the change (of the"
                " teacher, say), or choose a new --workdir (with --init_from to start from these parameters)."
            )
        # Names differ between optax's states and what orbax reads of them, shapes and their order do not.
        kept = _flat_shapes(_arrays_of(state)["training"])
        if sorted(training.values()) != sorted(kept.values()):
            raise ConfigError(
                f"{folder} holds the state of another optimiser ({len(training)} arrays, not {len(kept)}): an older"
                " version wrote it; choose a new --workdir (with --init_from to start from these parameters)."
            )

    def save_best(self, state: TrainState, meta: dict[str, Any]) -> None:
        """Writes a best checkpoint and returns when it is whole; those before it stay. Steps must grow.

        Raises:
          TrainingError: it cannot be written; those before it stay as they are.
        """
        model, text = without_companions(state.model), copy.deepcopy(meta)
        written = checksums.checksums({"model": model}) | {"meta": checksums.of_json(text)}
        items = ocp.args.Composite(
            model=ocp.args.StandardSave(model), meta=ocp.args.JsonSave({**text, CHECKSUMS: written})
        )
        with writing(self.workdir / BEST):
            if not self._best.save(int(state.step), args=items):
                raise ValueError(f"step {int(state.step)} is not after {self.best_steps}")
            self._best.wait_until_finished()

    def tidy_best(self) -> None:
        """Deletes the best checkpoints but the newest of all and, for each checkpoint kept, the newest up to it."""
        steps = self.best_steps
        wanted = {max((best for best in steps if best <= kept), default=-1) for kept in self._latest.all_steps()}
        for step in steps[:-1]:
            if step not in wanted:
                self._best.delete(step)

    def best_meta(self) -> dict[str, Any] | None:
        """What the newest best checkpoint says of itself; None if there is none.

        Raises:
          DamagedError: it cannot be read.
        """
        if not self.best_steps:
            return None
        place = self.workdir / BEST / str(self.best_steps[-1])
        with reading(place):
            return read_meta(place)[0]

    def forget_best_after(self, step: int) -> None:
        """Deletes best checkpoints of steps that a resumed run has yet to reach: another trajectory wrote them."""
        for old in self.best_steps:
            if old > step:
                self._best.delete(old)

    def wait(self) -> None:
        """Returns when what was begun is written (`TrainingError` if that failed)."""
        with writing(self.workdir / CHECKPOINTS):
            self._latest.wait_until_finished()

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
        if jax.process_count() == 1:  # of failed writes; not before, since orbax's other threads go on writing then
            _remove_halves(self.workdir)


def _model(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "batch_stats": state.batch_stats}


def _arrays_of(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint that hold arrays."""
    average = {} if state.average is None else {"average": state.average}
    return {"model": _model(state), "training": {"step": state.step, "opt_state": state.opt_state}, **average}


def _saved_shapes(folder: Path, name: str) -> dict[str, Any]:
    """Shapes of the arrays in an item of a checkpoint (`DamagedError` where they are not known)."""
    with reading(folder), without_warnings(), ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata((folder / name).resolve()).item_metadata
        if saved is None:
            raise ValueError("its list of arrays cannot be read")
        return _flat_shapes(dict(saved.tree))


def _flat_shapes(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): list(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
