"""Guards against evaluating on what was trained on: no scene and no sample may lie in two splits of different use."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from data_prep.plan import Source
from fsmde_jax.data.records import load_manifest
from fsmde_jax.data.schema import MANIFEST_NAME, Manifest
from fsmde_jax.errors import DataError


def use_of(split: str) -> str:
    """What a split is for, by its name: "train" (train, mini_train, ...), "held-out" (val, mini_val, test, ...) or
    "unknown" (any other name)."""
    words = ("val", "test", "eval", "held")
    return "train" if "train" in split else "held-out" if any(word in split for word in words) else "unknown"


def may_share(first: str, second: str) -> bool:
    """Whether two splits may have scenes in common: the same split, or two that are known to have the same use."""
    return first == second or (use_of(first) == use_of(second) != "unknown")


def check_lists(splits: Mapping[str, Iterable[str]], where: str) -> None:
    """Raises `DataError` if a scene is in two of the {split: scenes} lists of different use."""
    seen: dict[str, str] = {}
    for split, scenes in splits.items():
        for scene in sorted(set(scenes)):
            other = seen.setdefault(scene, split)
            if not may_share(other, split):
                raise DataError(
                    f"{where}: scene {scene!r} is in split {other!r} and in split {split!r};"
                    " evaluation would see training data"
                )


def check_manifests(first: Manifest, second: Manifest, names: tuple[str, str]) -> str:
    """Compares the scenes of two records folders.

    Returns:
      A sentence that says what was compared.

    Raises:
      DataError: two splits of one dataset, not known to have the same use, share a scene.
    """
    a, b = names
    if first.dataset != second.dataset:
        return f"{a} and {b}: nothing compared, different datasets ({first.dataset}, {second.dataset})"
    shared = sorted(set(first.scenes) & set(second.scenes))
    if shared and not may_share(first.split, second.split):
        raise DataError(
            f"{a} ({first.split}) and {b} ({second.split}) share {len(shared)} scenes, e.g. {shared[0]!r};"
            " evaluation would see training data: convert disjoint splits"
        )
    counts = f"{len(first.scenes)} and {len(second.scenes)} scenes"
    if not shared:
        return f"{a} ({first.split}) and {b} ({second.split}): no scene is in both ({counts})"
    return (
        f"{a} ({first.split}) and {b} ({second.split}): {len(shared)} scenes are in both ({counts}), e.g."
        f" {shared[0]!r}; do not train on one and evaluate on the other"
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
            found = load_manifest(other.parent)
        except DataError:
            continue  # another program's manifest, or an old format: not ours to judge here
        shared = sorted(set(found.scenes) & set(source.scenes))
        if found.dataset == source.dataset and shared and not may_share(found.split, source.split):
            raise DataError(
                f"split {source.split!r} shares {len(shared)} scenes with {other.parent} ({found.split}), e.g."
                f" {shared[0]!r};"
                " evaluation would see training data: convert disjoint splits, or write to a folder elsewhere if"
                " this is meant"
            )
