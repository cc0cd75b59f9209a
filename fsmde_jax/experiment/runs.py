"""One run of an experiment: the training job, the evaluation job, and `result.json` with everything that was measured.

A finished run is recognised by its result and not done again; one that was killed goes on by the training job's own
resume. Also here: which of a row's candidates tuning has chosen (`tuned.json`).
"""

import contextlib
import functools
import gc
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fsmde_jax import checkpoint, teacher
from fsmde_jax.data.tfrecord import write_atomically
from fsmde_jax.errors import ConfigError, DataError, FsmdeError
from fsmde_jax.evaluate import evaluate_run
from fsmde_jax.experiment.plan import TUNE, Run, changed, label_of
from fsmde_jax.experiment.suite import Suite, defaults
from fsmde_jax.names import flatten
from fsmde_jax.train import train

RESULT = "result.json"
LOG = "log.txt"
TUNED = "tuned.json"
_TRAINED = "trained.json"  # the training is done; evaluations are not, or not all


def finished(run: Run, root: Path, data: Mapping[str, str]) -> dict[str, Any] | None:
    """The result of a run that is done, None if it has none yet.

    Args:
      run: the run.
      root: folder of all experiments.
      data: fingerprints of the records: "train", "val" and "test".

    Raises:
      ConfigError: it (or its unfinished training) was made with another config, or from other records.
      DataError: its result is damaged.
    """
    folder = root / run.folder
    current = flatten(run.config().to_dict())
    begun = _read(folder / "config.json")
    result = _read(folder / RESULT)
    saved = begun if result is None else result["config"]
    if saved is not None and (lines := changed(flatten(saved), current, defaults())):
        raise ConfigError(
            f"{folder}: was run with another config:\n  " + "\n  ".join(lines) + "\nUndo the change in the suite,"
            " delete this folder (and all that are to be compared with it), or choose another --root."
        )
    used = _data_of(run, data)
    identity = _read(folder / "identity.json") if result is None else None
    trained_on = {"train": identity["data"]["train"], "val": identity["data"]["eval"]} if identity else {}
    saved_data = result["data"] if result else trained_on
    if differing := [f"{role} records" for role, value in saved_data.items() if used[role] != value]:
        raise ConfigError(
            f"{folder}: was run on other {', '.join(differing)} than there are now (another fingerprint). Delete this"
            " folder, put the old records back, or choose another --root."
        )
    taught = (identity or {}).get("teacher")
    now = _teacher(run.config())
    if taught and now and taught["sha256"] != now["sha256"]:
        raise ConfigError(
            f"{folder}: was begun with another teacher (SHA-256 {taught['sha256'][:16]}...) than"
            f" {run.config().teacher.weights!r} is now ({now['sha256'][:16]}...). Delete this folder, or put the old"
            " weights back."
        )
    if result is not None and result["teacher"] != _teacher(run.config()):
        raise ConfigError(
            f"{folder}: was run with another teacher ({result['teacher']}) than {run.config().teacher.weights!r} is now"
            f" ({_teacher(run.config())}). Delete this folder, put the old weights back, or choose another --root."
        )
    return result


def execute(run: Run, root: Path, data: Mapping[str, str]) -> dict[str, Any]:
    """Trains (or goes on), evaluates, writes `result.json` and returns its content. What is printed goes to log.txt.

    Raises:
      FsmdeError: of the jobs, with the folder and the log named.
    """
    folder = root / run.folder
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _logged(folder / LOG):
            training = _train(run, folder)
            results = {truth: evaluate_run(run.evaluation_config(truth), folder) for truth in run.truths}
    except FsmdeError as error:
        told = type(error)(f"{error}\n(in {folder}; its output is in {LOG}. The same command goes on from here.)")
        told.status = error.status
        raise told from error
    made_by = next(iter(results.values())).identity
    config = run.config()
    result = {
        "suite": run.suite.name, "rig": run.rig, "row": run.row, "variant": run.variant, "seed": run.seed,
        "phase": run.phase, "config": config.to_dict(), "records": run.measured.records, "data": _data_of(run, data),
        "commit": made_by["trained_as"]["commit"], "commit_of_evaluation": made_by["commit"],
        "versions": made_by["versions"], "hardware": made_by["hardware"], "date": made_by["date"],
        "teacher": _teacher(config), "training": training, "step": made_by["step"],
        "titles": {truth: each.title for truth, each in results.items()},
        "samples": {truth: each.samples for truth, each in results.items()},
        "metrics": {truth: each.flat() for truth, each in results.items()},
    }  # fmt: skip
    write_json(folder / RESULT, result)
    tidy(run, root)
    return result


def tidy(run: Run, root: Path) -> None:
    """Deletes the checkpoints that a finished run does not keep."""
    keep = "none" if run.phase == TUNE else run.suite.keep
    for name, when in ((checkpoint.CHECKPOINTS, ("best", "none")), (checkpoint.BEST, ("none",))):
        if keep in when:
            shutil.rmtree(root / run.folder / name, ignore_errors=True)


def release() -> None:
    """Gives back what a run leaves in memory: compiled programs and arrays that only cycles hold."""
    jax.clear_caches()
    gc.collect()


def use_cache(root: Path) -> None:
    """Keeps compiled programs below `root`, so that other seeds and later sessions need not compile them again; another
    folder that JAX was told (JAX_COMPILATION_CACHE_DIR) stays."""
    if not jax.config.values.get("jax_compilation_cache_dir"):
        jax.config.update("jax_compilation_cache_dir", str((root / "compiled").absolute()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def choose(run_results: Iterable[tuple[Run, dict[str, Any]]], suite: Suite) -> dict[str, Any]:
    """Of each row's tuning runs, the candidate with the lowest mean of `suite.metric` over the seeds.

    Returns:
      {row: {"chosen": overrides, "candidates": [{"overrides", "values", "mean", "folders"}], "config", "data",
      "teacher", "commits"}} with the config (flat, without the candidate's keys and the seed) that they have in common.
    """
    rows: dict[str, Any] = {}
    for run, result in run_results:
        value = result["metrics"]["lidar"].get(suite.metric)
        if value is None:
            raise ConfigError(
                f"{run.folder}: metric {suite.metric!r} was not measured; there are"
                f" {', '.join(sorted(result['metrics']['lidar']))}"
            )
        shared = {"config": _common(run), "data": result["data"], "teacher": result["teacher"]}
        row = rows.setdefault(run.row, {"candidates": {}, "commits": [], **shared})
        row["commits"] = sorted({*row["commits"], result["commit"]})
        entry = row["candidates"].setdefault(
            label_of(run.overrides), {"overrides": dict(run.overrides), "values": [], "folders": []}
        )
        entry["values"].append(value)
        entry["folders"].append(run.folder.as_posix())
    for row in rows.values():
        row["candidates"] = [{**entry, "mean": float(np.mean(entry["values"]))} for entry in row["candidates"].values()]
        row["chosen"] = min(row["candidates"], key=lambda entry: entry["mean"])["overrides"]
    return rows


def write_tuned(root: Path, suite: Suite, rig: str, rows: Mapping[str, Any]) -> Path:
    """Adds rows of `choose` to `tuned.json`; the others that it holds stay if metric and seeds chose them too."""
    path = root / suite.name / rig / TUNED
    content = _read(path) or {}
    path.parent.mkdir(parents=True, exist_ok=True)
    others = {} if _chosen_otherwise(content, suite) else content.get("rows", {})
    about = {"suite": suite.name, "rig": rig, "metric": suite.metric, "seeds": list(suite.tuning_seeds)}
    write_json(path, {**about, "rows": {**others, **rows}})
    return path


def _chosen_otherwise(content: Mapping[str, Any], suite: Suite) -> list[str]:
    """Where the metric and the seeds of a `tuned.json` are not the suite's."""
    pairs = (("metric", "metric", suite.metric), ("seeds", "tuning_seeds", list(suite.tuning_seeds)))
    return [f"{name}: {content.get(key)} there, {now} now" for key, name, now in pairs if content.get(key) != now]


def read_tuned(root: Path, suite: Suite, rig: str, rows: Iterable[str], data: Mapping[str, str]) -> dict[str, Any]:
    """What tuning chose for each row: {row: overrides}, {} for rows that are not tuned.

    Raises:
      ConfigError: a row has not been tuned, or with another metric, other seeds, candidates, settings or records.
    """
    path = root / suite.name / rig / TUNED
    content = _read(path) or {}
    found, chosen = content.get("rows", {}), {}
    rows = list(rows)
    tuned = [row for row in rows if suite.rows[row].tuned]
    again = f"python -m fsmde_jax.experiment --suite {suite.name} --rig {rig} --phase tune --root {root} --rows"
    if missing := [row for row in tuned if row not in found]:
        raise ConfigError(
            f"{path}: {'nothing is' if missing == tuned else ', '.join(missing) + ': not'} tuned yet; the test phase"
            f" uses what tuning chose on the val records. Run:\n  {again} {' '.join(missing)}"
        )
    if tuned and (lines := _chosen_otherwise(content, suite)):
        raise ConfigError(
            f"{path}: was tuned in another way than the suite says now:\n  " + "\n  ".join(lines) + "\nUndo the change,"
            f" or choose again (runs that are there are not done again):\n  {again} {' '.join(tuned)}"
        )
    for row in tuned:
        entry = found[row]
        candidates = suite.candidates_of(row)
        now = Run(suite, rig, row, 0, TUNE, "", candidates[0])
        lines = changed(flatten(entry["config"]), _common(now), defaults())
        if [label_of(c["overrides"]) for c in entry["candidates"]] != [label_of(c) for c in candidates]:
            lines.append("the candidates")
        lines += [f"{role} records" for role in ("train", "val") if entry["data"][role] != data[role]]
        lines += ["the teacher"] if entry["teacher"] != _teacher(now.config()) else []
        if lines:
            raise ConfigError(
                f"{path}: row {row!r} was tuned with something else:\n  " + "\n  ".join(lines) + "\nDelete the"
                f" folders {row}-tune_* beside it and run again:\n  {again} {row}"
            )
        chosen[row] = entry["chosen"]
    return {row: chosen.get(row, {}) for row in rows}


def write_json(path: Path, content: Any) -> None:
    """Writes JSON by rename."""
    try:
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
    except OSError as error:
        raise DataError(f"{path}: cannot write ({error.strerror}); free space, then run again") from error


def _train(run: Run, folder: Path) -> dict[str, Any]:
    """Seconds of the training, and the step that this session took it up at (its seconds are of the rest only)."""
    done, config = _read(folder / _TRAINED), run.config()
    if done is not None:
        wanted = checkpoint.BEST if config.eval.checkpoint == "best" else checkpoint.CHECKPOINTS
        if _steps(folder / wanted) or _steps(folder / checkpoint.CHECKPOINTS):
            return done
        # `tidy` deleted it after a result that is gone by now, so there is nothing to evaluate: train from the start.
        for name in (checkpoint.CHECKPOINTS, checkpoint.BEST):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / _TRAINED).unlink()
    before = max(_steps(folder / checkpoint.CHECKPOINTS), default=0)
    started = time.monotonic()
    train(config, folder)
    done = {"seconds": round(time.monotonic() - started, 2), "from_step": before}
    write_json(folder / _TRAINED, done)
    return done


def _steps(folder: Path) -> list[int]:
    """Of the checkpoints in a folder."""
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit()]


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """What the jobs print goes to a file."""
    with path.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        yield


def _teacher(config: Any) -> dict[str, str] | None:
    """Name and hash of the teacher that a student learns from."""
    weights = config.teacher.weights
    return {"weights": weights, "sha256": _hash_of(weights)} if weights else None


@functools.cache
def _hash_of(weights: str) -> str:
    return teacher.weight_hash(teacher.open_teacher(weights))


def _data_of(run: Run, data: Mapping[str, str]) -> dict[str, str]:
    roles = ("train", "val") if run.phase == TUNE else ("train", "val", "test")
    return {role: data[role] for role in roles}


def _common(run: Run) -> dict[str, Any]:
    """What a row's tuning runs have in common, and its test runs too."""
    flat = flatten(run.config().to_dict())
    return {key: value for key, value in flat.items() if key not in run.overrides and key != "seed"}


def _read(path: Path) -> Any:
    """JSON, None if there is no such file."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        what = "this file" if path.name == TUNED else "this file's folder"
        raise DataError(f"{path}: damaged ({error}); delete {what} and run again") from error
