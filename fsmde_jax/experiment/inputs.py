"""What runs read: records, teachers' weights and teacher caches. Made, found, and checked before any run starts."""

import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fsmde_jax import teacher
from fsmde_jax.data import schema, teacher_maps
from fsmde_jax.data.records import load_manifest, open_records, shared_scenes
from fsmde_jax.errors import DataError
from fsmde_jax.experiment.plan import TEST, TUNE, Run
from fsmde_jax.experiment.suite import Split, Suite


def splits_of(suite: Suite, rig: str, phase: str) -> dict[str, Split]:
    """The records that a phase reads: the test records are not even opened while tuning."""
    setup = suite.rigs[rig]
    return {"train": setup.train, "val": setup.val, **({"test": setup.test} if phase == TEST else {})}


def is_made(split: Split) -> bool:
    """Whether a folder of records or a teacher cache is whole: its manifest is written last."""
    return any((Path(split.records) / name).is_file() for name in (schema.MANIFEST_NAME, teacher_maps.MANIFEST_NAME))


def prepare(suite: Suite, rig: str) -> None:
    """Makes a rig's records and teacher caches that are missing, by the suite's command lines, each once.

    Raises:
      DataError: a command failed.
    """
    records, caches = splits_of(suite, rig, TEST).values(), suite.rigs[rig].caches
    missing = [split for split in (*records, *caches) if not is_made(split)]
    for command in dict.fromkeys(command for split in missing for command in split.commands):
        print(f"$ {command}", flush=True)
        words = shlex.split(command)
        words = [sys.executable, *words[1:]] if words[0] == "python" else words
        if code := subprocess.run(words, check=False).returncode:
            raise DataError(f"this command ended with status {code}; mend what it says and run again:\n  {command}")
    print("records: " + ", ".join(split.records for split in records))
    if caches:
        print("teacher caches: " + ", ".join(split.records for split in caches))


def fingerprints(splits: Mapping[str, Split]) -> dict[str, str]:
    """Fingerprint of each split's records.

    Raises:
      DataError: records are missing; the message holds the commands that make them.
    """
    return {
        role: load_manifest(split.records, "\n  ".join(split.commands)).fingerprint for role, split in splits.items()
    }


def check_scenes(splits: Mapping[str, Split]) -> None:
    """Refuses records to measure on that hold scenes of the train records.

    Raises:
      DataError: naming both folders, how many scenes and one of them.
    """
    train = open_records(splits["train"].records)
    for role, split in splits.items():
        if role == "train":
            continue
        measured = open_records(split.records)
        if shared := shared_scenes(train, measured):
            raise DataError(
                f"{split.records} ({role}): {len(shared)} of its {len(measured.manifest.scenes)} scenes are in"
                f" {splits['train'].records} (train) too, e.g. {shared[0]!r}: what is measured there is no measure of"
                " unseen streets. Make one of the two from other scenes; the suite says how each is made."
            )
        measured.close()
    train.close()


def missing_teachers(runs: Iterable[Run]) -> list[str]:
    """One text for each teacher's weights and each teacher cache that is not there: who names it, how to make it."""
    users: dict[tuple[str, str], dict[str, Run]] = {}
    for run in {run.group: run for run in runs}.values():
        config = run.config().teacher
        who = f"{run.row} with {run.variant}" if run.variant and run.phase != TUNE else run.row
        for key in ("weights", "cache") if config.weights else ():  # a cache without weights is not read
            if config[key] and not _is_there(key, config[key]):
                users.setdefault((key, config[key]), {})[who] = run
    return [
        f"{path} (teacher.{key} of {', '.join(by_name)}): {_advice(key, path, next(iter(by_name.values())))}"
        for (key, path), by_name in users.items()
    ]


def check_teachers(runs: Iterable[Run]) -> None:
    """Raises `DataError` with all of `missing_teachers`, before any run costs time."""
    runs = list(runs)
    if missing := missing_teachers(runs):
        raise DataError(
            f"suite {runs[0].suite.name!r}, {runs[0].rig}: what students learn from is missing:\n  "
            + "\n  ".join(missing) + "\nMake it, or leave out what needs it (--rows, --sweeps)."
        )  # fmt: skip


def _is_there(key: str, path: str) -> bool:
    if key == "cache":
        return (Path(path) / teacher_maps.MANIFEST_NAME).is_file()
    return path in teacher.SHIPPED or Path(path).exists()


def _advice(key: str, path: str, run: Run) -> str:
    if key == "weights":
        return (
            "convert a training of configs/teacher_world.py, or published weights (docs/teacher.md):\n"
            f"    python -m fsmde_jax.convert --weights <its workdir, or the file> --out {path}"
        )
    setup, config = run.suite.rigs[run.rig], run.config()
    for cache in setup.caches:
        if Path(cache.records) == Path(path):
            return "make it with --prepare, or:\n    " + "\n    ".join(cache.commands)
    return (
        f"no `caches` of rig {run.rig!r} says how it is made; e.g. (--tokens for w_vr)\n    python -m"
        f" fsmde_jax.teacher_cache --teacher {config.teacher.weights} --records {setup.train.records} --image_size"
        f" {_size(config)} --out {path}"
    )


def _size(config: Any) -> str:
    height, width = config.data.image_size
    return f"{height}x{width}"
