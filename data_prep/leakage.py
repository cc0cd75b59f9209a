"""Guards against evaluating on what was trained on: no scene and no sample may lie in two splits of different use."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from data_prep import manifest as manifests
from data_prep.plan import Source
from fsmde_jax.data.schema import MANIFEST_NAME, Manifest
from fsmde_jax.errors import DataError


def use_of(split: str) -> str:
    """What a split is for: "train" for train, mini_train, ...; "held-out" for val, mini_val, test, ..."""
    return "train" if "train" in split else "held-out"


def check_lists(splits: Mapping[str, Iterable[str]], where: str) -> None:
    """Raises `DataError` if a scene is in two of the {split: scenes} lists of different use."""
    seen: dict[str, str] = {}
    for split, scenes in splits.items():
        for scene in sorted(set(scenes)):
            other = seen.setdefault(scene, split)
            if other != split and use_of(other) != use_of(split):
                raise DataError(
                    f"{where}: scene {scene!r} is in split {other!r} and in split {split!r};"
                    " evaluation would see training data"
                )


def check_manifests(first: Manifest, second: Manifest, names: tuple[str, str]) -> None:
    """Raises `DataError` if two records folders of one dataset, meant for different uses, share a scene."""
    if first.dataset != second.dataset or use_of(first.split) == use_of(second.split):
        return
    shared = sorted(set(first.scenes) & set(second.scenes))
    if shared:
        raise DataError(
            f"{names[0]} ({first.split}) and {names[1]} ({second.split}) share {len(shared)} scenes, e.g."
            f" {shared[0]!r};"
            " evaluation would see training data: convert disjoint splits"
        )


def check_siblings(out: Path, source: Source) -> None:
    """Checks a split that is about to be converted against the finished records folders beside `out`.

    Raises:
      DataError: a folder beside it holds the same scenes for the other use.
    """
    if not out.absolute().parent.is_dir():
        return
    for other in sorted(out.absolute().parent.glob(f"*/{MANIFEST_NAME}")):
        if other.parent == out.absolute():
            continue
        try:
            found = manifests.read_manifest(other.parent)
        except DataError:
            continue  # another program's manifest, or an old format: not ours to judge here
        shared = sorted(set(found.scenes) & set(source.scenes))
        if found.dataset == source.dataset and use_of(found.split) != use_of(source.split) and shared:
            raise DataError(
                f"split {source.split!r} shares {len(shared)} scenes with {other.parent} ({found.split}), e.g."
                f" {shared[0]!r};"
                " evaluation would see training data: convert disjoint splits, or write to a folder elsewhere if"
                " this is meant"
            )
