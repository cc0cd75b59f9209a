"""The training loop: step after step, log, evaluations and checkpoints, and what is done when something is wrong."""

import sys
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from fsmde_jax import evaluate, sharding
from fsmde_jax.data.records import Records
from fsmde_jax.errors import ConfigError, TrainingError
from fsmde_jax.history import Losses, Means
from fsmde_jax.preemption import Stopped, StopSignal
from fsmde_jax.run_checkpoints import Checkpoints
from fsmde_jax.state import Metrics, TrainState, is_finite
from fsmde_jax.writer import Writer


class Loop:
    """One run's loop. An object instead of a dozen arguments."""

    def __init__(
        self, config: ml_collections.ConfigDict, workdir: Path, records: Records, eval_records: Records, predict: Any,
        checkpoints: Checkpoints, writer: Writer, meta: dict[str, Any], mesh: jax.sharding.Mesh,
    ):  # fmt: skip
        """`meta` goes into every checkpoint: identity, best, skipped (steps so far), losses, means."""
        self.config, self.workdir, self.records, self.eval_records = config, workdir, records, eval_records
        self.predict, self.checkpoints, self.writer, self.meta = predict, checkpoints, writer, meta
        self.mesh, self.losses, self.means = mesh, Losses(meta["losses"]), Means(meta["means"])
        # What a step leaves: the state, None while a step has its memory; its numbers, until they are looked at.
        self._state: TrainState | None = None
        self._previous: tuple[int, Metrics, np.ndarray] | None = None
        self._too_many: TrainingError | None = None  # more steps were skipped than is allowed

    def run(self, state: TrainState, iterator: Any, step_fn: Any, *, evaluated: bool) -> None:
        """Trains `state` to the last step; `evaluated`: the evaluation due at its step, if any, was made.

        Raises:
          Stopped: by a signal; the step is saved.
          FsmdeError: training cannot go on. The state is saved if it is whole; of several processes where all agree.
        """
        if self.meta["skipped"] > (allowed := self.config.train.max_skipped_steps):
            raise TrainingError(
                f"{self.workdir}: {self.meta['skipped']} steps of this run were not finite and left out, and"
                f" train.max_skipped_steps = {allowed}; to go on from step {int(state.step)}, raise it (and look at the"
                " records that were named, or lower optim.lr)"
            )
        start, self._state = int(state.step), state
        with StopSignal(self.mesh) as stop:
            try:
                self._steps(state, iterator, step_fn, stop, evaluated)
            except Exception as error:
                self._rescue(start, iterator, error)
                raise

    def _steps(self, state: TrainState, iterator: Any, step_fn: Any, stop: StopSignal, evaluated: bool) -> None:
        """Order of a step: dispatch, look at the previous step's numbers, log, checkpoint, evaluate."""
        train, steps, start = self.config.train, self.config.train.steps, int(state.step)
        silent = True if jax.process_index() else None  # None: as the terminal is
        bar = tqdm(total=steps, initial=start, desc="train", unit="step", disable=silent, dynamic_ncols=True)
        clock = _Clock(start, steps, self.config.data.batch_size)
        if start and self._is_due(start) and not evaluated:  # the run ended before it
            self._evaluate(state, start, stop)
            clock.restart(start)
        for step in range(start + 1, steps + 1):
            asked = time.monotonic()
            batch = next(iterator)
            clock.waited += time.monotonic() - asked
            indices = batch.pop("record_index")
            self._state = None
            state, metrics = step_fn(state, batch, step)
            self._state = state
            before, self._previous = self._previous, (step, metrics, indices)
            if before is not None:
                self._look_at(*before)
            bar.update()
            last = step == steps
            if step == start + 1:
                jax.block_until_ready(metrics)
                self._say(f"step {step}: compiled and run in {clock.restart(step):.0f} s")
                stop.listen()  # until now nothing could be lost
            if step % train.log_every == 0 or last:
                self._log(step, metrics, clock, bar)
            signal, due = stop.reached(), last or step % train.checkpoint_every == 0
            saves = due or signal or self._too_many or self.checkpoints.failed()
            evaluates = self._is_due(step) and not signal and not self._too_many
            if saves or evaluates:  # what was skipped until now belongs into the checkpoint
                self._look_back()
            if self._too_many:
                self._end_with(self._too_many, state, iterator)
            if saves:
                self._save(state, iterator)
            if signal:
                self._stop(step, signal)
            try:
                if evaluates:
                    self._evaluate(state, step, stop)
                    clock.restart(step)
            except Stopped as told:
                self._save(state, iterator)
                self._stop(step, told.number)
            if train.picture_every and (step % train.picture_every == 0 or last):
                self._picture(state, step)
                clock.restart(step)
        bar.close()
        self.checkpoints.wait()
        if signal := stop.reached(now=True):
            self._stop(steps, signal)

    def _save(self, state: TrainState, iterator: Any) -> None:
        self.checkpoints.save(state, iterator, self._meta_now())

    def _meta_now(self) -> dict[str, Any]:
        return {**self.meta, "losses": self.losses.kept, "means": self.means.kept}

    def _stop(self, step: int, signal: int) -> None:
        self.checkpoints.wait()
        raise Stopped(
            f"stopped by signal {signal} after step {step}; its checkpoint is written, and the same command goes on"
            " from there",
            signal,
        )

    def _end_with(self, error: TrainingError, state: TrainState, iterator: Any) -> None:
        """Raises an error that all processes have, after saving the state."""
        try:
            self._save(state, iterator)
            self.checkpoints.wait()
        except TrainingError as second:
            print(f"warning: step {int(state.step)} is not saved: {second}", file=sys.stderr)
        raise error

    def _rescue(self, start: int, iterator: Any, error: Exception) -> None:
        """Saves the state that an error has left, if it is whole and not saved yet; the error is raised after it."""
        alone = jax.process_count() == 1
        if isinstance(error, Stopped) or not (alone or getattr(error, "agreed", False)) or self._state is None:
            return
        try:
            self._look_back()
            step = int(self._state.step)
            if step in (start, self.checkpoints.tried) or not is_finite(self._state):
                return
            self._save(self._state, iterator)
            self.checkpoints.wait()
        except Exception as second:
            reason = str(second).strip().splitlines()[0] if str(second).strip() else type(second).__name__
            print(f"warning: nor can the state be saved: {reason}", file=sys.stderr)
        else:
            self._say(f"step {step} is saved; the same command goes on from there")

    def _warn(self, text: str) -> None:
        """Of several processes each names the records that it has read."""
        tqdm.write(text if jax.process_count() == 1 else f"process {jax.process_index()}: {text}")

    def _say(self, text: str) -> None:
        if jax.process_index() == 0:
            tqdm.write(text)

    def _log(self, step: int, metrics: Metrics, clock: "_Clock", bar: tqdm) -> None:
        now = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.means.add(step, now)
        values = self.means.take(now)
        lap = clock.lap(step)
        speed = {"train/rigs_per_second": lap[0], "train/input_share": lap[2]} if lap else {}
        finite = {f"train/{name}": value for name, value in values.items() if np.isfinite(value)}
        self.writer.scalars(step, {**finite, "train/skipped_steps": self.meta["skipped"], **speed})
        terms = "  ".join(f"{k} {v:.4g}" for k, v in values.items() if k != "skipped")
        self._say(
            f"step {step}/{self.config.train.steps}  {terms}" + (f"  {lap[0]:.2f} rigs/s  ETA {lap[1]}" if lap else "")
        )
        bar.set_postfix(loss=f"{values['loss']:.4f}")

    def _look_back(self) -> None:
        """Looks at the last step's numbers, if that has not been done."""
        before, self._previous = self._previous, None
        if before is not None:
            self._look_at(*before)

    def _look_at(self, step: int, metrics: Metrics, indices: np.ndarray) -> None:
        """Counts a step that was skipped, and says it; says a spike of the loss.

        More of them than `train.max_skipped_steps` end the run after the step that has begun meanwhile.
        """
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.means.add(step, values)
        if not values["skipped"]:
            if times := self.losses.spike(values["loss"], labelled=values.get("valid_pixels") != 0):
                self.writer.scalars(step, {"train/loss_spike": times})
                self._warn(
                    f"warning: step {step}: loss {values['loss']:.4g} is {times:.1f} times the median of the last ones;"
                    f" its rigs:\n  {self._rigs(indices)}"
                )
            return
        self.meta["skipped"] += 1
        terms = ", ".join(f"{name} = {value:g}" for name, value in values.items() if name != "skipped")
        what = f"step {step}: the loss or its gradient is not finite ({terms}).\nRigs of this step:\n  "
        allowed = self.config.train.max_skipped_steps
        if self.meta["skipped"] > allowed and self._too_many is None:
            who = f"process {jax.process_index()}: " if jax.process_count() > 1 else ""
            self._too_many = TrainingError(
                f"{who}{what}{self._rigs(indices)}\n{self.meta['skipped']} such steps in this run,"
                f" train.max_skipped_steps = {allowed} are left out.\nThe newest checkpoint has nothing of this step."
                " Look at these records (python -m data_prep.verify), or lower optim.lr; to go on, raise"
                " train.max_skipped_steps, too."
            )
            self._too_many.agreed = True  # the numbers are the same in all processes
            return
        self._warn(
            f"warning: {what}{self._rigs(indices)}\nIt is left out ({self.meta['skipped']} of at most {allowed})."
        )

    def _rigs(self, indices: np.ndarray) -> str:
        """The records of a step: those that this process has read."""
        return "\n  ".join(f"{self.records.where(int(i))}: sample {self.records[int(i)].sample_id}" for i in indices)

    def _is_due(self, step: int) -> bool:
        """Whether an evaluation belongs to this step."""
        every = self.config.train.eval_every
        return step == self.config.train.steps or bool(every and step % every == 0)

    def _evaluate(self, state: TrainState, step: int, stop: StopSignal) -> None:
        """One evaluation. Its line in the log comes last: a run that ends before it makes the evaluation up."""
        options = evaluate.options_from(self.config, limit=self.config.train.eval_samples)
        predict = self._predict_with(state)
        flat = evaluate.evaluate(predict, self.eval_records, options, stop=stop.reached).flat()
        name = self.config.eval.best_metric
        if name not in flat:  # a range without ground truth, say
            error = ConfigError(f"eval.best_metric = {name!r}: these records give only {', '.join(sorted(flat))}")
            error.agreed = True
            raise error
        value, best = flat[name], self.meta["best"]
        self._say(f"step {step}: {name} = {value:.4f}" + (f" (best so far {best['value']:.4f})" if best else ""))
        if np.isfinite(value) and (best is None or value < best["value"]):
            measured = best_of_what(self.config, self.eval_records)
            best = {"value": value, "step": step, "measured": measured}
            self.checkpoints.save_best(state, {**self._meta_now(), "best": best})
            self.meta["best"] = best
        self.writer.scalars(step, {f"eval/{name}": value for name, value in flat.items()})
        self.checkpoints.tidy_best()

    def _picture(self, state: TrainState, step: int) -> None:
        predict = self._predict_with(state)
        if jax.process_index() == 0:
            options = evaluate.options_from(self.config)
            self.writer.picture(step, "eval/panorama", evaluate.picture_of(predict, self.eval_records, 0, options))

    def _predict_with(self, state: TrainState) -> Any:
        """The predictor of this process, by the moving averages where they are kept."""
        model = sharding.whole_here(state.model, self.mesh)

        def predict(batch: dict[str, Any]) -> Any:
            with jax.set_mesh(sharding.mesh_here(self.mesh)):
                return self.predict(model["params"], model["batch_stats"], sharding.spread(batch))

        return predict


def best_of_what(config: ml_collections.ConfigDict, eval_records: Records) -> dict[str, Any]:
    """What a best value was measured by: values of another kind are not compared with it."""
    keys = ("protocol", "ground_truth", "min_depth", "max_depth", "flip_tta", "drop_cameras")
    measured = {key: list(value) if isinstance(value := config.eval[key], tuple) else value for key in keys}
    return {
        "metric": config.eval.best_metric, "records": eval_records.fingerprint, "samples": config.train.eval_samples,
        "image_size": list(config.data.image_size), **measured,
    }  # fmt: skip


class _Clock:
    """Rigs per second since the last lap, without compilation, evaluations and pictures, and the time left."""

    def __init__(self, start: int, steps: int, batch_size: int):
        self._step, self._steps, self._batch, self._time = start, steps, batch_size, time.monotonic()
        self.waited = 0.0  # seconds for data in this lap

    def restart(self, step: int) -> float:
        """Starts a new lap at `step`; returns the seconds since the last one began."""
        now = time.monotonic()
        passed, self._step, self._time, self.waited = now - self._time, step, now, 0.0
        return passed

    def lap(self, step: int) -> tuple[float, str, float] | None:
        """Ends a lap: (rigs per second in it, time left as h:mm:ss, share of it that was waited for data); None if it
        holds no step."""
        count, waited = step - self._step, self.waited
        passed = self.restart(step)
        if count == 0 or passed <= 0:
            return None
        left = int(passed / count * (self._steps - step))
        return count * self._batch / passed, f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}", waited / passed
