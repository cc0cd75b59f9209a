"""Whether what a long job writes fits on the disk, judged by its first part."""

import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from fsmde_jax.errors import DataError


def amount(size: float) -> str:
    """Bytes in words: "12.3 GB", "45 MB"."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB" if size >= 1e6 else f"{size / 1e3:.0f} KB"


def estimate(written: Mapping[Path, int], count: int | None, replaced: Iterable[Path] = ()) -> str:
    """What `count` parts take where the first one has taken `written`, in words.

    Args:
      written: bytes of the first part by the place (a folder, or a file) that they lie in.
      count: of all parts; None = not known.
      replaced: folders among the places whose old files `<part>/<file>` make room, as they are written anew.

    Raises:
      DataError: there is less room than the other parts need; names the place, both amounts and what to do.
    """
    if count is None:
        return " and ".join(f"about {amount(size)} a frame in {place}" for place, size in written.items())
    wanted: dict[int, int] = {}  # by disk
    for place, size in written.items():
        folder = place if place.is_dir() else place.parent
        disk = os.stat(folder).st_dev
        wanted[disk] = wanted.get(disk, 0) + size * (count - 1)
        free = shutil.disk_usage(folder).free
        if wanted[disk] > free:  # counting the old files takes time
            free += sum(_old(old) - written[old] for old in replaced if os.stat(old).st_dev == disk)
        if wanted[disk] > free:
            raise DataError(
                f"{place}: {count} frames take about {amount(wanted[disk] / (count - 1) * count)}, but only"
                f" {amount(free)} are free there; write less (--write, --stride), take fewer (--limit), free space or"
                " choose another place"
            )
    return " and ".join(
        f"about {amount(size * count)} for {count} frames in {place}" for place, size in written.items()
    )


def _old(folder: Path) -> int:
    """Bytes of the files `<part>/<file>` below a folder."""
    return sum(file.stat().st_size for file in folder.glob("*/*") if file.is_file())
