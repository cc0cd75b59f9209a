"""Teachers on disk: a Depth Anything model with its parameters, from a converted folder or straight from a weight file.

A converted folder (`python -m fsmde_jax.convert`) holds the parameters as an orbax checkpoint and `card.json`, which
says what they are; it is read without PyTorch.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from fsmde_jax import checkpoint, teacher_weights
from fsmde_jax.errors import ConfigError, DataError, TrainingError
from fsmde_jax.models import registry
from fsmde_jax.models.depth_anything import VARIANTS, DepthAnything


@dataclasses.dataclass(frozen=True)
class Card:
    """What a teacher's parameters are, kept beside them."""

    variant: str  # a name of `depth_anything.VARIANTS`
    version: int = 2  # of Depth Anything: which blocks are tapped
    max_depth: float | None = None  # metres of a metric checkpoint; None = relative inverse depth
    source: str = ""  # name of the file they came from
    sha256: str = ""  # of that file

    def __post_init__(self) -> None:
        registry.check_name("variant", self.variant, VARIANTS)
        if self.version not in (1, 2):
            raise ConfigError(f"version: Depth Anything has versions 1 and 2, got {self.version!r}")
        if self.max_depth is not None and not 0 < self.max_depth < float("inf"):
            raise ConfigError(f"max_depth: expected metres above 0, got {self.max_depth!r}")


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen network: `teacher.module().apply({"params": teacher.params}, images)`."""

    params: Any  # nested dicts of arrays
    card: Card

    def module(self, dtype: Any = jnp.float32, **options: Any) -> DepthAnything:
        """The linen module; `options` are further fields of `DepthAnything`."""
        return DepthAnything(self.card.variant, self.card.max_depth, self.card.version, dtype, **options)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_teacher(
    path: str | Path, *, variant: str | None = None, version: int | None = None, max_depth: float | None = None
) -> Teacher:
    """Reads a teacher.

    Args:
      path: a folder of `python -m fsmde_jax.convert`, or a .pth or .safetensors file.
      variant, version, max_depth: what a FILE holds: variant None = by its shapes, version None = 2, max_depth None =
        relative. A folder says so itself.

    Raises:
      DataError: nothing is there, or it is not what it should be.
      ConfigError: something is said of a folder that its card says otherwise.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path, {"variant": variant, "version": version, "max_depth": max_depth})
    params, found = teacher_weights.load_teacher(path, variant)
    return Teacher(params, Card(found, version or 2, max_depth, path.name, _digest(path)))


def _open_folder(path: Path, said: dict[str, Any]) -> Teacher:
    try:
        params, content = checkpoint.read_tree(path)
        card = Card(**content)
    except (TrainingError, TypeError, ConfigError) as error:
        raise DataError(
            f"{path}: not a converted teacher ({error}); make it with python -m fsmde_jax.convert"
        ) from error
    for key, value in said.items():
        if value is not None and value != getattr(card, key):
            raise ConfigError(
                f"{path}: its card says {key} = {getattr(card, key)!r}, not {value!r}; leave the flag out"
            )
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


def save_teacher(teacher: Teacher, folder: str | Path) -> None:
    """Writes a folder that `open_teacher` reads, under a temporary name until it is whole.

    Raises:
      ConfigError: there is something at `folder` already.
      TrainingError: it cannot be written.
    """
    checkpoint.write_tree(Path(folder), teacher.params, dataclasses.asdict(teacher.card))
