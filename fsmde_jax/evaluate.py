"""The evaluation job: records through a predictor, measured by one protocol of docs/protocol.md."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from fsmde_jax import affine, build, checkpoint, geometry, identity, sharding, trivial
from fsmde_jax.data import dense, pipeline, transforms
from fsmde_jax.data.records import Records, require_dense_depth
from fsmde_jax.data.schema import RigSample
from fsmde_jax.errors import ConfigError, DataError, TrainingError
from fsmde_jax.eval_options import EvalOptions, check, options_from
from fsmde_jax.protocols import PointRule, SurroundProtocol, VfdepthProtocol
from fsmde_jax.results import Results
from fsmde_jax.state import make_predict
from fsmde_jax.viz.panorama import panorama

OFFICIAL_COUNTS = {
    ("nuscenes", "val"): 6019,
    ("nuscenes", "train"): 28130,
    ("ddad", "val"): 3950,
    ("ddad", "train"): 12650,
}
VFDEPTH_BATCH = 4  # rigs whose pixels P2 pools
# Device batch -> [B, N, H, W]: pred_depth in metres; relative inverse depth where the protocol is affine.
PredictFn = Callable[[dict[str, Any]], Any]


def flip_batch(batch: dict[str, Any]) -> dict[str, Any]:
    """The mirrored rigs of a batch: pixels, labels, masks and calibration; cameras keep their index."""
    width = batch["images"].shape[3]
    exact = {"dense_depth": batch["dense_depth"][..., ::-1]} if "dense_depth" in batch else {}
    return {
        **batch,
        **exact,
        "images": batch["images"][:, :, :, ::-1],
        "depth": batch["depth"][..., ::-1],
        "ego_mask": batch["ego_mask"][..., ::-1],
        "intrinsics": geometry.flip_intrinsics(batch["intrinsics"], width),
        "cam_to_ego": geometry.flip_cam_to_ego(batch["cam_to_ego"]),
        "ego_to_global": geometry.flip_ego_to_global(batch["ego_to_global"]),
    }


def _predict(predict_fn: PredictFn, batch: dict[str, Any], flip_tta: bool) -> Any:
    inputs = {name: value for name, value in batch.items() if name != "record_index"}  # int64: no device array
    depth = predict_fn(inputs)
    if flip_tta:
        depth = 0.5 * (depth + predict_fn(flip_batch(inputs))[..., ::-1])
    return depth


def check_records(records: Records, options: EvalOptions) -> tuple[str, int]:
    """Title of the table and number of samples to come.

    Raises:
      ConfigError: the folders differ in dataset or point rule, so that one table would mix unlike things; or they lack
        the dense depth that is asked for.
      DataError: a count that contradicts the manifest, or a "complete" official split of the wrong size.
    """
    manifest = records.manifest
    kinds = sorted({(m.dataset, m.point_rule) for m in records.manifests})
    if len(kinds) > 1:
        raise ConfigError(f"data.eval_records mixes {kinds}: evaluate one dataset at a time")
    if len(records) != manifest.num_samples:
        raise DataError(f"{records.folders[0]}: {len(records)} records, but the manifest says {manifest.num_samples}")
    count = min(options.limit, len(records)) if options.limit else len(records)
    name = f"{manifest.dataset} {manifest.source_version} {manifest.split}"
    if options.ground_truth == "dense":
        require_dense_depth(records, "eval.ground_truth = 'dense'")
        name += ", DENSE ground truth"
    standard = (manifest.min_depth, manifest.max_depth)
    if not np.allclose(standard, (options.min_depth, options.max_depth)):
        name += f", NOT the dataset's range ({standard[0]:g}-{standard[1]:g} m)"
    complete = manifest.complete_split and count == len(records) and set(manifest.cameras) == set(records.cameras)
    if not complete:
        return f"{name}, subset, n = {count}", count
    official = OFFICIAL_COUNTS.get((manifest.dataset, manifest.split))
    if official is not None and count != official:
        raise DataError(
            f"{records.folders[0]}: the manifest says that {manifest.dataset} {manifest.split} is complete, but it"
            f" holds {count} samples and the official split has {official}; convert this split again"
        )
    return f"{name}, complete split, n = {count}", count


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
    baselines: Mapping[str, PredictFn] | None = None,
) -> Results:  # fmt: skip
    """Measures `predict_fn` on `records`.

    Args:
      predict_fn: batch of NumPy arrays as data/pipeline yields (no record_index) -> [B, N, H, W] (`PredictFn`).
      records: what to evaluate on; ground truth is their own sweep, never the accumulated training labels, or their
        dense depth (`options.ground_truth`).
      options: see `EvalOptions`.
      run_identity: stored with the results.
      baselines: {name: predictor on NumPy batches}, measured on the same samples without test-time augmentation.

    Raises:
      ConfigError, DataError: see `check_records`, and damaged records.
      TrainingError: a prediction is not finite; names the sample.
    """
    if jax.process_count() > 1:
        raise ConfigError("evaluation runs in one process: start it apart with --mode evaluate")
    title, count = check_records(records, options)
    rule = records.manifest.point_rule
    protocol = _protocol(options, rule)
    others = {name: (fn, _protocol(options, rule, extras=False)) for name, fn in (baselines or {}).items()}
    wanted = {int(i) for i in np.linspace(0, count - 1, min(options.num_pictures, count)).round()}
    pictures: list[tuple[str, np.ndarray]] = []

    def consume(prediction: Any, batch: dict[str, Any], samples: list[RigSample], indices: list[int]) -> None:
        depth = np.asarray(jax.device_get(prediction), np.float32)
        measured = [(depth, protocol), *((fn(batch), other) for fn, other in others.values())]
        for row, (sample, index) in enumerate(zip(samples, indices, strict=True)):
            try:
                for pred, by in measured:
                    if isinstance(by, VfdepthProtocol):
                        by.add(pred[row], sample, batch["ego_mask"][row])
                    else:
                        by.add(pred[row], sample)
            except ValueError as error:
                where = f"{records.where(index)}, sample {sample.sample_id!r}"
                raise TrainingError(f"{where}: cannot be evaluated: {error}") from error
            if protocol.samples - 1 in wanted:
                pictures.append((sample.sample_id, _picture(depth[row], batch, row, sample, options)))
            bar.update()

    batches = pipeline.eval_batches(
        records, options.image_size, options.batch_size, options.limit, num_threads=options.num_threads
    )
    with tqdm(total=count, desc="evaluate", unit="rig", disable=None, dynamic_ncols=True) as bar:
        pending: tuple[Any, ...] | None = None
        for batch, samples, indices in batches:
            prediction = _predict(predict_fn, batch, options.flip_tta)  # the device works on it while the host measures
            if pending is not None:
                consume(*pending)
            pending = (prediction, batch, samples, indices)
        if pending is not None:
            consume(*pending)
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
        failed=protocol.failed if isinstance(protocol, affine.AffineProtocol) else {},
    )  # fmt: skip


def _described(options: EvalOptions) -> dict[str, Any]:
    described = dataclasses.asdict(options)
    if options.protocol == "vfdepth":  # P2 has no lower limit besides gt > 0
        described |= {"min_depth": 0.0, "pooled_rigs": VFDEPTH_BATCH}
    return described


def _picture(depth: np.ndarray, batch: dict[str, Any], row: int, sample: RigSample, options: EvalOptions) -> np.ndarray:
    exact = None
    if any(sample.dense_depth):
        exact = np.stack(
            [
                dense.resized(
                    data, (int(size[0]), int(size[1])), options.image_size, f"sample {sample.sample_id!r}, {name}"
                )
                for data, size, name in zip(sample.dense_depth, sample.image_size, sample.camera_names, strict=True)
            ]
        )
    if options.protocol == "affine":
        known = np.asarray(batch["depth"][row]) if exact is None else exact
        depth = affine.aligned_maps(depth, known, min_depth=options.min_depth, max_depth=options.max_depth)
    return panorama(
        np.asarray(batch["images"][row]), depth, np.asarray(batch["depth"][row]), list(sample.camera_names),
        np.asarray(geometry.optical_yaw(sample.cam_to_ego)), min_depth=options.min_depth, max_depth=options.max_depth,
        title=f"{sample.scene}  {sample.sample_id}", dense=exact,
    )  # fmt: skip


def picture_of(predict_fn: PredictFn, records: Records, index: int, options: EvalOptions) -> np.ndarray:
    """Panorama [H, W, 3] uint8 of one record with its prediction."""
    sample = records[index]
    batch = transforms.empty_batch(1, sample.num_cameras, options.image_size)
    transforms.load_rig(sample, {k: v[0] for k, v in batch.items() if k != "record_index"}, where=records.where(index))
    depth = np.asarray(jax.device_get(_predict(predict_fn, batch, options.flip_tta)), np.float32)
    return _picture(depth[0], batch, 0, sample, options)


def evaluate_run(config: ml_collections.ConfigDict, workdir: Path) -> Results:
    """Evaluates a run's checkpoint on `data.eval_records`; writes and prints the tables.

    The network is the checkpoint's: `task`, `model.*` and a teacher's `teacher.*` are replaced by what it was trained
    with. Files:
    `<workdir>/evaluation/<dataset>_<split>_<protocol>.md`, `.json`, `.csv` and `..._00.png` ... With `eval.trivial`,
    the predictors of `fsmde_jax.trivial` are fitted on `data.train_records` and measured beside it.

    Raises:
      FsmdeError: no checkpoint, records are missing, or the config does not fit the checkpoint.
    """
    build.check(config)
    tree, meta, step = checkpoint.read_parameters(Path(workdir), config.eval.checkpoint)
    where = f"{workdir} ({config.eval.checkpoint} checkpoint, step {step})"
    config = _with_model_of(meta["identity"]["config"], config, where)
    check(config)
    options = options_from(config, num_pictures=config.eval.num_pictures)
    records = build.open_split(config, "eval")
    current = config.to_dict()
    model = build.build_model(config)
    predict = make_predict(model, build.read_fn(config))
    variables = checkpoint.fit_parameters(_template(model, len(records.cameras), options.image_size), tree, where)
    made_by = identity.run_identity(current, {"eval": records.fingerprint})
    made_by |= {"checkpoint": config.eval.checkpoint, "step": step, "trained_as": meta["identity"]}

    def predict_fn(batch: dict[str, Any]) -> jax.Array:
        return predict(variables["params"], variables["batch_stats"], sharding.spread(batch))

    baselines = _trivial_predictors(config, records, options) if config.eval.trivial else {}
    results = evaluate(predict_fn, records, options, run_identity=made_by, baselines=baselines)
    manifest = records.manifest
    stem = f"{manifest.dataset}_{manifest.split}_{options.protocol}"
    stem += "_dense" * (options.ground_truth == "dense") + "_flip" * options.flip_tta
    files = results.write(Path(workdir) / "evaluation", stem)
    print(results.to_markdown())
    print("written: " + ", ".join(str(file) for file in files))
    if not all(math.isfinite(value) for value in results.flat().values()):
        raise TrainingError(f"{where}: some metrics are not finite; see {files[0]}")
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
    wanted = {**saved["model"], "dtype": config.model.dtype}
    changed = checkpoint.differences(wanted, config.model.to_dict(), "model")
    teacher = {**config.teacher.to_dict()}
    task = saved.get("task", "student")  # runs of older versions do not say it
    if task == "teacher":
        teacher |= {key: saved["teacher"][key] for key in ("variant", "longer_side")}
        changed += checkpoint.differences(teacher, config.teacher.to_dict(), "teacher")
    changed += checkpoint.differences(task, config.task, "task")
    if changed:
        print(f"note: {where} keeps its own network:\n  " + "\n  ".join(changed))
    trained_at = tuple(saved["data"]["image_size"])
    if trained_at != tuple(config.data.image_size):
        print(f"note: {where} was trained at {trained_at}, this evaluation is at {tuple(config.data.image_size)}")
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
