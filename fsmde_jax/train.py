"""The training job: stream rigs, step, log, evaluate, checkpoint; resumes by itself where it was interrupted."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from fsmde_jax import (
    build,
    build_teacher,
    checkpoint,
    compatible,
    distributed,
    eval_options,
    evaluate,
    identity,
    optim,
    run_checkpoints,
    run_lock,
    sharding,
    writer,
)
from fsmde_jax.checkpoint_errors import DamagedError
from fsmde_jax.data import pipeline
from fsmde_jax.data.records import Records, shared_scenes
from fsmde_jax.errors import ConfigError, TrainingError
from fsmde_jax.loop import Loop, best_of_what
from fsmde_jax.models.student import ENCODER_SCOPE
from fsmde_jax.run_checkpoints import Checkpoints
from fsmde_jax.state import TrainState, make_predict
from fsmde_jax.students import read_student
from fsmde_jax.teacher import open_teacher


def train(config: ml_collections.ConfigDict, workdir: Path, *, init_from: str = "") -> None:
    """Trains to `config.train.steps`, from the newest checkpoint in `workdir` if there is one.

    Args:
      config: all keys of configs/base.py.
      workdir: receives checkpoints/, best/, tensorboard/, metrics.jsonl, config.json and evaluations.
      init_from: whose parameters start this run (`students.read_student`); ignored on resume.

    Raises:
      FsmdeError: records are missing, the config does not fit a checkpoint, another process trains in `workdir`, the
        loss is not finite; a signal stops it (`Stopped`).
    """
    build.check(config)
    evaluate.check(config)
    eval_options.check_best(config)
    distributed.say(
        f"{jax.device_count()} device(s), {jax.devices()[0].device_kind}, of {jax.process_count()} process(es)"
    )
    _check_batch(config)
    mesh = sharding.make_mesh(config.train.fsdp)
    records, eval_records = build.open_split(config, "train"), build.open_split(config, "eval")
    evaluate.check_records(eval_records, eval_options.options_from(config, limit=config.train.eval_samples))
    _warn_of_leakage(records, eval_records)
    evaluate.note_idle_devices(config.eval.batch_size)
    with run_lock.held(workdir, active=distributed.is_main()) as locked:
        if locked:
            run_checkpoints.remove_unfinished(workdir)
        _train(config, workdir, init_from, mesh, records, eval_records)


def _train(
    config: ml_collections.ConfigDict, workdir: Path, init_from: str, mesh: jax.sharding.Mesh, records: Records,
    eval_records: Records,
) -> None:  # fmt: skip
    distilled = build_teacher.distilled(config, records)
    schedule = optim.learning_rate_schedule(
        lr=config.optim.lr, warmup_steps=config.optim.warmup_steps, steps=config.train.steps,
        final_lr_scale=config.optim.final_lr_scale,
    )  # fmt: skip
    rates = optim.learning_rates(schedule, config.train.steps)
    model, fresh_state, step_fn = build.training(config, mesh, distilled, len(records.cameras))
    fingerprints = {"train": records.fingerprint, "eval": eval_records.fingerprint}
    run_identity = {**identity.run_identity(config.to_dict(), fingerprints), "init_from": init_from}
    run_identity["records"] = {
        "train": identity.named(records.manifests), "eval": identity.named(eval_records.manifests),
    }  # fmt: skip
    run_identity |= {"teacher": distilled.identity} if distilled else {}

    with (
        jax.set_mesh(mesh),
        Checkpoints(workdir, config.train.keep_checkpoints) as checkpoints,
    ):
        state, teacher = fresh_state(), None
        if distilled:
            teacher = jax.device_put(distilled.frozen, sharding.by_size(distilled.frozen, mesh))
        meta: dict[str, Any] = {"identity": run_identity, "best": None, "skipped": 0, "losses": None, "means": None}
        iterator, evaluated = iter(_dataset(config, records, mesh, distilled)), False
        if checkpoints.latest_step is None:
            checkpoints.forget_best_after(0)
            state = _start(config, state, init_from)
            if state.average is not None:  # it starts where the run starts
                begun = {"params": state.params, "batch_stats": state.batch_stats}
                state = dataclasses.replace(state, average=jax.tree.map(jnp.copy, begun))
        else:

            def check(saved: dict[str, Any], where: str) -> None:
                compatible.check_config(saved["identity"]["config"], config.to_dict(), where)
                _check_teacher(saved["identity"].get("teacher"), run_identity.get("teacher"), where)

            state, iterator, saved = checkpoints.restore(state, iterator, check)
            step = int(state.step)
            evaluated = distributed.from_main(writer.was_evaluated(workdir, step) if distributed.is_main() else False)
            # Of this very step, too, where the run ended before its evaluation did: it is made, so written, again.
            checkpoints.forget_best_after(step - (not evaluated))
            meta["best"] = _resumed_best(saved["best"], checkpoints, config, eval_records)
            # Older runs lack some of these.
            meta |= {name: saved[name] for name in ("skipped", "losses", "means") if name in saved}
            distributed.say(f"resuming {workdir} at step {step}")
        if distributed.is_main():
            _write_down(workdir / "config.json", config.to_dict())
            _write_down(workdir / "identity.json", run_identity)
        with writer.Writer(workdir, int(state.step) + 1, active=distributed.is_main()) as log:
            log.text("config", f"```json\n{json.dumps(config.to_dict(), indent=1)}\n```")
            predict = make_predict(model, build.read_fn(config))
            loop = Loop(config, workdir, records, eval_records, predict, checkpoints, log, meta, mesh)
            loop.run(
                state, iterator, lambda state, batch, step: step_fn(state, batch, rates[step - 1], teacher),
                evaluated=evaluated,
            )  # fmt: skip


def _write_down(path: Path, value: Any) -> None:
    try:
        checkpoint.dump_json(path, value)
    except OSError as error:
        raise TrainingError(
            f"{path}: cannot write ({error.strerror}); free space, or choose another --workdir"
        ) from error


def _check_batch(config: ml_collections.ConfigDict) -> None:
    """Raises `ConfigError` where a batch, or each of its parts, cannot be divided over the devices."""
    devices, parts = jax.device_count(), config.train.batch_parts
    pipeline.check_batch_size(config.data.batch_size, devices)
    if config.data.batch_size % (parts * devices):
        raise ConfigError(
            f"train.batch_parts = {parts}: data.batch_size = {config.data.batch_size} cannot be divided into so many"
            f" parts on {devices} device(s); choose a batch size that is a multiple of {parts * devices}"
        )


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
        distributed.say(
            f"warning: {len(shared)} of {len(eval_records.manifest.scenes)} scenes of data.eval_records are in"
            f" data.train_records too, e.g. {shared[0]!r}: the evaluation is no measure of unseen streets",
            warning=True,
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
        distributed.say(f"starting from {said}")
        changed = compatible.differences(
            compatible.model_of(meta["identity"]["config"]), config.model.to_dict(), "model"
        )
        if changed:
            distributed.say("note: the same parameters will mean something else, because\n  " + "\n  ".join(changed))
        own = checkpoint.without_companions({"params": state.params, "batch_stats": state.batch_stats})
        fitted = compatible.fit_parameters(own, tree, init_from)
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
        fitted = compatible.fit_parameters(state.params, teacher.params, config.teacher.weights)
        return dataclasses.replace(state, params=fitted)
    pretrained = build.encoder_weights(config)
    if pretrained is None:
        return state
    where = config.train.encoder_weights
    encoder = {"params": state.params[ENCODER_SCOPE], "batch_stats": state.batch_stats[ENCODER_SCOPE]}
    fitted = compatible.fit_parameters(encoder, {"params": pretrained[0], "batch_stats": pretrained[1]}, where)
    return dataclasses.replace(
        state,
        params={**state.params, ENCODER_SCOPE: fitted["params"]},
        batch_stats={**state.batch_stats, ENCODER_SCOPE: fitted["batch_stats"]},
    )


def _resumed_best(
    saved: dict[str, Any] | None, checkpoints: Checkpoints, config: ml_collections.ConfigDict, eval_records: Records
) -> dict[str, Any] | None:
    """The best so far of a resumed run: what its newest best checkpoint says, unless it was measured in another way.

    `saved`: the best before the step that the run goes on from.
    """
    try:
        meta = checkpoints.best_meta()
    except DamagedError as error:
        distributed.say(f"warning: {error}\nwarning: the best checkpoint is chosen anew", warning=True)
        return None
    if meta is None:
        if saved is not None:
            distributed.say(f"note: the best checkpoint, of step {saved['step']}, is gone: the best is chosen anew")
        return None
    best: dict[str, Any] = meta["best"]
    measured = {"drop_cameras": [], **best["measured"]}  # older runs do not say it
    if measured != best_of_what(config, eval_records):
        distributed.say(
            "note: evaluations are measured in another way than before, so the best checkpoint is chosen anew"
        )
        return None
    return best
