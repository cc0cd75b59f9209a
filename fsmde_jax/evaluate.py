"""The evaluation job: records through a predictor, measured by one protocol of docs/protocol.md."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from fsmde_jax import affine, build, compatible, distributed, geometry, identity, sharding, trivial
from fsmde_jax.confidence import Confidence, measure
from fsmde_jax.data import pipeline, transforms
from fsmde_jax.data.records import Records, require_dense_depth, select_cameras
from fsmde_jax.data.schema import RigSample
from fsmde_jax.errors import DataError, TrainingError
from fsmde_jax.eval_data import check_records, dense_maps, flip_batch, hide_cameras, label_maps, split_cameras
from fsmde_jax.eval_options import EvalOptions, check, options_from
from fsmde_jax.preemption import Stopped
from fsmde_jax.protocols import PointRule, SurroundProtocol, VfdepthProtocol
from fsmde_jax.results import Results
from fsmde_jax.state import make_predict
from fsmde_jax.students import read_student
from fsmde_jax.viz.panorama import panorama

VFDEPTH_BATCH = 4  # rigs whose pixels P2 pools
# Device batch -> [B, N, H, W]: pred_depth in metres; relative inverse depth where the protocol is affine. With
# `EvalOptions.confidence` the student's pred_depth, bin_logits and bin_centers by name.
PredictFn = Callable[[dict[str, Any]], Any]


def _predict(
    predict_fn: PredictFn, batch: dict[str, Any], samples: Sequence[RigSample], options: EvalOptions
) -> dict[str, Any]:
    """Maps [B, N, H, W] by name: `pred_depth` and, for confidence, what `confidence.measure` adds, and `label`."""
    inputs = {name: value for name, value in batch.items() if name != "record_index"}  # int64: no device array
    depth = predict_fn(inputs)
    if options.confidence:
        label = label_maps(batch, samples, options.ground_truth)
        return {**measure(depth, label), "label": label}
    if options.flip_tta:
        depth = 0.5 * (depth + predict_fn(flip_batch(inputs))[..., ::-1])
    return {"pred_depth": depth}


def _protocol(
    options: EvalOptions, rule: PointRule, *, extras: bool = True
) -> SurroundProtocol | VfdepthProtocol | affine.AffineProtocol:
    if options.protocol == "affine":
        return affine.AffineProtocol(
            min_depth=options.min_depth, max_depth=options.max_depth, point_rule=rule, truth=options.ground_truth
        )
    if options.protocol == "vfdepth":
        return VfdepthProtocol(max_depth=options.max_depth, point_rule=rule, batch_size=VFDEPTH_BATCH)
    return SurroundProtocol(
        min_depth=options.min_depth, max_depth=options.max_depth, point_rule=rule, truth=options.ground_truth,
        extras=extras,
    )  # fmt: skip


def evaluate(
    predict_fn: PredictFn, records: Records, options: EvalOptions, *, run_identity: dict[str, Any] | None = None,
    baselines: Mapping[str, PredictFn] | None = None, stop: Callable[[], int] = lambda: 0,
) -> Results:  # fmt: skip
    """Measures `predict_fn` on `records`.

    Args:
      predict_fn: batch of NumPy arrays as data/pipeline yields (no record_index) -> [B, N, H, W] (`PredictFn`).
      records: what to evaluate on; ground truth is their own sweep, never the accumulated training labels, or their
        dense depth (`options.ground_truth`). Each of several processes takes a share; all get the results, and each
        the pictures of its own share.
      options: see `EvalOptions`.
      run_identity: stored with the results.
      baselines: {name: predictor on NumPy batches}, measured on the same samples without test-time augmentation.
      stop: asked after every batch, equally often in each of several processes; a signal that it returns ends it.

    Raises:
      Stopped: `stop` has returned a signal.
      ConfigError, DataError: see `check_records`, and damaged records.
      TrainingError: a prediction is not finite; names the sample.
    """
    title, count = check_records(records, options)
    start, end = _share(count)
    rule = records.manifest.point_rule
    protocol = _protocol(options, rule)
    others = {name: (fn, _protocol(options, rule, extras=False)) for name, fn in (baselines or {}).items()}
    known = Confidence(
        min_depth=options.min_depth, max_depth=options.max_depth, point_rule=rule, truth=options.ground_truth
    )
    names, kept, hidden = split_cameras(records.cameras, options.drop_cameras)
    own = end - start
    wanted = {int(i) for i in np.linspace(0, own - 1, min(options.num_pictures, own)).round()}
    pictures: list[tuple[str, np.ndarray]] = []

    def consume(prediction: Any, batch: dict[str, Any], samples: list[RigSample], indices: list[int]) -> None:
        maps = {name: np.asarray(each, np.float32) for name, each in jax.device_get(prediction).items()}
        measured = [(maps["pred_depth"], protocol), *((fn(batch), other) for fn, other in others.values())]
        for row, (whole, index) in enumerate(zip(samples, indices, strict=True)):
            sample = select_cameras(whole, names, records.where(index))
            own = {name: each[row, kept] for name, each in maps.items()}
            try:
                for pred, by in measured:
                    if isinstance(by, VfdepthProtocol):
                        by.add(pred[row, kept], sample, batch["ego_mask"][row, kept])
                    else:
                        by.add(pred[row, kept], sample)
                if options.confidence:
                    known.add(own, own["label"], sample)
            except ValueError as error:
                where = f"{records.where(index)}, sample {sample.sample_id!r}"
                raise TrainingError(f"{where}: cannot be evaluated: {error}") from error
            if protocol.samples - 1 in wanted:
                images, points = batch["images"][row, kept], batch["depth"][row, kept]
                pictures.append((sample.sample_id, _picture(own["pred_depth"], images, points, sample, options)))
            bar.update()

    batches = pipeline.eval_batches(
        records, options.image_size, options.batch_size, options.limit, start=start, stop=end,
        num_threads=options.num_threads,
    )  # fmt: skip

    def ask() -> None:
        if number := stop():
            raise Stopped(f"evaluation stopped by signal {number}", number)

    silent = None if distributed.is_main() else True  # None: as the terminal is
    with tqdm(total=own, desc="evaluate", unit="rig", disable=silent, dynamic_ncols=True) as bar:
        pending: tuple[Any, ...] | None = None
        for batch, samples, indices in batches:
            ask()
            hide_cameras(batch, hidden)
            prediction = _predict(predict_fn, batch, samples, options)  # the device works while the host measures
            if pending is not None:
                consume(*pending)
            pending = (prediction, batch, samples, indices)
        if pending is not None:
            consume(*pending)
    largest = -(-_share(count, 0)[1] // options.batch_size)
    for _ in range(largest - -(-own // options.batch_size)):  # a share of fewer batches
        ask()
    for each in (protocol, known, *(other for _, other in others.values())):
        each.set_totals(distributed.total(each.totals()))
    if protocol.samples != count:
        where = f"the manifest of {records.folders[0]}"
        raise DataError(f"evaluated {protocol.samples} samples, expected {count} from {where}")
    table = protocol.table()
    if not table:
        raise DataError(
            f"{records.folders[0]}: no ground truth between {options.min_depth} and {options.max_depth} m"
            f" in {count} samples; check eval.min_depth and eval.max_depth"
        )
    consistency = protocol.consistency.result() if isinstance(protocol, SurroundProtocol) else {}
    return Results(
        protocol=options.protocol, title=title, samples=count, table=table, consistency=consistency,
        pixels=protocol.pixels, skipped=protocol.skipped, options=_described(options),
        identity={**(run_identity or {}), "eval_data": records.fingerprint}, pictures=pictures,
        trivial={name: next(iter(other.table().values())) for name, (_, other) in others.items()},
        failed=protocol.failed if isinstance(protocol, affine.AffineProtocol) else {}, confidence=known.result(),
    )  # fmt: skip


def _share(count: int, process: int | None = None) -> tuple[int, int]:
    """The samples [start, stop) that a process (default: this one) evaluates: whole groups of those that P2 pools.

    The first process has the most.
    """
    groups = -(-count // VFDEPTH_BATCH)
    each = -(-groups // jax.process_count()) * VFDEPTH_BATCH
    start = min((jax.process_index() if process is None else process) * each, count)
    return start, min(start + each, count)


def _described(options: EvalOptions) -> dict[str, Any]:
    described = dataclasses.asdict(options)
    if options.protocol == "vfdepth":  # P2 has no lower limit besides gt > 0
        described |= {"min_depth": 0.0, "pooled_rigs": VFDEPTH_BATCH}
    return described


def _picture(
    depth: np.ndarray, images: np.ndarray, points: np.ndarray, sample: RigSample, options: EvalOptions
) -> np.ndarray:
    """Panorama of the sample's cameras: prediction [N, H, W], images [N, H, W, 3] and sparse labels [N, H, W]."""
    exact = dense_maps(sample, options.image_size)
    if options.protocol == "affine":
        known = points if exact is None else exact
        depth = affine.aligned_maps(depth, known, min_depth=options.min_depth, max_depth=options.max_depth)
    return panorama(
        images, depth, points, list(sample.camera_names), np.asarray(geometry.optical_yaw(sample.cam_to_ego)),
        min_depth=options.min_depth, max_depth=options.max_depth, title=f"{sample.scene}  {sample.sample_id}",
        dense=exact,
    )  # fmt: skip


def picture_of(predict_fn: PredictFn, records: Records, index: int, options: EvalOptions) -> np.ndarray:
    """Panorama [H, W, 3] uint8 of one record with its prediction, of the cameras that are not dropped."""
    sample, where = records[index], records.where(index)
    names, kept, hidden = split_cameras(records.cameras, options.drop_cameras)
    batch = transforms.empty_batch(1, sample.num_cameras, options.image_size)
    transforms.load_rig(sample, {k: v[0] for k, v in batch.items() if k != "record_index"}, where=where)
    hide_cameras(batch, hidden)
    depth = np.asarray(jax.device_get(_predict(predict_fn, batch, [sample], options)["pred_depth"]), np.float32)
    depth, images, points = (array[0, kept] for array in (depth, batch["images"], batch["depth"]))
    return _picture(depth, images, points, select_cameras(sample, names, where), options)


def note_idle_devices(batch_size: int) -> None:
    """Says where a process's devices will all compute the same rigs, as `sharding.spread` cannot divide a batch."""
    devices = jax.local_device_count()
    if batch_size % devices:
        distributed.say(
            f"note: eval.batch_size = {batch_size} cannot be divided over this process's {devices} devices, so an"
            f" evaluation is as fast as on one; --config.eval.batch_size={devices} uses all"
        )


def evaluate_run(config: ml_collections.ConfigDict, workdir: Path, init_from: str = "") -> Results:
    """Evaluates a run's checkpoint, or the student `init_from`, on `data.eval_records`; writes and prints the tables.

    The network is the checkpoint's: `task`, `model.*` and a teacher's `teacher.*` are replaced by what it was trained
    with. Files:
    `<workdir>/evaluation/<dataset>_<split>_<protocol>.md`, `.json`, `.csv` and `..._00.png` ... With `eval.trivial`,
    the predictors of `fsmde_jax.trivial` are fitted on `data.train_records` and measured beside it; with
    `eval.confidence` there is a `..._confidence.png`, too.

    Raises:
      FsmdeError: no checkpoint, records are missing, or the config does not fit the checkpoint.
    """
    build.check(config)
    which = config.eval.checkpoint
    if init_from and which == "best":
        which = ""  # another run may have none: then its latest
    tree, meta, where = read_student(init_from or Path(workdir), which)
    config = _with_model_of(meta["identity"]["config"], config, where)
    check(config)
    options = options_from(config, num_pictures=config.eval.num_pictures)
    note_idle_devices(options.batch_size)
    records = build.open_split(config, "eval")
    current = config.to_dict()
    model = build.build_model(config)
    predict = make_predict(model, build.read_fn(config))
    variables = compatible.fit_parameters(_template(model, len(records.cameras), options.image_size), tree, where)
    made_by = identity.run_identity(current, {"eval": records.fingerprint})
    made_by |= {"checkpoint": where if init_from else config.eval.checkpoint, "step": meta["step"]}
    made_by |= {"trained_as": meta["identity"], "init_from": init_from}

    def predict_fn(batch: dict[str, Any]) -> Any:
        return predict(variables["params"], variables["batch_stats"], sharding.spread(batch))

    baselines = _trivial_predictors(config, records, options) if config.eval.trivial else {}
    results = evaluate(predict_fn, records, options, run_identity=made_by, baselines=baselines)
    manifest = records.manifest
    stem = f"{manifest.dataset}_{manifest.split}_{options.protocol}"
    stem += "_dense" * (options.ground_truth == "dense") + "_flip" * options.flip_tta
    if options.drop_cameras:
        stem += "_without_" + "_".join(re.sub(r"\W", "-", name) for name in sorted(set(options.drop_cameras)))
    if distributed.is_main():
        files = results.write(Path(workdir) / "evaluation", stem)
        print(results.to_markdown())
        print("written: " + ", ".join(str(file) for file in files))
    if not all(math.isfinite(value) for value in results.flat().values()):
        raise TrainingError(f"{where}: some metrics are not finite; see {Path(workdir) / 'evaluation'}")
    return results


def _trivial_predictors(
    config: ml_collections.ConfigDict, records: Records, options: EvalOptions
) -> dict[str, PredictFn]:
    """The trivial predictors, fitted on the training records' depths of the kind that is evaluated."""
    config = config.copy_and_resolve_references()
    config.data.cameras = tuple(records.cameras)
    train = build.open_split(config, "train")
    if options.ground_truth == "dense":
        require_dense_depth(train, "eval.trivial with eval.ground_truth = 'dense'")
    predictors = trivial.fit(
        train, options.image_size, min_depth=options.min_depth, max_depth=options.max_depth, truth=options.ground_truth
    )
    if options.protocol != "affine":
        return predictors
    return {name: inverse(predict) for name, predict in predictors.items()}


def inverse(predict: PredictFn) -> PredictFn:
    """A predictor of depth as one of (relative) inverse depth."""
    return lambda batch: 1.0 / predict(batch)


def _with_model_of(saved: dict[str, Any], config: ml_collections.ConfigDict, where: str) -> ml_collections.ConfigDict:
    """The config with the checkpoint's own network (only the dtype stays free); says what it replaced."""
    wanted = {**compatible.model_of(saved), "dtype": config.model.dtype}
    changed = compatible.differences(wanted, config.model.to_dict(), "model")
    teacher = {**config.teacher.to_dict()}
    task = saved.get("task", "student")  # runs of older versions do not say it
    if task == "teacher":
        teacher |= {key: saved["teacher"][key] for key in ("variant", "longer_side")}
        changed += compatible.differences(teacher, config.teacher.to_dict(), "teacher")
    changed += compatible.differences(task, config.task, "task")
    if changed:
        distributed.say(f"note: {where} keeps its own network:\n  " + "\n  ".join(changed))
    trained_at = tuple(saved["data"]["image_size"])
    if trained_at != tuple(config.data.image_size):
        distributed.say(
            f"note: {where} was trained at {trained_at}, this evaluation is at {tuple(config.data.image_size)}"
        )
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.task = task
        config.model = ml_collections.ConfigDict(wanted)
        config.teacher = ml_collections.ConfigDict(teacher)
    return config


def _template(model: Any, cameras: int, size: tuple[int, int]) -> dict[str, Any]:
    """Shapes of the model's variables, without computing them."""
    arguments = (
        jax.ShapeDtypeStruct((1, cameras, *size, 3), np.float32),
        jax.ShapeDtypeStruct((1, cameras, 3, 3), np.float32),
        jax.ShapeDtypeStruct((1, cameras, 4, 4), np.float32),
    )
    shapes = jax.eval_shape(lambda *a: model.init(jax.random.key(0), *a, train=False), *arguments)
    return {"params": shapes["params"], "batch_stats": shapes.get("batch_stats", {})}
