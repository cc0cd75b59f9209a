"""Depth statistics of records side by side: `python -m data_prep.world.statistics RENDERED REAL`.

Both are records folders of any converter. Per camera: LiDAR points, quantiles and histogram of their z-depth, and how
much of the image is sky. Real images have no truth about the sky, so it is estimated from the picture in the same way
for both; where dense depth exists, the exact share stands beside the estimate and shows how far to trust it.
"""

import argparse
import dataclasses
import io
import itertools

import numpy as np
from PIL import Image
from tqdm import tqdm

from data_prep.images import decode_image
from fsmde_jax.data.records import Records, open_records
from fsmde_jax.data.schema import RigSample
from fsmde_jax.errors import ConfigError, exit_with_message

EDGES = (0.0, 5.0, 10.0, 20.0, 40.0, 80.0, np.inf)  # metres
_BRIGHT, _SMOOTH = 0.25, 0.06  # a sky pixel is brighter than this and changes less than this to its neighbours (0..1)
_SKY_SIZE = (44, 80)


@dataclasses.dataclass(frozen=True)
class CameraStatistics:
    """One camera over all samples of a folder; medians over samples."""

    points: float
    quantiles: tuple[float, float, float]  # 10, 50, 90 % of the points' z-depth, metres
    histogram: tuple[float, ...]  # share of the points between EDGES
    sky_estimate: float  # share of the image
    sky_exact: float | None  # the same from dense depth


def sky_share(pixels: np.ndarray) -> float:
    """Share of an image [H, W, 3] uint8 that looks like sky: bright, smooth pixels connected to the top edge column by
    column. An estimate: white walls at the top edge count, clouds with hard edges end it early."""
    small = Image.fromarray(pixels).resize(_SKY_SIZE[::-1], Image.Resampling.BOX)
    grey = np.asarray(small, np.float32).mean(-1) / 255
    step = np.abs(np.diff(grey, axis=0, prepend=grey[:1]))
    side = np.abs(np.diff(grey, axis=1, prepend=grey[:, :1]))
    looks = (grey > _BRIGHT * grey.max()) & (step < _SMOOTH) & (side < _SMOOTH)
    return float(np.cumprod(looks, axis=0).mean())


def _exact_sky(sample: RigSample, camera: int) -> float | None:
    if not sample.dense_depth[camera]:
        return None
    depth = np.asarray(Image.open(io.BytesIO(sample.dense_depth[camera])))
    return float((depth == 0).mean())


def camera_statistics(records: Records, progress: bool = True) -> dict[str, CameraStatistics]:
    """Statistics of every camera, in ring order.

    Raises:
      DataError: a record cannot be read.
    """
    rows: dict[str, list[tuple]] = {name: [] for name in records.cameras}
    depths: dict[str, list[np.ndarray]] = {name: [] for name in records.cameras}
    for sample in tqdm(records, total=len(records), desc="statistics", unit="rig", leave=False, disable=not progress):
        for i, name in enumerate(sample.camera_names):
            z = sample.points[i][:, 2]
            depths[name].append(z)
            sky = sky_share(decode_image(sample.images[i], f"sample {sample.sample_id!r}, camera {name}"))
            rows[name].append((len(z), *(np.quantile(z, (0.1, 0.5, 0.9)) if len(z) else (np.nan,) * 3), sky))
            rows[name][-1] += (_exact_sky(sample, i),)
    result = {}
    for name, found in rows.items():
        points, low, middle, high, sky = (float(np.nanmedian([row[k] for row in found])) for k in range(5))
        exact = [row[5] for row in found if row[5] is not None]
        counts = np.histogram(np.concatenate(depths[name]), EDGES)[0]
        shares = tuple((counts / max(counts.sum(), 1)).tolist())
        result[name] = CameraStatistics(
            points, (low, middle, high), shares, sky, float(np.median(exact)) if exact else None
        )
    return result


def _ratio(rendered: float, real: float) -> str:
    return f"{rendered / real:.2f}x" if real else "-"


def table(rendered: dict[str, CameraStatistics], real: dict[str, CameraStatistics]) -> str:
    """Markdown: one line per camera that both have (by name), rendered / real and their ratio."""
    lines = [
        "| camera | LiDAR points | median z (m) | 10-90 % of z (m) | sky, estimated | sky, exact |",
        "|---|---|---|---|---|---|",
    ]
    for name in (n for n in rendered if n in real):
        a, b = rendered[name], real[name]
        exact = "-" if a.sky_exact is None else f"{a.sky_exact:.2f} / -"
        lines.append(
            f"| {name} | {a.points:.0f} / {b.points:.0f} ({_ratio(a.points, b.points)})"
            f" | {a.quantiles[1]:.1f} / {b.quantiles[1]:.1f} ({_ratio(a.quantiles[1], b.quantiles[1])})"
            f" | {a.quantiles[0]:.1f}-{a.quantiles[2]:.1f} / {b.quantiles[0]:.1f}-{b.quantiles[2]:.1f}"
            f" | {a.sky_estimate:.2f} / {b.sky_estimate:.2f} | {exact} |"
        )
    edges = [f"{low:g}-{high:g}" if np.isfinite(high) else f"> {low:g}" for low, high in itertools.pairwise(EDGES)]
    lines += ["", "| share of points at z (m) | " + " | ".join(edges) + " |", "|---" * (len(edges) + 1) + "|"]
    for name in (n for n in rendered if n in real):
        shares = zip(rendered[name].histogram, real[name].histogram, strict=True)
        lines.append(f"| {name} | " + " | ".join(f"{a:.2f} / {b:.2f}" for a, b in shares) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.world.statistics", description=__doc__)
    parser.add_argument("rendered", help="records folder of rendered frames")
    parser.add_argument("real", help="records folder of real frames with the same camera names")
    args = parser.parse_args(argv)
    with exit_with_message():
        folders = (open_records(args.rendered), open_records(args.real))
        if not set(folders[0].cameras) & set(folders[1].cameras):
            raise ConfigError(
                f"no camera in common: {args.rendered} has {', '.join(folders[0].cameras)}; {args.real} has"
                f" {', '.join(folders[1].cameras)}; expected records of two rigs with the same camera names"
            )
        print(f"rendered / real: {len(folders[0])} / {len(folders[1])} samples, medians over samples\n")
        print(table(*(camera_statistics(records) for records in folders)))


if __name__ == "__main__":
    main()
