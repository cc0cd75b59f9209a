"""Runs a frozen teacher once over all records and keeps what the student learns from in a folder beside them.

  python -m fsmde_jax.teacher_cache --teacher teachers/small --records records/nuscenes_train \
      --image_size 352x640 --out caches/nuscenes_small

`data.pipeline.train_dataset(teacher_cache=...)` then adds the maps to its batches. The same command goes on where it
was interrupted. --tokens also keeps what view-relational distillation compares.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from fsmde_jax import heap
from fsmde_jax.convert import add_teacher_flags
from fsmde_jax.data import tfrecord
from fsmde_jax.data.pipeline import eval_batches
from fsmde_jax.data.records import Records, open_records
from fsmde_jax.data.teacher_maps import FORMAT_VERSION, MANIFEST_NAME, CacheManifest, encode_rig, load_manifest
from fsmde_jax.errors import ConfigError, DataError, exit_with_message
from fsmde_jax.losses.teacher_bins import resize_rel_inv_depth
from fsmde_jax.models.registry import DTYPES
from fsmde_jax.models.student import STRIDE, normalise_images
from fsmde_jax.models.teacher_images import LONGER_SIDE, teacher_size
from fsmde_jax.names import parse_size
from fsmde_jax.teacher import Teacher, open_teacher, weight_hash
from fsmde_jax.teacher_signal import pool_tokens, run_teacher

TOKEN_GRID = (6, 10)  # rows and columns that tokens are pooled to
RECORDS_PER_SHARD = 128
PLAN_NAME = "teacher_cache.unfinished.json"  # what an interrupted run was about to make


def plan(
    teacher: Teacher, records: Records, *, image_size: tuple[int, int], longer_side: int, tokens: bool, dtype: str
) -> CacheManifest:
    """The manifest of a cache, shards left empty.

    Raises:
      ConfigError: the image size is no multiple of 32, or a size or dtype cannot be used.
    """
    if min(image_size) < STRIDE or any(side % STRIDE for side in image_size):
        shown = "x".join(map(str, image_size))
        raise ConfigError(f"--image_size {shown}: height and width must be positive multiples of {STRIDE}")
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype!r}: expected one of {tuple(DTYPES)}")
    card = teacher.card
    channels = teacher.module().sizes.embed_dim
    return CacheManifest(
        format_version=FORMAT_VERSION,
        sha256=weight_hash(teacher),
        teacher={"variant": card.variant, "version": card.version, "max_depth": card.max_depth, "source": card.source,
                 "dtype": dtype},
        teacher_size=list(teacher_size(image_size, longer_side, teacher.module().patch)),
        records_fingerprint=records.fingerprint,
        num_records=len(records),
        cameras=list(records.cameras),
        image_size=list(image_size),
        head_size=[side // 2 for side in image_size],
        tokens=[*TOKEN_GRID, channels] if tokens else None,
        shards=[],
    )  # fmt: skip


def _entries(
    teacher: Teacher, records: Records, manifest: CacheManifest, start: int, batch_size: int
) -> Iterator[bytes]:
    """Encoded entries of the records from `start` on; a batch is encoded while the device computes the next one."""
    module = teacher.module(DTYPES[manifest.teacher["dtype"]], in_turn=jax.default_backend() == "cpu")
    params = jax.device_put(teacher.params)
    size, head = tuple(manifest.teacher_size), tuple(manifest.head_size)

    @jax.jit
    def run(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        maps = run_teacher(module, params, normalise_images(images), size=(size[0], size[1]))
        r = resize_rel_inv_depth(maps.rel_inv_depth, head[0], head[1])
        return r, pool_tokens(maps.tokens, TOKEN_GRID) if manifest.tokens else None

    def encoded(result: Any, view_mask: np.ndarray, samples: list[Any], indices: list[int]) -> Iterator[bytes]:
        r, tokens = jax.device_get(result)
        r = np.where(view_mask[:, :, None, None], r, 0)
        if tokens is not None:
            tokens = np.where(view_mask[:, :, None, None, None], tokens, 0)
        for row, (sample, index) in enumerate(zip(samples, indices, strict=True)):
            try:
                yield encode_rig(sample.sample_id, r[row], None if tokens is None else tokens[row])
            except DataError as error:
                raise DataError(f"{records.where(index)}, {error}") from error

    waiting = None
    image_size = (manifest.image_size[0], manifest.image_size[1])
    for batch, samples, indices in eval_batches(records, image_size, batch_size, start=start):
        result = run(params, batch["images"])
        if waiting is not None:
            yield from encoded(*waiting)
        waiting = (result, batch["view_mask"], samples, indices)
    if waiting is not None:
        yield from encoded(*waiting)


def _difference(path: Path, wanted: CacheManifest) -> str:
    """What a manifest says otherwise than `wanted`, but for the shards; "" = nothing."""
    found = dataclasses.asdict(load_manifest(path))
    pairs = {k: (found[k], v) for k, v in dataclasses.asdict(wanted).items() if k != "shards" and found[k] != v}
    return "; ".join(f"{key} is {old!r} there and {new!r} now" for key, (old, new) in pairs.items())


def write_cache(teacher: Teacher, records: Records, out: Path, manifest: CacheManifest, *, batch_size: int) -> int:
    """Writes the cache that `manifest` (of `plan`) describes, or what is missing of it.

    Returns:
      How many records were run; 0 = the cache was whole already.

    Raises:
      ConfigError: there is something else in `out`.
      DataError: a record is damaged, the teacher gave a value that is not finite, or the disk is full.
    """
    final, begun = out / MANIFEST_NAME, out / PLAN_NAME
    for path in (final, begun):
        if path.is_file():
            difference = _difference(path, manifest)
            if difference:
                raise ConfigError(f"--out {out}: holds another teacher cache: {difference}; choose another folder")
    if final.is_file():
        return 0
    if out.exists() and not begun.is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists already and is no unfinished teacher cache; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    tfrecord.write_atomically(begun, _json(manifest))
    for path in out.glob("*.tmp-*"):  # of a run that was killed
        path.unlink()
    count = len(records)
    total = -(-count // RECORDS_PER_SHARD)
    paths = [out / f"teacher_cache.tfrecord-{k:05d}-of-{total:05d}" for k in range(total)]
    done = next((k for k, path in enumerate(paths) if not path.is_file()), total)
    start = min(done * RECORDS_PER_SHARD, count)
    shown = tqdm(
        _entries(teacher, records, manifest, start, batch_size), total=count, initial=start, unit="rig", disable=None
    )
    entries = iter(shown)
    for path in paths[done:]:
        tfrecord.write_records(path, itertools.islice(entries, RECORDS_PER_SHARD))
    next(entries, None)  # lets the bar end
    held = [len(tfrecord.load_index(path)) for path in paths]
    if sum(held) != count:
        raise DataError(f"{out}: its shards do not hold {count} entries together; delete the folder and run again")
    shards = [
        {"name": path.name, "num_records": number, "num_bytes": path.stat().st_size}
        for path, number in zip(paths, held, strict=True)
    ]
    tfrecord.write_atomically(final, _json(dataclasses.replace(manifest, shards=shards)))
    begun.unlink()
    return count - start


def _json(manifest: CacheManifest) -> bytes:
    return (json.dumps(dataclasses.asdict(manifest), indent=1) + "\n").encode()


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fsmde_jax.teacher_cache", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--teacher",
        required=True,
        metavar="T",
        help="tiny (in this package), a folder of fsmde_jax.convert, a .pth or .safetensors file, or a student: its"
        " run, its .safetensors file, or lite0 (in this package)",
    )
    parser.add_argument("--records", required=True, metavar="R", help="records folder, or several with commas between")
    parser.add_argument("--cameras", default="", metavar="A,B", help="cameras to keep (default: all of the records)")
    parser.add_argument("--image_size", required=True, metavar="HxW", help="data.image_size of the student")
    parser.add_argument("--out", required=True, metavar="C", help="folder for the cache")
    parser.add_argument("--tokens", action="store_true", help="also keep pooled tokens (view-relational distillation)")
    parser.add_argument("--batch_size", type=int, default=1, metavar="B", help="rigs at a time (default 1)")
    parser.add_argument(
        "--longer_side", type=int, metavar="PIXELS",
        help="of the teacher's input (default: what its card says, else 630); teacher.longer_side of the student",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="compute dtype (default float32)")
    add_teacher_flags(parser)
    args = parser.parse_args(argv)
    with exit_with_message():
        size = parse_size(args.image_size, multiple=STRIDE)
        cameras = tuple(name.strip() for name in args.cameras.split(",") if name.strip())
        records = open_records(args.records, cameras)
        teacher = open_teacher(args.teacher, variant=args.variant, version=args.version, max_depth=args.max_depth)
        manifest = plan(
            teacher, records, image_size=size,
            longer_side=args.longer_side or teacher.card.longer_side or LONGER_SIDE, tokens=args.tokens,
            dtype=args.dtype,
        )  # fmt: skip
        made = write_cache(teacher, records, Path(args.out), manifest, batch_size=args.batch_size)
        text = f"{made} records were run" if made else "it was whole already"
        print(f"{args.out}: teacher cache of {len(records)} records; {text}")


if __name__ == "__main__":
    heap.keep_freed_memory()
    main()
