"""What runs read: records, teachers' weights and teacher caches. Made, found, and checked before any run starts."""

import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fsmde_jax import students, teacher
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
    """Whether a folder of records or a teacher cache is whole (its manifest is written last), or a file is there."""
    place, names = Path(split.records), (schema.MANIFEST_NAME, teacher_maps.MANIFEST_NAME)
    return place.is_file() or any((place / name).is_file() for name in names)


def prepare(suite: Suite, rig: str, phase: str) -> None:
    """Makes what is missing of a phase's records and other inputs, by the suite's command lines, each once.

    Raises:
      DataError: a command failed.
    """
    records, others = splits_of(suite, rig, phase).values(), suite.rigs[rig].inputs
    missing = [split for split in (*records, *others) if not is_made(split)]
    for command in dict.fromkeys(command for split in missing for command in split.commands):
        print(f"$ {command}", flush=True)
        words = shlex.split(command)
        words = [sys.executable, *words[1:]] if words[0] == "python" else words
        if code := subprocess.run(words, check=False).returncode:
            raise DataError(f"this command ended with status {code}; mend what it says and run again:\n  {command}")
    print("records: " + ", ".join(split.records for split in records))
    if others:
        print("other inputs: " + ", ".join(split.records for split in others))


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


def missing_weights(runs: Iterable[Run]) -> list[str]:
    """One text for each file of weights and each teacher cache that is not there: who names it, how to make it."""
    users: dict[tuple[str, str], dict[str, Run]] = {}
    for run in {run.group: run for run in runs}.values():
        config = run.config()
        who = f"{run.row} with {run.variant}" if run.variant and run.phase != TUNE else run.row
        named = {"train.encoder_weights": config.train.encoder_weights, "teacher.weights": config.teacher.weights}
        named["teacher.cache"] = config.teacher.cache if config.teacher.weights else ""  # otherwise it is not read
        for key, path in named.items():
            if path and not _is_there(key, path):
                users.setdefault((key, path), {})[who] = run
    return [
        f"{path} ({key} of {', '.join(by_name)}): {_advice(key, path, next(iter(by_name.values())))}"
        for (key, path), by_name in users.items()
    ]


def check_weights(runs: Iterable[Run]) -> None:
    """Raises `DataError` with all of `missing_weights`, before any run costs time."""
    runs = list(runs)
    if missing := missing_weights(runs):
        raise DataError(
            f"suite {runs[0].suite.name!r}, {runs[0].rig}: what they start or learn from is missing:\n  "
            + "\n  ".join(missing) + "\nMake it, or leave out what needs it (--rows, --sweeps)."
        )  # fmt: skip


def _is_there(key: str, path: str) -> bool:
    if key == "teacher.cache":
        return (Path(path) / teacher_maps.MANIFEST_NAME).is_file()
    return (key == "teacher.weights" and path in (*teacher.SHIPPED, *students.SHIPPED)) or Path(path).exists()


def _advice(key: str, path: str, run: Run) -> str:
    setup, config = run.suite.rigs[run.rig], run.config()
    for made in setup.inputs:
        if Path(made.records) == Path(path):
            return "make it with --prepare, or:\n    " + "\n    ".join(made.commands)
    if key == "train.encoder_weights":
        return 'ImageNet weights of the encoder; README, "Pretrained ImageNet encoders", tells where they are'
    if key == "teacher.weights":
        return (
            "convert a training of configs/teacher_world.py, or published weights (docs/teacher.md):\n"
            f"    python -m fsmde_jax.convert --weights <its workdir, or the file> --out {path}"
        )
    return (
        f"no `inputs` of rig {run.rig!r} says how it is made; e.g. (--tokens for w_vr)\n    python -m"
        f" fsmde_jax.teacher_cache --teacher {config.teacher.weights} --records {setup.train.records} --image_size"
        f" {_size(config)} --out {path}"
    )


def _size(config: Any) -> str:
    height, width = config.data.image_size
    return f"{height}x{width}"
