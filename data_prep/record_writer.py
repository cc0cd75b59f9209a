"""Converts a described split to record shards, in parallel, resumable, with the same bytes for any number of workers.

The split of the samples over shards depends on their number only. A shard appears under its name when it is whole; a
small file in `.parts/` then says so with its statistics. `manifest.json` comes last. So a run that was killed at any
moment leaves finished shards and temporary files: the next run deletes the latter, and keeps the former where the
samples are still described as then (calibration, poses, times, sizes of the files).
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from tqdm import tqdm

from data_prep import manifest as manifests
from data_prep import shard as shards
from data_prep import workers as processes
from data_prep.plan import BuildOptions, SamplePlan, Source
from fsmde_jax.data import schema
from fsmde_jax.data.records import load_manifest
from fsmde_jax.errors import ConfigError, DataError

_MAX_PER_SHARD = 128  # about 60 MB at 352x640
_MAX_SHARDS_SMALL = 16  # small splits still give this many workers something to do
_PARTS = ".parts"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Conversion by Apache Beam (`data_prep.beam`): how a worker opens the source, the runner, and its options."""

    open_source: Callable[[], Source]
    runner: str
    options: tuple[str, ...] = ()

    def run(self, indices: list[int], job: Callable[[Source, int], shards.Job], out: Path) -> None:
        """Makes the shards; see `beam.run`."""
        try:
            from data_prep import beam
        except ImportError as error:
            raise ConfigError(f'--runner needs Apache Beam ({error}): pip install -e ".[beam]"') from error
        beam.run(indices, self.open_source, job, runner=self.runner, options=self.options, out=out)


def shard_bounds(num_samples: int) -> list[tuple[int, int]]:
    """[first, last) of each shard; depends on the number of samples only."""
    per_shard = min(_MAX_PER_SHARD, max(1, -(-num_samples // _MAX_SHARDS_SMALL)))
    return [(i, min(i + per_shard, num_samples)) for i in range(0, num_samples, per_shard)]


def convert(
    source: Source, out: str | Path, options: BuildOptions, *, sweeps: int = 0, workers: int = 1,
    on_error: str = "stop", cluster: Cluster | None = None,
) -> schema.Manifest:  # fmt: skip
    """Writes the split to the folder `out` and returns its manifest.

    Args:
      source: the split; `source.describe` is called in this process, in order.
      out: records folder; made if missing. A finished conversion of the same inputs is kept, another one is refused.
      options: image size, JPEG quality, point rule.
      sweeps: neighbouring sweeps per sample, recorded in the manifest (`source.describe` adds them).
      workers: processes; 1 = in this process. The records do not depend on it.
      on_error: "stop", or "skip" to leave out samples that cannot be converted and list them in the manifest.
      cluster: convert by Apache Beam instead of by `workers`; the records are the same.

    Raises:
      DataError: a sample cannot be converted, the folder holds something else, or it cannot be written.
    """
    out = Path(out)
    if not source.sample_ids:
        raise DataError(
            f"{source.dataset} {source.version}: split {source.split!r} has no samples here; nothing to convert"
        )
    identity = manifests.identity(source, options, sweeps)
    bounds = shard_bounds(len(source.sample_ids))
    with _locked_folder(out):
        if (out / schema.MANIFEST_NAME).exists():
            return _check_finished(source, out, identity, bounds)
        jobs, finished = _open_jobs(source, out, options, on_error, identity, bounds)
        if finished:
            print(f"{out}: resuming, {len(finished)} of {len(bounds)} shards are done", file=sys.stderr)
        workers = min(workers, len(bounds) - len(finished))
        if cluster is not None:
            left = [i for i in range(len(bounds)) if i not in finished]
            job = functools.partial(_job, out=out, options=options, on_error=on_error, identity=identity)
            cluster.run(left, job, out)
            finished = _finished_parts(source, out, identity, bounds)
            if missing := [i for i in range(len(bounds)) if i not in finished]:
                raise DataError(
                    f"{out}: {len(missing)} shards of the Beam pipeline are not here, e.g. number {missing[0]}; the"
                    " workers have to see this folder at this path"
                )
        else:
            for index, part in _run(jobs, len(source.sample_ids), finished, bounds, workers):
                finished[index] = part
        result = _manifest(source, options, sweeps, identity, [finished[i] for i in range(len(bounds))])
        try:
            manifests.write_metadata(out, result)
        except OSError as error:
            raise DataError(f"{out}: cannot write the manifest ({error.strerror}); free space and run again") from error
        shutil.rmtree(out / _PARTS, ignore_errors=True)
    return result


def _check_finished(source: Source, out: Path, identity: str, bounds: list[tuple[int, int]]) -> schema.Manifest:
    """The manifest of a finished folder, if it was made from the same samples, calibration, files and options."""
    found = load_manifest(out)
    bar = tqdm(bounds, desc="comparing with the source", unit="shard", leave=False, disable=None)
    digests = [manifests.plans_digest(_plans(source, first, last, "skip")) for first, last in bar]
    if found.fingerprint != manifests.fingerprint(identity, digests):
        raise DataError(
            f"{out}: holds a finished conversion of other samples or options ({_describe(found)}), or the dataset's"
            " calibration, poses, times or files changed since; choose another --out or delete it"
        )
    shutil.rmtree(out / _PARTS, ignore_errors=True)
    print(f"{out}: already converted, {found.num_samples} samples, {len(found.skipped)} skipped; nothing to do")
    return found


def _plans(source: Source, first: int, last: int, on_error: str) -> list[SamplePlan | tuple[str, str]]:
    """Descriptions of the samples [first, last); with "skip", (id, reason) of those that cannot be described."""
    plans: list[SamplePlan | tuple[str, str]] = []
    for k in range(first, last):
        try:
            plans.append(source.describe(k))
        except DataError as error:
            if on_error != "skip":
                raise
            plans.append((source.sample_ids[k], str(error)))
    return plans


@contextlib.contextmanager
def _locked_folder(out: Path) -> Iterator[None]:
    """Makes the folder and holds a lock on it, so that two conversions never write into one."""
    try:
        (out / _PARTS).mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise DataError(
            f"{out}: cannot make this records folder ({error.strerror}: {error.filename}); choose another --out"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"{out}: another data_prep process is writing here; wait for it or choose another --out"
            ) from error
        yield
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            (out / _PARTS).rmdir()  # only when empty


def _open_jobs(
    source: Source, out: Path, options: BuildOptions, on_error: str, identity: str, bounds: list[tuple[int, int]]
) -> tuple[Iterator[tuple[int, shards.Job]], dict[int, dict]]:
    """Deletes leftovers; returns the shards still to do (described lazily) and the parts of those that are done."""
    paths = _paths(source, out, len(bounds))[0]
    finished = _finished_parts(source, out, identity, bounds)
    planned = {p.name for p in paths} | {f"{p.name}.index" for p in paths}
    strays = [p for p in out.glob(f"{schema.TFDS_NAME}-*.tfrecord-*") if p.name not in planned]
    for leftover in [*out.glob("*.tmp-*"), *(out / _PARTS).glob("*.tmp-*"), *strays]:
        leftover.unlink(missing_ok=True)

    def jobs() -> Iterator[tuple[int, shards.Job]]:
        for i in range(len(bounds)):
            if i not in done:
                yield i, _job(source, i, out=out, options=options, on_error=on_error, identity=identity)

    done = frozenset(finished)
    return jobs(), finished


def _paths(source: Source, out: Path, count: int) -> tuple[list[Path], list[Path]]:
    """Files of the shards, and their part files."""
    prefix = f"{schema.TFDS_NAME}-{source.split}.tfrecord"
    paths = [out / f"{prefix}-{i:05d}-of-{count:05d}" for i in range(count)]
    return paths, [out / _PARTS / f"{p.name}.json" for p in paths]


def _job(source: Source, index: int, *, out: Path, options: BuildOptions, on_error: str, identity: str) -> shards.Job:
    """What shard `index` of the split is made of."""
    bounds = shard_bounds(len(source.sample_ids))
    paths, parts = _paths(source, out, len(bounds))
    plans = _plans(source, *bounds[index], on_error)
    digest = manifests.plans_digest(plans)
    return shards.Job(paths[index], parts[index], plans, source.cameras, options, on_error, identity, digest)


def _finished_parts(source: Source, out: Path, identity: str, bounds: list[tuple[int, int]]) -> dict[int, dict]:
    """The parts of shards that are done; `DataError` if they were made of anything else than what is described now."""
    paths, parts = _paths(source, out, len(bounds))
    finished: dict[int, dict] = {}
    refused = "delete it or choose another --out"
    for part in sorted((out / _PARTS).glob("*.json")):
        try:
            content = json.loads(part.read_bytes())
        except ValueError:
            content = None
        if not isinstance(content, dict) or content.get("identity") != identity or part not in parts:
            raise DataError(f"{out}: holds an unfinished conversion of other samples or options; {refused}")
        index = parts.index(part)
        if not paths[index].is_file() or paths[index].stat().st_size != content["shard"]["num_bytes"]:
            continue  # made again
        if content["plans"] != manifests.plans_digest(_plans(source, *bounds[index], "skip")):
            raise DataError(
                f"{out}: holds an unfinished conversion, and the dataset's calibration, poses, times or files changed"
                f" since ({paths[index].name}); {refused}"
            )
        finished[index] = content
    return finished


def _run(
    jobs: Iterator[tuple[int, shards.Job]], num_samples: int, finished: dict, bounds: list, workers: int
) -> Iterator[tuple[int, dict]]:
    """Converts the shards; at most 2 per worker are described ahead, so memory does not grow with the dataset."""
    already = sum(bounds[i][1] - bounds[i][0] for i in finished)
    processes.done = counter = processes.new_counter()
    bar = tqdm(total=num_samples, initial=already, unit="rig", desc="converting", disable=None, dynamic_ncols=True)

    def refresh() -> None:
        bar.update(already + counter.value - bar.n)

    with bar:
        if workers <= 1:
            for index, job in jobs:
                yield index, shards.convert_shard(job, refresh)
            return
        with processes.pool(workers, counter, "finished shards") as pool:
            yield from processes.results(pool, shards.convert_shard, jobs, ahead=2 * workers, refresh=refresh)


def _manifest(source: Source, options: BuildOptions, sweeps: int, identity: str, parts: list[dict]) -> schema.Manifest:
    skipped = [s for part in parts for s in part["skipped"]]
    statistics = manifests.merge_statistics([part["statistics"] for part in parts], source.cameras)
    focal = statistics.pop("focal")
    if focal is None:
        raise DataError(f"no sample could be converted; the first problem: {skipped[0]['reason']}")
    return schema.Manifest(
        format_version=schema.FORMAT_VERSION,
        dataset=source.dataset,
        source_version=source.version,
        split=source.split,
        complete_split=source.complete and not skipped,
        num_samples=sum(part["shard"]["num_records"] for part in parts),
        shards=[part["shard"] for part in parts],
        cameras=source.cameras,
        point_rule=source.point_rule,
        sweeps=sweeps,
        image_size=list(options.image_size) if options.image_size else None,
        dense_depth=source.dense_depth,
        min_depth=source.min_depth,
        max_depth=source.max_depth,
        focal_by_width=focal,
        scenes=source.scenes,
        options={**source.options, "jpeg_quality": options.jpeg_quality},
        skipped=skipped,
        statistics=statistics,
        fingerprint=manifests.fingerprint(identity, [part["plans"] for part in parts]),
    )


def _describe(found: schema.Manifest) -> str:
    size = "native" if found.image_size is None else "x".join(map(str, found.image_size))
    name = f"{found.dataset} {found.source_version} {found.split}"
    return f"{name}, {found.num_samples} samples, {size}, {found.sweeps} sweeps"
