"""The training job: stream rigs, step, log, evaluate, checkpoint; resumes by itself where it was interrupted."""

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from fsmde_jax import build, build_teacher, checkpoint, eval_options, evaluate, identity, optim, sharding
from fsmde_jax.checkpoint import Checkpoints
from fsmde_jax.data import pipeline
from fsmde_jax.data.records import Records, shared_scenes
from fsmde_jax.errors import ConfigError, TrainingError
from fsmde_jax.models.student import ENCODER_SCOPE
from fsmde_jax.state import Metrics, TrainState, init_state, make_predict, make_train_step
from fsmde_jax.students import read_student
from fsmde_jax.teacher import open_teacher
from fsmde_jax.writer import Writer


def train(config: ml_collections.ConfigDict, workdir: Path, *, init_from: str = "") -> None:
    """Trains to `config.train.steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
      config: all keys of configs/base.py.
      workdir: receives checkpoints/, best/, tensorboard/, metrics.jsonl, config.json and evaluations.
      init_from: whose parameters start this run (`students.read_student`); ignored on resume.

    Raises:
      FsmdeError: records are missing, the config does not fit a checkpoint, or the loss is not finite.
    """
    build.check(config)
    evaluate.check(config)
    eval_options.check_best(config)
    pipeline.check_batch_size(config.data.batch_size, jax.device_count())
    records, eval_records = build.open_split(config, "train"), build.open_split(config, "eval")
    evaluate.check_records(eval_records, eval_options.options_from(config, limit=config.train.eval_samples))
    _warn_of_leakage(records, eval_records)
    distilled = build_teacher.distilled(config, records)
    mesh = sharding.make_mesh()
    model = build.build_model(config)
    schedule = optim.learning_rate_schedule(
        lr=config.optim.lr, warmup_steps=config.optim.warmup_steps, steps=config.train.steps,
        final_lr_scale=config.optim.final_lr_scale,
    )  # fmt: skip
    rates = optim.learning_rates(schedule, config.train.steps)
    optimizer = optim.make_optimizer(
        weight_decay=config.optim.weight_decay, clip_norm=config.optim.clip_norm,
        encoder_lr_scale=config.optim.encoder_lr_scale,
    )  # fmt: skip
    fingerprints = {"train": records.fingerprint, "eval": eval_records.fingerprint}
    run_identity = {**identity.run_identity(config.to_dict(), fingerprints), "init_from": init_from}
    run_identity |= {"teacher": distilled.identity} if distilled else {}

    with (
        jax.set_mesh(mesh),
        Checkpoints(workdir, config.train.keep_checkpoints) as checkpoints,
    ):
        image_size, companions = tuple(config.data.image_size), distilled.loss.companions if distilled else None
        state = init_state(model, optimizer, config.seed, len(records.cameras), image_size, mesh, companions)
        teacher = jax.device_put(distilled.frozen, sharding.replicated(mesh)) if distilled else None
        meta: dict[str, Any] = {"identity": run_identity, "best": None}
        iterator = iter(_dataset(config, records, mesh, distilled))
        if checkpoints.latest_step is None:
            state = _start(config, state, init_from)
        else:
            saved = checkpoints.latest_meta()
            where = f"{workdir}/{checkpoint.CHECKPOINTS}/{checkpoints.latest_step}"
            checkpoint.check_config(saved["identity"]["config"], config.to_dict(), where)
            _check_teacher(saved["identity"].get("teacher"), run_identity.get("teacher"), where)
            state, iterator = checkpoints.restore(state, iterator)
            checkpoints.forget_best_after(int(state.step))
            meta["best"] = _resumed_best(saved["best"], checkpoints, config, eval_records)
            print(f"resuming {workdir} at step {int(state.step)}")
        checkpoint.dump_json(workdir / "config.json", config.to_dict())
        checkpoint.dump_json(workdir / "identity.json", run_identity)
        with Writer(workdir, int(state.step) + 1) as writer:
            writer.text("config", f"```json\n{json.dumps(config.to_dict(), indent=1)}\n```")
            step_fn = make_train_step(model, optimizer, build.loss_fn(config, distilled))
            run = _Run(
                config,
                workdir,
                records,
                eval_records,
                make_predict(model, build.read_fn(config)),
                checkpoints,
                writer,
                meta,
            )
            run.loop(state, iterator, lambda state, batch, step: step_fn(state, batch, rates[step - 1], teacher))


def _check_teacher(saved: dict[str, Any] | None, current: dict[str, Any] | None, where: str) -> None:
    """Raises `ConfigError` where a run would go on with another teacher than it began with."""
    names = ("sha256", "size")
    before, now = ([teacher[name] for name in names] if teacher else [] for teacher in (saved, current))
    if before != now:
        raise ConfigError(
            f"{where} was taught by another teacher (SHA-256, input size: {before}) than teacher.weights and"
            f" teacher.longer_side give now ({now}).\nUndo the change, or choose a new --workdir (with --init_from)."
        )


def _warn_of_leakage(records: Records, eval_records: Records) -> None:
    shared = shared_scenes(records, eval_records)
    if shared:
        print(
            f"warning: {len(shared)} of {len(eval_records.manifest.scenes)} scenes of data.eval_records are in"
            f" data.train_records too, e.g. {shared[0]!r}: the evaluation is no measure of unseen streets",
            file=sys.stderr,
        )


def _dataset(
    config: ml_collections.ConfigDict,
    records: Records,
    mesh: jax.sharding.Mesh,
    distilled: build_teacher.Distilled | None,
) -> Any:
    dataset = pipeline.train_dataset(
        records, image_size=tuple(config.data.image_size), batch_size=config.data.batch_size, seed=config.seed,
        augment=build.augment_options(config), num_threads=config.data.num_threads,
        use_extra_sweeps=config.data.use_extra_sweeps, label_fraction=config.data.label_fraction,
        limit=config.data.train_samples, labelled=config.data.labelled_samples,
        unlabelled=distilled is not None,
        dense_depth=config.data.dense_depth,
        process_index=jax.process_index(), process_count=jax.process_count(),
        clean_images=distilled is not None and distilled.cache is None,
        teacher_cache=distilled.cache if distilled else None,
    )  # fmt: skip
    if config.task == "student" and config.data.dense_depth:  # a teacher's loss takes `dense_depth` itself
        dataset = dataset.map(
            lambda batch: {k: v for k, v in batch.items() if k != "dense_depth"} | {"depth": batch["dense_depth"]}
        )
    return pipeline.to_device(dataset, sharding.batch_sharding(mesh), prefetch=config.data.prefetch)


def _start(config: ml_collections.ConfigDict, state: TrainState, init_from: str) -> TrainState:
    """Parameters of a new run: another run's, a teacher's, ImageNet's for the encoder, or the random ones."""
    if init_from:
        tree, meta, said = read_student(init_from)
        print(f"starting from {said}")
        changed = checkpoint.differences(
            checkpoint.model_of(meta["identity"]["config"]), config.model.to_dict(), "model"
        )
        if changed:
            print("note: the same parameters will mean something else, because\n  " + "\n  ".join(changed))
        own = checkpoint.without_companions({"params": state.params, "batch_stats": state.batch_stats})
        fitted = checkpoint.fit_parameters(own, tree, init_from)
        params = {**state.params, **fitted["params"]}  # a projector starts anew
        return dataclasses.replace(state, params=params, batch_stats=fitted["batch_stats"])
    if config.task == "teacher" and config.teacher.weights:
        teacher = open_teacher(config.teacher.weights)
        card, wanted = teacher.card, config.teacher.variant
        if card.student:
            raise ConfigError(
                f"teacher.weights = {config.teacher.weights!r}: a student; a teacher starts from a teacher"
            )
        if (card.variant, card.version, card.max_depth) != (wanted, 2, None):
            kind = "relative" if card.max_depth is None else "metric"
            raise ConfigError(
                f"teacher.weights = {config.teacher.weights!r}: a {kind} {card.variant} of version {card.version}, but"
                f" a relative {wanted} of version 2 is trained; set teacher.variant, or choose other weights"
            )
        fitted = checkpoint.fit_parameters(state.params, teacher.params, config.teacher.weights)
        return dataclasses.replace(state, params=fitted)
    pretrained = build.encoder_weights(config)
    if pretrained is None:
        return state
    where = config.train.encoder_weights
    encoder = {"params": state.params[ENCODER_SCOPE], "batch_stats": state.batch_stats[ENCODER_SCOPE]}
    fitted = checkpoint.fit_parameters(encoder, {"params": pretrained[0], "batch_stats": pretrained[1]}, where)
    return dataclasses.replace(
        state,
        params={**state.params, ENCODER_SCOPE: fitted["params"]},
        batch_stats={**state.batch_stats, ENCODER_SCOPE: fitted["batch_stats"]},
    )


def _best_of_what(config: ml_collections.ConfigDict, eval_records: Records) -> dict[str, Any]:
    """What a best value was measured by: values of another kind are not compared with it."""
    keys = ("protocol", "ground_truth", "min_depth", "max_depth", "flip_tta", "drop_cameras")
    measured = {key: list(value) if isinstance(value := config.eval[key], tuple) else value for key in keys}
    return {
        "metric": config.eval.best_metric, "records": eval_records.fingerprint, "samples": config.train.eval_samples,
        "image_size": list(config.data.image_size), **measured,
    }  # fmt: skip


def _resumed_best(
    saved: dict[str, Any] | None, checkpoints: Checkpoints, config: ml_collections.ConfigDict, eval_records: Records
) -> dict[str, Any] | None:
    """The best so far of a resumed run, unless its checkpoint is gone or it was measured in another way."""
    if saved is None or saved["step"] not in checkpoints.best_steps:
        return None
    measured = {"drop_cameras": [], **saved["measured"]}  # older runs do not say it
    if measured != _best_of_what(config, eval_records):
        print("note: evaluations are measured in another way than before, so the best checkpoint is chosen anew")
        return None
    return saved


class _Run:
    """What the loop needs besides the state. One object instead of a dozen arguments."""

    def __init__(
        self, config: ml_collections.ConfigDict, workdir: Path, records: Records, eval_records: Records, predict: Any,
        checkpoints: Checkpoints, writer: Writer, meta: dict[str, Any],
    ):  # fmt: skip
        self.config, self.workdir, self.records, self.eval_records = config, workdir, records, eval_records
        self.predict, self.checkpoints, self.writer, self.meta = predict, checkpoints, writer, meta

    def loop(self, state: TrainState, iterator: Any, step_fn: Any) -> None:
        """Order of a step: dispatch, look at the previous step's numbers, then log, evaluate, checkpoint."""
        train, steps = self.config.train, self.config.train.steps
        start = int(state.step)
        bar = tqdm(total=steps, initial=start, desc="train", unit="step", disable=None, dynamic_ncols=True)
        clock, previous = _Clock(start, steps, self.config.data.batch_size), None
        for step in range(start + 1, steps + 1):
            batch = next(iterator)
            indices = batch.pop("record_index")
            state, metrics = step_fn(state, batch, step)
            if previous is not None:
                self._check_finite(*previous)
            previous = (step, metrics, indices)
            bar.update()
            last = step == steps
            if step == start + 1:
                jax.block_until_ready(metrics)
                tqdm.write(f"step {step}: compiled and run in {clock.restart(step):.0f} s")
            if step % train.log_every == 0 or last:
                self._log(step, metrics, clock, bar)
            # Nothing is evaluated or saved before its own numbers are known to be finite.
            if last or (train.eval_every and step % train.eval_every == 0):
                self._check_finite(*previous)
                self._evaluate(state, step)
                clock.restart(step)
            if train.picture_every and (step % train.picture_every == 0 or last):
                self._picture(state, step)
                clock.restart(step)
            if step % train.checkpoint_every == 0 or last:
                self._check_finite(*previous)
                self.checkpoints.save(state, iterator, self.meta)
        bar.close()
        self.checkpoints.wait()

    def _log(self, step: int, metrics: Metrics, clock: "_Clock", bar: tqdm) -> None:
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        lap = clock.lap(step)
        speed = {"train/rigs_per_second": lap[0]} if lap else {}
        self.writer.scalars(step, {**{f"train/{k}": v for k, v in values.items()}, **speed})
        terms = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        tqdm.write(
            f"step {step}/{self.config.train.steps}  {terms}" + (f"  {lap[0]:.2f} rigs/s  ETA {lap[1]}" if lap else "")
        )
        bar.set_postfix(loss=f"{values['loss']:.4f}")

    def _check_finite(self, step: int, metrics: Metrics, indices: np.ndarray) -> None:
        values = jax.device_get(metrics)
        if all(np.isfinite(value).all() for value in values.values()):
            return
        rigs = "\n  ".join(f"{self.records.where(int(i))}: sample {self.records[int(i)].sample_id}" for i in indices)
        terms = ", ".join(f"{name} = {float(value):g}" for name, value in values.items())
        raise TrainingError(
            f"step {step}: the loss or its gradient is not finite ({terms}).\nRigs of this step:\n  {rigs}\n"
            "The newest checkpoint is from before this step. Look at these records (python -m data_prep.verify), or"
            " lower optim.lr."
        )

    def _evaluate(self, state: TrainState, step: int) -> None:
        options = evaluate.options_from(self.config, limit=self.config.train.eval_samples)
        flat = evaluate.evaluate(self._predict_with(state), self.eval_records, options).flat()
        self.writer.scalars(step, {f"eval/{name}": value for name, value in flat.items()})
        name = self.config.eval.best_metric
        if name not in flat:  # a range without ground truth, say
            raise ConfigError(f"eval.best_metric = {name!r}: these records give only {', '.join(sorted(flat))}")
        value, best = flat[name], self.meta["best"]
        tqdm.write(f"step {step}: {name} = {value:.4f}" + (f" (best so far {best['value']:.4f})" if best else ""))
        if np.isfinite(value) and (best is None or value < best["value"]):
            measured = _best_of_what(self.config, self.eval_records)
            self.meta["best"] = {"value": value, "step": step, "measured": measured}
            self.checkpoints.save_best(state, self.meta)

    def _picture(self, state: TrainState, step: int) -> None:
        options = evaluate.options_from(self.config)
        picture = evaluate.picture_of(self._predict_with(state), self.eval_records, 0, options)
        self.writer.picture(step, "eval/panorama", picture)

    def _predict_with(self, state: TrainState) -> Any:
        return lambda batch: self.predict(state.params, state.batch_stats, sharding.spread(batch))


class _Clock:
    """Rigs per second since the last lap, without compilation, evaluations and pictures, and the time left."""

    def __init__(self, start: int, steps: int, batch_size: int):
        self._step, self._steps, self._batch, self._time = start, steps, batch_size, time.monotonic()

    def restart(self, step: int) -> float:
        """Starts a new lap at `step`; returns the seconds since the last one began."""
        now = time.monotonic()
        passed, self._step, self._time = now - self._time, step, now
        return passed

    def lap(self, step: int) -> tuple[float, str] | None:
        """Ends a lap: (rigs per second in it, time left as h:mm:ss); None if it holds no step."""
        count = step - self._step
        passed = self.restart(step)
        if count == 0 or passed <= 0:
            return None
        left = int(passed / count * (self._steps - step))
        return count * self._batch / passed, f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
