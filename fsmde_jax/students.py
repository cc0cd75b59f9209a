"""Trained students, as runs and as single files; the package ships one, called "lite0" wherever a student is named.

A file (`python -m fsmde_jax.convert --weights runs/mine --out mine.safetensors`) holds parameters and batch statistics;
its card beside it, `<name>.json`, says of which network they are, how it was trained and what was measured.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from fsmde_jax import checkpoint
from fsmde_jax.data.tfrecord import write_atomically
from fsmde_jax.errors import ConfigError, DataError, TrainingError
from fsmde_jax.names import flatten

SHIPPED = {"lite0": Path(__file__).parent / "students" / "lite0.safetensors"}
_EXPECTED = f"expected {' or '.join(SHIPPED)}, a .safetensors file of fsmde_jax.convert, or the folder of a run"


def read_student(where: str | Path, which: str = "") -> tuple[dict[str, Any], dict[str, Any], str]:
    """Parameters of a trained network.

    Args:
      where: a name as users give it: "lite0" (ships with the package), a .safetensors file of `write_student`, or the
        folder of a run. A `Path` is never taken for the shipped one.
      which: of a run's checkpoints, "best" | "latest"; "" = best if there is one.

    Returns:
      ({"params", "batch_stats"} as nested dicts of NumPy float32 arrays; meta, whose `identity` says how it was
      trained; where they are from, in words).

    Raises:
      TrainingError: a run without such a checkpoint. DataError: a file or its card that cannot be used, or a folder
        that is no run's.
    """
    path = SHIPPED.get(str(where), Path(where)) if isinstance(where, str) else where
    if path.suffix == ".safetensors":
        tree, meta = _read_file(path)
        return tree, meta, f"{where} (step {meta['step']} of {meta['source']})"
    if isinstance(where, str) and not path.is_dir():
        raise DataError(f"{where}: no student here; {_EXPECTED}")
    if not which:
        _check_run(path)
        which = checkpoint.best_or_latest(path)
    tree, meta, step = checkpoint.read_parameters(path, which)
    return tree, {**meta, "step": step, "source": path.name}, f"{where} ({which} checkpoint, step {step})"


def _check_run(path: Path) -> None:
    """Says what a folder is that is not that of a run with a checkpoint (errors as `read_student`)."""
    if checkpoint.has_checkpoint(path):
        return
    if (path / "card.json").is_file():
        teacher = '"variant"' in (path / "card.json").read_text(encoding="utf-8", errors="replace")
        kind = (
            "a teacher's folder of fsmde_jax.convert" if teacher else "an export of fsmde_jax.export, for other tools"
        )
        raise DataError(f"{path}: {kind}; it cannot be read as a student; {_EXPECTED}")
    if (path / "identity.json").is_file():
        raise TrainingError(f"{path}: a run that has no checkpoint yet; let it train on")
    raise DataError(f"{path}: not the folder of a run (no checkpoint in checkpoints/ or best/); {_EXPECTED}")


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    beside = path.with_suffix(".json")
    try:
        meta = json.loads(beside.read_text(encoding="utf-8"))
        blob = path.read_bytes()
        _ = meta["identity"]["config"]["model"], meta["step"], meta["source"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a student of this project, or its card {beside.name} cannot be read ({error}); make both with"
            " python -m fsmde_jax.convert --weights <folder of a run>"
        ) from error
    if meta.get("sha256") != (found := hashlib.sha256(blob).hexdigest()):
        raise DataError(
            f"{beside}: says that {path.name} has SHA-256 {str(meta.get('sha256'))[:12]}..., but it has"
            f" {found[:12]}...: one of the two was replaced; fetch both again"
        )
    try:
        flat = safetensors.numpy.load(blob)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path}: not a whole .safetensors file ({error})") from error
    tree: dict[str, Any] = {"params": {}, "batch_stats": {}}
    for name, leaf in flat.items():
        *scopes, last = name.split(".")
        place = tree
        for scope in scopes:
            place = place.setdefault(scope, {})
        place[last] = leaf.astype(np.float32)
    return tree, meta


def write_student(workdir: str | Path, path: str | Path, *, half: bool = False) -> dict[str, Any]:
    """Writes the (best, else latest) student of a run as one file with its card.

    Args:
      workdir: folder of the run.
      path: new .safetensors file; the card gets the suffix .json.
      half: kernels as float16; they are float32 again when they are read. Vectors and statistics stay float32.

    Returns:
      The card.

    Raises:
      ConfigError: one of the files is there already, or the name does not end in .safetensors.
      DataError: it cannot be written, or a parameter does not fit float16.
    """
    workdir, path = Path(workdir), Path(path)
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path}: expected a name that ends in .safetensors")
    for file in (path, path.with_suffix(".json")):
        if file.exists():
            raise ConfigError(f"{file}: exists already; choose another name or delete it")
    tree, meta, _ = read_student(workdir)
    flat = {name: np.asarray(leaf, np.float32) for name, leaf in flatten(tree).items()}
    if half:
        kernels = {name: leaf for name, leaf in flat.items() if leaf.ndim > 1}
        if any(not np.abs(leaf).max() < np.finfo(np.float16).max for leaf in kernels.values()):
            raise DataError(f"{workdir}: a parameter does not fit float16; write float32 (without --half)")
        flat |= {name: leaf.astype(np.float16) for name, leaf in kernels.items()}
    blob = safetensors.numpy.save(flat)
    card = {
        "step": meta["step"],
        "source": meta["source"],
        "identity": meta["identity"],
        "evaluations": evaluations(workdir, meta["step"], meta["identity"]),
        "sha256": hashlib.sha256(blob).hexdigest(),
    }
    write_with_card(path, blob, card)
    return card


def write_with_card(path: Path, blob: bytes, card: dict[str, Any]) -> None:
    """Writes a new file, and its card beside it with the suffix .json; both or neither.

    Raises:
      DataError: they cannot be written.
    """
    beside = path.with_suffix(".json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(beside, (json.dumps(card, indent=1, sort_keys=True) + "\n").encode())
        try:
            write_atomically(path, blob)  # second: no file without its card
        except BaseException:  # Ctrl-C, too: the same command would refuse a card that is left
            beside.unlink()
            raise
    except OSError as error:
        raise DataError(f"{path}: cannot write ({error.strerror}); free space or choose another place") from error


def evaluations(workdir: Path, step: int, trained_as: dict[str, Any]) -> list[dict[str, Any]]:
    """What evaluations of this very student found: title, options, metrics of all cameras, the best trivial one."""
    found = []
    for path in sorted((workdir / "evaluation").glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        made_by = content["identity"]
        if (made_by.get("step"), made_by.get("trained_as")) != (step, trained_as):
            continue  # of another checkpoint, or of another student that was measured into this folder
        entry = {key: content[key] for key in ("title", "samples")}
        kept = ("protocol", "ground_truth", "min_depth", "max_depth", "image_size", "flip_tta", "drop_cameras")
        options = {key: content["options"].get(key) for key in kept}
        entry |= options | {kind: rows["all"] for kind, rows in content["table"].items()}
        trivial = {name: rows["all"]["abs_rel"] for name, rows in content.get("trivial", {}).items()}
        if trivial:
            best = min(trivial, key=lambda name: trivial[name])
            entry["best_trivial"] = {"name": best, "abs_rel": trivial[best]}
        found.append(entry)
    return found
