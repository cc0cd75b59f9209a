"""What an evaluation found: one protocol, one set of records; as Markdown, JSON, CSV and as flat scalars."""

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from fsmde_jax import metrics
from fsmde_jax.data.tfrecord import write_atomically
from fsmde_jax.errors import DataError
from fsmde_jax.metrics import Table
from fsmde_jax.viz.colour import encode_png
from fsmde_jax.viz.confidence_plot import confidence_plot

SCALINGS = ("metric", "median", "shared_median", "affine")
_CONFIDENCE = {  # what is shown of it, and its column
    "ause_abs_rel": "AUSE abs_rel ↓", "random_ause_abs_rel": "(random order)", "ause_rmse": "AUSE rmse ↓",
    "random_ause_rmse": "(random order)", "ece": "calibration error ↓",
}  # fmt: skip


@dataclasses.dataclass
class Results:
    """One evaluation. A table never mixes protocols, because an object of this class knows exactly one.

    Attributes:
      protocol: "surround" (P1), "vfdepth" (P2) or "affine" (P0).
      title: data, split and sample count; says `subset` unless a complete official split was evaluated.
      samples: number of rig samples.
      table: part -> camera or "all" -> metric -> value (see `protocols`).
      consistency: directed camera pair "A>B" or "overall" -> value; empty under P2.
      pixels: valid pixels per camera.
      skipped: images (P2: batches) without a valid pixel, per camera.
      options: how it was evaluated: range, flip test-time augmentation, network size, limit, range of samples.
      identity: what made the prediction (commit, config, data, versions, checkpoint).
      pictures: (sample id, panorama [H, W, 3] uint8).
      failed: images whose alignment failed, per camera; P0 only.
      trivial: predictor without a network -> camera or "all" -> metric -> value, unscaled; empty if none was measured.
      confidence: `confidence.Confidence.result`; empty if it was not measured.
    """

    protocol: str
    title: str
    samples: int
    table: Table
    consistency: dict[str, float]
    pixels: dict[str, int]
    skipped: dict[str, int]
    options: dict[str, Any]
    identity: dict[str, Any] = dataclasses.field(default_factory=dict)
    pictures: list[tuple[str, np.ndarray]] = dataclasses.field(default_factory=list)
    failed: dict[str, int] = dataclasses.field(default_factory=dict)
    trivial: Table = dataclasses.field(default_factory=dict)
    confidence: dict[str, Any] = dataclasses.field(default_factory=dict)

    def flat(self) -> dict[str, float]:
        """Scalars of all cameras: `metric/abs_rel`, `median/a1`, `consistency/overall`, `confidence/ece` ..."""
        values = {f"{part}/{name}": value for part, rows in self.table.items() for name, value in rows["all"].items()}
        if "overall" in self.consistency:
            values["consistency/overall"] = self.consistency["overall"]
        known = self.confidence["cameras"]["all"] if self.confidence else {}
        return values | {f"confidence/{name}": known[name] for name in _CONFIDENCE if name in known}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready content, without the pictures."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "pictures"}
        return json.loads(json.dumps(fields, default=str))

    def to_csv(self) -> str:
        """One line per part and camera; the protocol and the title stand in every line."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["protocol", "title", "part", "camera", *metrics.NAMES])
        for part, rows in self.table.items():
            for camera, row in rows.items():
                values = [f"{row[name]:.8g}" for name in metrics.NAMES]
                writer.writerow([self.protocol, self.title, part, camera, *values])
        for name, rows in self.trivial.items():
            for camera, row in rows.items():
                values = [f"{row[metric]:.8g}" for metric in metrics.NAMES]
                writer.writerow([self.protocol, self.title, f"trivial: {name}", camera, *values])
        blank = [""] * (len(metrics.NAMES) - 1)  # consistency is a relative error, so it stands under abs_rel
        for pair, value in self.consistency.items():
            writer.writerow([self.protocol, self.title, "consistency", pair, f"{value:.8g}", *blank])
        return text.getvalue()

    def to_markdown(self) -> str:
        """Tables for people."""
        lines = [f"## {self.title}", "", self._how(), ""]
        scalings = [part for part in SCALINGS if part in self.table]
        others = [(f"trivial: {name}", rows["all"]) for name, rows in self.trivial.items()]
        lines += _table("all cameras", [(part, self.table[part]["all"]) for part in scalings] + others)
        if self.trivial:
            lines += [self._beside_trivial(), ""]
        for part in scalings:
            lines += _table(f"`{part}` per camera", list(self.table[part].items()))
        parts = [(_part_name(part), rows["all"]) for part, rows in self.table.items() if part not in SCALINGS]
        if parts:
            lines += _table("`metric`, parts of the ground truth", parts)
        if self.consistency:
            lines += ["| cross-view consistency | mean abs(z_ij - d_j) / d_j |", "|---|---|"]
            lines += [f"| {pair} | {value:.4f} |" for pair, value in self.consistency.items()] + [""]
        lines += _confidence(self.confidence) if self.confidence else []
        counts = {"valid pixels": self.pixels, "skipped": self.skipped, "not aligned": self.failed}
        counts = {name: of for name, of in counts.items() if of}
        lines += [f"| camera | {' | '.join(counts)} |", "|---" * (len(counts) + 1) + "|"]
        for camera in self.pixels:
            lines.append(f"| {camera} | {' | '.join(str(of.get(camera, 0)) for of in counts.values())} |")
        return "\n".join(lines) + "\n"

    def _beside_trivial(self) -> str:
        """One sentence: the unscaled prediction's abs_rel as a part of the best trivial predictor's."""
        best = min(self.trivial, key=lambda name: self.trivial[name]["all"]["abs_rel"])
        part = next(iter(self.table))
        ratio = self.table[part]["all"]["abs_rel"] / self.trivial[best]["all"]["abs_rel"]
        return f"abs_rel of `{part}` is {ratio:.2f} of that of the best trivial predictor ({best})."

    def _how(self) -> str:
        o = self.options
        code = {"surround": "P1 `surround`", "vfdepth": "P2 `vfdepth`", "affine": "P0 `affine`"}[self.protocol]
        height, width = o["image_size"]
        text = f"Protocol {code}; {o['min_depth']:g}-{o['max_depth']:g} m; network {height}x{width}; "
        text += "ground truth: dense depth at the records' image size; " if o.get("ground_truth") == "dense" else ""
        text += "flip test-time augmentation ON" if o["flip_tta"] else "no test-time augmentation"
        keys = ("checkpoint", "step", "commit", "date")
        made_by = [f"{key} {self.identity[key]}" for key in keys if key in self.identity]
        return text + (f"; {', '.join(made_by)}" if made_by else "") + "."

    def write(self, folder: str | Path, stem: str = "") -> list[Path]:
        """Writes <stem>.md, .json, .csv and the pictures, each by rename; returns the files.

        Raises:
          DataError: the folder cannot be written to.
        """
        folder, stem = Path(folder), stem or self.protocol
        blobs = {
            f"{stem}.md": self.to_markdown().encode(),
            f"{stem}.json": (json.dumps(self.to_dict(), indent=1) + "\n").encode(),
            f"{stem}.csv": self.to_csv().encode(),
        }
        for number, (_, picture) in enumerate(self.pictures):
            blobs[f"{stem}_{number:02d}.png"] = encode_png(picture)
        if self.confidence:
            blobs[f"{stem}_confidence.png"] = confidence_plot(self.confidence, self.title)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, blob in blobs.items():
                write_atomically(folder / name, blob)
        except OSError as error:
            raise DataError(
                f"{folder}: cannot write the evaluation ({error.strerror}); free space or choose another folder"
            ) from error
        return [folder / name for name in blobs]


def _part_name(part: str) -> str:
    """`range_0_20` as people write it: 0-20 m."""
    return part.removeprefix("range_").replace("_", "-") + " m" if part.startswith("range_") else part


def _confidence(found: dict[str, Any]) -> list[str]:
    """Per camera, how well the uncertainty orders the errors; for all cameras, what central intervals cover."""
    lines = [f"| confidence | {' | '.join(_CONFIDENCE.values())} |", "|---" * (len(_CONFIDENCE) + 1) + "|"]
    for camera, of in found["cameras"].items():
        lines.append(f"| {camera} | " + " | ".join(f"{of[n]:.4f}" if n in of else "-" for n in _CONFIDENCE) + " |")
    covered = found["cameras"]["all"].get("coverage", [])
    if covered:
        lines += ["", "| central interval | " + " | ".join(f"{100 * level:.0f} %" for level in found["levels"]) + " |"]
        lines += ["|---" * (len(covered) + 1) + "|"]
        lines += ["| holds of the labels | " + " | ".join(f"{100 * share:.1f} %" for share in covered) + " |"]
    return [*lines, ""]


def _table(caption: str, rows: list[tuple[str, dict[str, float]]]) -> list[str]:
    arrows = [f"{name} {'↓' if name in metrics.LOWER_IS_BETTER else '↑'}" for name in metrics.NAMES]
    lines = [f"| {caption} | {' | '.join(arrows)} |", "|---" * (len(metrics.NAMES) + 1) + "|"]
    digits = {"silog": 2, "rmse": 3, "sq_rel": 3}
    for name, row in rows:
        lines.append(f"| {name} | " + " | ".join(f"{row[m]:.{digits.get(m, 4)}f}" for m in metrics.NAMES) + " |")
    return [*lines, ""]
