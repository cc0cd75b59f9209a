"""Checks finished records: `python -m data_prep.verify R [R2 ...] [--overlay out.png]`.

Everything is read again: checksums of files and records, schema, images, counts and statistics of the manifest. Several
folders are also compared with each other: no scene and no sample may be in two splits of different use.
"""

import argparse
import dataclasses
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from data_prep import leakage, overlay
from data_prep import manifest as manifests
from data_prep.images import decode_image
from fsmde_jax.data import dense, schema, tfrecord
from fsmde_jax.data.records import load_manifest
from fsmde_jax.errors import ConfigError, DataError, exit_with_message

_AGREES = 0.02  # relative difference of a LiDAR point and the dense depth at its pixel


@dataclasses.dataclass
class Agreement:
    """LiDAR points beside the dense depth at their pixels, over all cameras."""

    points: int = 0  # whose pixel, with its eight neighbours, is one surface: depths within 5 %
    agree: int = 0
    behind: int = 0  # the LiDAR sees past something that hides the point from the camera
    in_front: int = 0  # returns from the car's own body that the camera does not see, range noise, motion

    def add(self, sample: schema.RigSample, where: str) -> None:
        """Counts the points of one sample (`DataError` naming `where`: a damaged plane)."""
        for i, data in enumerate(sample.dense_depth):
            if not data:
                continue
            size = int(sample.image_size[i, 0]), int(sample.image_size[i, 1])
            plane = dense.decode(data, size, f"{where}, camera {sample.camera_names[i]}")
            nearest, farthest = cv2.erode(plane, np.ones((3, 3))), cv2.dilate(plane, np.ones((3, 3)))
            uv = (sample.points[i][:, :2] + 0.5) * (sample.image_size[i] / sample.native_size[i])[::-1]
            cols, rows = np.clip(uv.astype(np.int64), 0, np.array(size)[::-1] - 1).T
            inner = (nearest[rows, cols] > 0) & (farthest[rows, cols] < 1.05 * nearest[rows, cols])
            truth, measured = plane[rows, cols][inner], sample.points[i][inner, 2]
            self.points += int(inner.sum())
            self.agree += int(np.sum(np.abs(truth - measured) <= _AGREES * measured))
            self.behind += int(np.sum(truth < (1 - _AGREES) * measured))
            self.in_front += int(np.sum(truth > (1 + _AGREES) * measured))

    def __str__(self) -> str:
        agree, behind, front = (100 * n / max(1, self.points) for n in (self.agree, self.behind, self.in_front))
        return (
            f"of {self.points:,} LiDAR points away from edges {agree:.2f} % are within 2 % of the dense depth,"
            f" {behind:.2f} % behind it (hidden from the camera), {front:.2f} % in front of it"
        )


def verify_folder(folder: str | Path, agreement: Agreement | None = None) -> tuple[schema.Manifest, set[str]]:
    """Reads a records folder again from end to end; returns its manifest and the ids of its samples.

    Args:
      folder: the records folder.
      agreement: counts the samples' LiDAR points and dense depth in.

    Raises:
      DataError: the first thing that is wrong, naming the file or the record.
    """
    folder = Path(folder)
    found = load_manifest(folder)
    _check_files(folder, found)
    statistics = manifests.new_statistics(found.cameras)
    ids: set[str] = set()
    scenes: set[str] = set()
    bar = tqdm(total=found.num_samples, desc="records", unit="rig", leave=False, disable=None)
    for shard in found.shards:
        path = folder / shard["name"]
        reader = tfrecord.TFRecordReader([path])
        if len(reader) != shard["num_records"]:
            raise DataError(
                f"{path}: holds {len(reader)} records, the manifest says {shard['num_records']}; convert again"
            )
        for i in range(len(reader)):
            sample = schema.decode(reader[i], reader.where(i))
            check_sample(sample, found, reader.where(i))
            if sample.sample_id in ids:
                raise DataError(f"{reader.where(i)}: sample {sample.sample_id!r} is there twice; convert again")
            ids.add(sample.sample_id)
            scenes.add(sample.scene)
            manifests.add_sample(statistics, sample)
            if agreement is not None:
                agreement.add(sample, reader.where(i))
            bar.update()
        reader.close()
    bar.close()
    if len(ids) != found.num_samples:
        raise DataError(f"{folder}: {len(ids)} samples, the manifest says {found.num_samples}; convert again")
    focal = statistics.pop("focal")
    if focal is None:
        raise DataError(f"{folder}: holds no sample; convert again")
    if statistics != found.statistics or not np.allclose(focal, found.focal_by_width):
        raise DataError(f"{folder}: the manifest's statistics are not those of the records; convert again")
    if not scenes <= set(found.scenes):
        raise DataError(f"{folder}: scenes {sorted(scenes - set(found.scenes))} are not in the manifest; convert again")
    return found, ids


def _check_files(folder: Path, found: schema.Manifest) -> None:
    """Files, sizes and checksums against the manifest; TFDS metadata against both."""
    listed = {shard["name"] for shard in found.shards}
    there = {p.name for p in folder.glob("*.tfrecord-*") if p.suffix != ".index"}
    if there != listed:
        raise DataError(
            f"{folder}: missing shards {sorted(listed - there)}, unlisted files {sorted(there - listed)}; convert again"
        )
    for shard in tqdm(found.shards, desc="checksums", unit="file", leave=False, disable=None):
        path = folder / shard["name"]
        if path.stat().st_size != shard["num_bytes"] or manifests.file_sha256(path) != shard["sha256"]:
            raise DataError(f"{path}: size or sha256 differs from the manifest; the file is damaged, convert again")
    for name in ("dataset_info.json", "features.json"):
        try:
            content = json.loads((folder / name).read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{folder / name}: missing or broken TFDS metadata ({error}); convert again") from error
        if name == "dataset_info.json":
            try:
                lengths = [int(n) for n in content["splits"][0]["shardLengths"]]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise DataError(f"{folder / name}: no shard lengths in it ({error!r}); convert again") from error
            if lengths != [shard["num_records"] for shard in found.shards]:
                raise DataError(f"{folder / name}: shard lengths differ from the manifest; convert again")


def check_sample(sample: schema.RigSample, found: schema.Manifest, where: str) -> None:
    """Schema, cameras, images, masks and dense depth of one record (`DataError` naming `where`)."""
    sample.validate(where)
    if sample.camera_names != found.cameras:
        raise DataError(f"{where}: cameras {sample.camera_names}, the manifest says {found.cameras}; convert again")
    for i, name in enumerate(sample.camera_names):
        here = f"{where}, camera {name}"
        pixels = decode_image(sample.images[i], here)
        if list(pixels.shape[:2]) != sample.image_size[i].tolist():
            raise DataError(f"{here}: the image is {pixels.shape[:2]}, its record says {sample.image_size[i].tolist()}")
        if found.dense_depth and not sample.dense_depth[i]:
            raise DataError(f"{here}: no dense depth, but the manifest says that all have it; convert again")
        if sample.dense_depth[i]:
            dense.decode_units(sample.dense_depth[i], pixels.shape[:2], here)
        if sample.ego_masks[i]:
            mask = Image.open(io.BytesIO(sample.ego_masks[i]))
            if [mask.height, mask.width] != sample.native_size[i].tolist():
                raise DataError(
                    f"{here}: the mask is {mask.height}x{mask.width}, expected {sample.native_size[i].tolist()}"
                )


def describe(found: schema.Manifest) -> Iterator[str]:
    """Lines of text with what a records folder holds."""
    size = "native" if found.image_size is None else f"{found.image_size[0]}x{found.image_size[1]}"
    megabytes = sum(shard["num_bytes"] for shard in found.shards) / 1e6
    kind = manifests.kind(found)
    yield f"{found.dataset} {found.source_version}, split {found.split}: {kind}, n = {found.num_samples}"
    yield f"{len(found.scenes)} scenes, {len(found.cameras)} cameras, images {size}"
    yield f"{megabytes:.1f} MB in {len(found.shards)} shards"
    yield (
        f"points: own sweep, pixel rule {found.point_rule}, evaluation range {found.min_depth:g}-{found.max_depth:g} m"
        + (f"; extra training labels from {found.sweeps} sweeps" if found.sweeps else "")
    )
    if found.dense_depth:
        yield f"dense depth of every pixel below {dense.MAX_DEPTH:.0f} m"
    if found.skipped:
        first = found.skipped[0]
        yield f"{len(found.skipped)} samples were skipped, e.g. {first['sample_id']}: {first['reason']}"
    yield ""
    dense_head = f"{'dense':>9}" if found.dense_depth else ""
    yield f"{'camera':<18}{'points/sample':>14}{'fewest':>9}{'most':>9}{'without':>9}{'extra':>12}{dense_head}"
    for name in found.cameras:
        one = found.statistics["cameras"][name]
        mean, extra = (one[key] / max(1, found.num_samples) for key in ("points", "extra_points"))
        yield (
            f"{name:<18}{mean:>14.1f}{one['fewest_points']:>9}{one['most_points']:>9}"
            f"{one['samples_without_points']:>9}{extra:>12.1f}"
            + (f"{100 * one['dense_pixels'] / max(1, one['pixels']):>7.1f} %" if found.dense_depth else "")
        )
    yield ""
    counts, edges = found.statistics["depth_counts"], found.statistics["depth_edges"]
    for low, high, count in itertools.zip_longest(edges, edges[1:], counts):
        share = count / max(1, sum(counts))
        label = f"{low:>4} - {high:<4}m" if high is not None else f"{low:>4} +     m"
        yield f"{label}{count:>13,}  {100 * share:5.1f} %  {'#' * round(60 * share)}"


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m data_prep.verify", description=__doc__)
    parser.add_argument("records", nargs="+", metavar="R", help="records folders")
    parser.add_argument("--overlay", metavar="out.png", help="draw the LiDAR points of one sample of the first folder")
    parser.add_argument("--sample", type=int, default=0, metavar="I", help="which sample to draw (default 0)")
    args = parser.parse_args(argv)
    with exit_with_message():
        checked = {}
        for folder in args.records:
            agreement = Agreement()
            found, ids = verify_folder(folder, agreement)
            checked[folder] = (found, ids)
            print(f"{folder}: whole, all checksums are right")
            print("\n".join(f"  {line}".rstrip() for line in describe(found)))
            if agreement.points:
                print(f"  {agreement}")
        for (a, (first, ids_a)), (b, (second, ids_b)) in itertools.combinations(checked.items(), 2):
            said = leakage.check_manifests(first, second, (a, b))
            shared = len(ids_a & ids_b) if first.dataset == second.dataset else 0
            if shared and not leakage.may_share(first.split, second.split):
                raise DataError(f"{a} and {b} share {shared} samples; evaluation would see training data")
            print(said + (f"; {shared} samples are in both" if shared else ""))
        if args.overlay:
            _write_overlay(args.records[0], checked[args.records[0]][0], args.sample, args.overlay)


def _write_overlay(folder: str, found: schema.Manifest, index: int, path: str) -> None:
    reader = tfrecord.TFRecordReader([Path(folder) / shard["name"] for shard in found.shards])
    if not 0 <= index < len(reader):
        raise ConfigError(f"--sample={index}: {folder} holds samples 0 to {len(reader) - 1}")
    sample = schema.decode(reader[index], reader.where(index))
    title = f"{found.dataset} {found.split}   {sample.scene}   sample {index} of {found.num_samples}"
    picture = overlay.draw_overlay(sample, found.max_depth, title)
    try:
        picture.save(path)
    except (OSError, ValueError) as error:
        raise DataError(f"--overlay={path}: cannot write this picture ({error})") from error
    print(f"{path}: LiDAR over the images of sample {index}")


if __name__ == "__main__":
    main()
