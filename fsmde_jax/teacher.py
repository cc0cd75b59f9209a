"""Teachers on disk: a Depth Anything model with its parameters, from a converted folder or straight from a weight file;
or a trained student in its place (`fsmde_jax.students`).

A converted folder (`python -m fsmde_jax.convert`) holds the parameters as an orbax checkpoint and `card.json`, which
says what they are; it is read without PyTorch. A weight file written here has its card beside it, `<name>.json`. The
package ships one such file, called "tiny" wherever a teacher is named.
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fsmde_jax import checkpoint, compatible, students, teacher_weights
from fsmde_jax.errors import ConfigError, DataError, TrainingError
from fsmde_jax.models.depth_anything import VARIANTS, DepthAnything
from fsmde_jax.models.registry import ENCODERS, build_student
from fsmde_jax.models.student_teacher import StudentTeacher
from fsmde_jax.models.vit import PATCH
from fsmde_jax.names import check_name

STUDENT_TOKENS = 8  # stride of a student's features


@dataclasses.dataclass(frozen=True)
class Card:
    """What a teacher's parameters are, kept beside them."""

    variant: str  # a name of `depth_anything.VARIANTS`, or of a student's encoder
    version: int = 2  # of Depth Anything: which blocks are tapped
    max_depth: float | None = None  # metres of a metric checkpoint; None = relative inverse depth
    source: str = ""  # name of the file, or of the run, that they came from
    sha256: str = ""  # of that file
    longer_side: int = 0  # pixels of the longer side of the images it was trained at; 0 = as the official ones
    training: dict[str, Any] = dataclasses.field(default_factory=dict)  # how it was trained, and what was measured
    student: dict[str, Any] = dataclasses.field(default_factory=dict)  # fields of `Student`; empty = Depth Anything

    def __post_init__(self) -> None:
        check_name("variant", self.variant, ENCODERS if self.student else VARIANTS)
        if self.version not in (1, 2):
            raise ConfigError(f"version: Depth Anything has versions 1 and 2, got {self.version!r}")
        if self.max_depth is not None and not 0 < self.max_depth < float("inf"):
            raise ConfigError(f"max_depth: expected metres above 0, got {self.max_depth!r}")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen network: `teacher.module().apply({"params": teacher.params}, images)`."""

    params: Any  # nested dicts of arrays
    card: Card

    def module(self, dtype: Any = jnp.float32, **options: Any) -> Any:
        """The `DepthAnything` or `StudentTeacher`; `options` are further fields of it."""
        if self.card.student:
            return StudentTeacher(build_student(**{**self.card.student, "dtype": dtype}), **options)
        return DepthAnything(self.card.variant, self.card.max_depth, self.card.version, dtype, **options)

    @property
    def shift_known(self) -> bool:
        """Whether its map is inverse depth up to a scale alone: a metric one's and a student's are, a relative one's
        has an unknown shift as well."""
        return self.card.max_depth is not None or bool(self.card.student)

    @property
    def token_stride(self) -> int:
        """Pixels of its input to one of its tokens."""
        return STUDENT_TOKENS if self.card.student else PATCH


SHIPPED = {"tiny": Path(__file__).parent / "teachers" / "tiny.safetensors"}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_teacher(
    path: str | Path, *, variant: str | None = None, version: int | None = None, max_depth: float | None = None
) -> Teacher:
    """Reads a teacher.

    Args:
      path: "tiny" (ships with the package), a folder of `python -m fsmde_jax.convert`, a .pth or .safetensors file; or
        a student as `students.read_student` takes it.
      variant, version, max_depth: what a FILE without a card holds: variant None = by its shapes, version None = 2,
        max_depth None = relative. Folders, and files that were written here, say so themselves.

    Raises:
      DataError: nothing is there, or it is not what it should be.
      ConfigError: something is said of a teacher that its card says otherwise.
    """
    said = {"variant": variant, "version": version, "max_depth": max_depth}
    if _is_student(str(path)):
        return _open_student(str(path), said)
    path = SHIPPED.get(str(path), Path(path))
    if path.is_dir():
        return _open_folder(path, said)
    if path.suffix == ".safetensors" and path.is_file() and path.with_suffix(".json").is_file():
        return _open_file_with_card(path, said)
    params, found = teacher_weights.load_teacher(path, variant)
    return Teacher(params, Card(found, version or 2, max_depth, path.name, _digest(path)))


def _is_student(where: str) -> bool:
    path = Path(where)
    if where in students.SHIPPED or (path / "identity.json").is_file():
        return True
    try:
        return path.suffix == ".safetensors" and "identity" in json.loads(path.with_suffix(".json").read_text("utf-8"))
    except (OSError, ValueError):
        return False


def _open_student(where: str, said: dict[str, Any]) -> Teacher:
    tree, meta, _ = students.read_student(where)
    config = meta["identity"]["config"]
    if config.get("task", "student") != "student":
        raise ConfigError(f"{where}: trains a teacher; make it a file with python -m fsmde_jax.convert first")
    if config["model"].get("cross_view_blocks"):
        raise ConfigError(f"{where}: mixes the views of a rig (model.cross_view_blocks), a teacher sees single images")
    saved = compatible.model_of(config)
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()}
    source, longer_side = f"{meta['source']} (step {meta['step']})", max(config["data"]["image_size"])
    card = Card(config["model"]["encoder"], source=source, longer_side=longer_side, student=fields)
    _check_said(Path(where), card, said)
    return Teacher({"params": tree["params"], "batch_stats": tree["batch_stats"]}, card)


def _open_folder(path: Path, said: dict[str, Any]) -> Teacher:
    try:
        params, content = checkpoint.read_tree(path)
        card = Card(**content)
    except (TrainingError, TypeError, ConfigError) as error:
        raise DataError(
            f"{path}: not a converted teacher ({error}); make it with python -m fsmde_jax.convert"
        ) from error
    _check_said(path, card, said)
    template = teacher_weights.template(card.variant)
    wanted, found = (
        {jax.tree_util.keystr(p): tuple(leaf.shape) for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (template, params)
    )
    if wanted != found:
        differing = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        raise DataError(
            f"{path}: its parameters are not those of {card.variant}: {len(differing)} differ, e.g. {differing[0]};"
            " convert the weight file again"
        )
    return Teacher(params, card)


def _check_said(path: Path, card: Card, said: dict[str, Any]) -> None:
    for key, value in said.items():
        if value is not None and value != getattr(card, key):
            raise ConfigError(
                f"{path}: its card says {key} = {getattr(card, key)!r}, not {value!r}; leave the flag out"
            )


def _open_file_with_card(path: Path, said: dict[str, Any]) -> Teacher:
    beside = path.with_suffix(".json")
    try:
        card = Card(**json.loads(beside.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, ConfigError) as error:
        raise DataError(f"{beside}: not the card of a teacher ({error}); without it {path.name} can be read") from error
    if card.sha256 != (found := _digest(path)):
        raise DataError(
            f"{beside}: says that {path.name} has SHA-256 {card.sha256[:12]}..., but it has {found[:12]}...: one of the"
            " two was replaced; delete the card, or fetch both again"
        )
    _check_said(path, card, said)
    return Teacher(teacher_weights.load_teacher(path, card.variant)[0], card)


def weight_hash(teacher: Teacher) -> str:
    """SHA-256 that names what a teacher computes: its weights (by the file's hash if the card has it), head, taps."""
    card = teacher.card
    digest = hashlib.sha256(f"{card.variant} {card.version} {card.max_depth} {card.sha256}".encode())
    if card.student:
        digest.update(json.dumps(card.student, sort_keys=True).encode())
    for path, leaf in [] if card.sha256 else jax.tree_util.tree_leaves_with_path(teacher.params):
        array = np.ascontiguousarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def teacher_of_run(workdir: str | Path) -> Teacher:
    """The (best, else latest) teacher of a training run with `task = "teacher"`.

    Raises:
      TrainingError: there is no checkpoint. ConfigError: the run trains a student.
    """
    workdir = Path(workdir)
    tree, meta, step = checkpoint.read_parameters(workdir, checkpoint.best_or_latest(workdir))
    made_by = meta["identity"]
    config = made_by["config"]
    if config.get("task") != "teacher":
        raise ConfigError(f"{workdir}: trains a student, not a teacher (task = {config.get('task')!r})")
    training = {key: made_by[key] for key in ("commit", "date", "hardware", "data", "versions")}
    training |= {"step": step, "steps": config["train"]["steps"], "rigs_per_step": config["data"]["batch_size"]}
    training |= {"seed": config["seed"], "gradient_weight": config["loss"]["gradient_weight"]}
    training |= {"optim": config["optim"], "augment": config["augment"], "evaluations": _evaluations(workdir)}
    training |= {"started_from": config["teacher"]["weights"]}
    longer_side = config["teacher"]["longer_side"]
    card = Card(
        config["teacher"]["variant"], source=workdir.name, longer_side=longer_side,
        training=training,
    )  # fmt: skip
    return Teacher(tree["params"], card)


def _evaluations(workdir: Path) -> list[dict[str, Any]]:
    """What the run's P0 evaluations found: title, ranges, all cameras' metrics, the best trivial predictor's."""
    found = []
    for path in sorted((workdir / "evaluation").glob("*_affine*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        trivial = {name: rows["all"] for name, rows in content["trivial"].items()}
        best = min(trivial, key=lambda name: trivial[name]["abs_rel"], default="")
        entry = {key: content[key] for key in ("title", "samples")}
        options = {key: content["options"][key] for key in ("ground_truth", "min_depth", "max_depth", "image_size")}
        entry |= options | {"affine": content["table"]["affine"]["all"]}
        found.append(entry | ({"best_trivial": {"name": best, **trivial[best]}} if best else {}))
    return found


def save_file(teacher: Teacher, path: str | Path, *, half: bool = False) -> None:
    """Writes a .safetensors file in the official layout, which PyTorch's official code reads too, and its card beside.

    Args:
      teacher: the network.
      path: of the file; the card gets the suffix .json.
      half: store float16, half the size; it is float32 again when it is read.

    Raises:
      ConfigError: the file is there already, or its name does not end in .safetensors.
      DataError: it cannot be written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path}: expected a name that ends in .safetensors")
    for file in (path, path.with_suffix(".json")):
        if file.exists():
            raise ConfigError(f"{file}: exists already; choose another name or delete it")
    blob = teacher_weights.to_safetensors(teacher.params, half=half)
    card = dataclasses.replace(teacher.card, sha256=hashlib.sha256(blob).hexdigest())
    students.write_with_card(path, blob, dataclasses.asdict(card))


def save_teacher(teacher: Teacher, folder: str | Path) -> None:
    """Writes a folder that `open_teacher` reads, under a temporary name until it is whole.

    Raises:
      ConfigError: there is something at `folder` already.
      TrainingError: it cannot be written.
    """
    checkpoint.write_tree(Path(folder), teacher.params, dataclasses.asdict(teacher.card))
