"""One shard of records: what a worker process gets, and what it writes."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep import manifest as manifests
from data_prep import workers
from data_prep.plan import BuildOptions, SamplePlan, build_sample
from fsmde_jax.data import schema, tfrecord
from fsmde_jax.errors import DataError


@dataclasses.dataclass(frozen=True)
class Job:
    """One shard: sample plans, or (sample id, reason) where a sample could not even be described."""

    path: Path
    part: Path
    plans: list[SamplePlan | tuple[str, str]]
    cameras: list[str]
    options: BuildOptions
    on_error: str
    identity: str
    digest: str  # of the plans


def convert_shard(job: Job, refresh: Any = None) -> dict:
    """Writes one shard, its index and its part file; returns the part."""
    statistics = manifests.new_statistics(job.cameras)
    skipped: list[dict[str, str]] = []

    def records() -> Iterator[bytes]:
        for plan in job.plans:
            if isinstance(plan, SamplePlan):
                try:
                    sample = build_sample(plan, job.options)
                    data = schema.encode(sample)
                except DataError as error:
                    if job.on_error != "skip":
                        raise DataError(
                            f"sample {plan.sample_id!r}: {error}\n(--on_error skip leaves such samples out and"
                            " lists them)"
                        ) from error
                    skipped.append({"sample_id": plan.sample_id, "reason": str(error)})
                else:
                    manifests.add_sample(statistics, sample)
                    yield data
            else:
                skipped.append({"sample_id": plan[0], "reason": plan[1]})
            workers.count()
            if refresh:
                refresh()

    count = tfrecord.write_records(job.path, records())
    part = {
        "identity": job.identity,
        "plans": job.digest,
        "shard": {
            "name": job.path.name,
            "num_records": count,
            "num_bytes": job.path.stat().st_size,
            "sha256": manifests.file_sha256(job.path),
        },
        "statistics": statistics,
        "skipped": skipped,
    }
    try:
        tfrecord.write_atomically(job.part, json.dumps(part).encode())
    except OSError as error:
        raise DataError(
            f"{job.part}: cannot write ({error.strerror}); free space and run again, finished shards are kept"
        ) from error
    return part
