"""Datasets that the world renders in a real dataset's format: recognised here, so that nobody takes them for real ones.

Their records say dataset "world", the format and the seed in the version, and the seed in every scene's name: scenes of
different seeds are different streets, though the official lists give them the same names.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fsmde_jax.errors import DataError

DATASET = "world"
NUSCENES_LOCATION = "rendered world"  # `location` in log.json
NUSCENES_VERSION = "v1.0-trainval"  # of all rendered datasets in that format
DGP_NAME = "FSMDE world"  # `metadata.name` in the dataset json
DGP_INDEX = "ddad.json"
ROWS = ".scenes"  # folder of a rendered dataroot: which scenes are finished


def seed_of(text: str) -> str:
    """The number in "... seed 7 ..."; "unknown" where there is none."""
    found = re.search(r"\bseed[ =]*(\d+)", text)
    return found.group(1) if found else "unknown"


def version_of(form: str, seeds: Iterable[str]) -> str:
    """What the manifest and titles say, e.g. "rendered, nuScenes v1.0-trainval format, seed 7"."""
    known = list(dict.fromkeys(seeds))
    return f"rendered, {form} format, seed{'s' * (len(known) > 1)} {', '.join(known)}"


def scene_name(name: str, seed: str) -> str:
    """A rendered scene's name in records, e.g. "seed 7/scene-0061"."""
    return f"seed {seed}/{name}"


def advice(folder: Path) -> str:
    """What to do about a dataroot whose tables or index were not found; "" if it was not rendered."""
    if not (folder / ROWS).is_dir():
        return ""
    if (folder / NUSCENES_VERSION).is_dir():
        return f"it was rendered in the nuScenes format: data_prep.nuscenes with --version {NUSCENES_VERSION} reads it"
    if (folder / DGP_INDEX).is_file():
        return f"it was rendered in the DGP format: data_prep.ddad with --json {folder / DGP_INDEX} reads it"
    return "it is rendered, but not finished: run the same python -m data_prep.world command again to finish it"


def nuscenes_seeds(tables: Any) -> dict[str, str] | None:
    """{scene name: seed} of a rendered nuScenes dataroot (devkit tables); None of a real one.

    Raises:
      DataError: rendered and real scenes in one dataroot.
    """
    rendered_logs = {row["token"] for row in tables.log if row.get("location") == NUSCENES_LOCATION}
    rendered = [scene for scene in tables.scene if scene.get("log_token") in rendered_logs]
    if not rendered:
        return None
    if len(rendered) < len(tables.scene):
        raise DataError(
            f"{tables.table_root}: rendered scenes ({rendered[0]['name']}, ...) and real ones in the same tables; keep"
            " them in folders of their own"
        )
    return {scene["name"]: seed_of(str(scene.get("description", ""))) for scene in rendered}


def dgp_seed(metadata: dict[str, Any]) -> str | None:
    """Seed of a rendered DGP dataset by the `metadata` of its json; None of a real one."""
    if metadata.get("name") != DGP_NAME:
        return None
    return seed_of(" ".join(str(value) for value in metadata.values()))
