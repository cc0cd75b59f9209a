"""What a run was made of: commit, config, data, package versions, hardware. Stands in every checkpoint and result."""

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

import fsmde_jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "opencv-python-headless")


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


def hardware() -> dict[str, Any]:
    """Accelerator kind and count, processor, cores."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "device_count": jax.device_count(),
        "processor": platform.machine(),
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
