"""What a run was made of: commit, config, data, package versions, hardware. Stands in every checkpoint and result."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

import fsmde_jax
from fsmde_jax.data.schema import Manifest

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "opencv-python-headless")

DATA_TERMS = {  # by the manifest's `dataset`
    "nuscenes": "CC BY-NC-SA 4.0 and nuScenes' own terms of use",
    "ddad": "CC BY-NC-SA 4.0",
    "world": "rendered by this project: no terms of others",
}
_NOT_COMMERCIAL = "Depth Anything's weights of that size are CC-BY-NC-4.0"
_UNKNOWN = "terms not known here; ask who made it"
SHIPPED = ("lite0", "tiny")  # with this project
TEACHER_TERMS = {  # by the teacher's `variant`
    "small": "Depth Anything's weights of that size are Apache-2.0",
    "base": _NOT_COMMERCIAL,
    "large": _NOT_COMMERCIAL,
}


def _commit() -> str:
    """Commit of the source tree ("+changes" if it is not clean), or "unknown" outside a git checkout."""
    folder = Path(fsmde_jax.__file__).resolve().parent.parent
    if not (folder / ".git").exists():
        return "unknown"

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20
        ).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return (commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")) or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def _versions() -> dict[str, str]:
    versions = {"fsmde-jax": fsmde_jax.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def processor() -> str:
    """The processor's name, where the system tells it; else its kind."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            named = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
            return next(named, "") or platform.machine()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()


def hardware() -> dict[str, Any]:
    """Accelerator kind and count, processor, cores."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "device_count": jax.device_count(),
        "processor": processor(),
        "cores": os.cpu_count(),
    }


def run_identity(config: dict[str, Any], data_fingerprints: dict[str, str]) -> dict[str, Any]:
    """JSON-ready description of a run.

    Args:
      config: the resolved config as a plain dict.
      data_fingerprints: role ("train", "eval") -> fingerprint of the records (their manifests).
    """
    return {
        "commit": _commit(),
        "config": config,
        "data": data_fingerprints,
        "versions": _versions(),
        "hardware": hardware(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def named(manifests: Sequence[Manifest]) -> list[dict[str, str]]:
    """Which datasets records were made of: dataset, source_version and split of each folder."""
    return [{"dataset": m.dataset, "source_version": m.source_version, "split": m.split} for m in manifests]


def licence_notes(identity: Mapping[str, Any]) -> list[str]:
    """Whose terms a run's parameters may be under, as far as its identity says what they were made of.

    One note each for the code, the training records, the teacher, an encoder's weights and the parameters that it
    began with. Which of these bind trained parameters is a question of law, which the last note leaves open.
    """
    config = identity["config"]
    notes = ["code: Apache-2.0"]
    sources = identity.get("records", {}).get("train", [])
    for source in sources:
        said = " ".join(source[key] for key in ("dataset", "source_version", "split"))
        notes.append(f"trained on {said}: {DATA_TERMS.get(source['dataset'], _UNKNOWN)}")
    if not sources:  # a run of an older version
        notes.append(f"trained on {config['data']['train_records']}: {_UNKNOWN}")
    if teacher := identity.get("teacher"):
        ships = config["teacher"]["weights"] in SHIPPED
        terms = "ships with this project, Apache-2.0" if ships else TEACHER_TERMS.get(teacher["variant"], _UNKNOWN)
        notes.append(f"taught by {teacher['variant']} of {teacher['source'] or 'unknown origin'}: {terms}")
    if encoder := config.get("train", {}).get("encoder_weights"):
        notes.append(f"its encoder began as {encoder}: {_UNKNOWN}")
    if identity.get("init_from"):
        notes.append(f"began as {identity['init_from']}: what those parameters inherit")
    return [*notes, "parameters may inherit the terms of all that they were trained on, taught by or begun from"]
