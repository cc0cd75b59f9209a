"""Conversion as an Apache Beam pipeline: one element is one shard, and any of Beam's runners spreads them over workers.

A worker opens the dataset for itself, so the pipeline holds nothing but the numbers of the shards. Dataset and records
folder have to be at the same path for all of them (NFS, a mounted bucket). Shards and part files are what
`record_writer.convert` makes without Beam, byte for byte, and a pipeline that was stopped goes on likewise.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import apache_beam
from apache_beam.options.pipeline_options import PipelineOptions

from data_prep import shard as shards
from data_prep.plan import Source
from fsmde_jax.errors import DataError


class _Convert(apache_beam.DoFn):
    """The number of a shard -> the same, once its file and its part file are there."""

    def __init__(self, open_source: Callable[[], Source], job: Callable[[Source, int], shards.Job]):
        self._open, self._job = open_source, job

    def setup(self) -> None:
        self._source = self._open()

    def process(self, index: int) -> Iterator[int]:
        shards.convert_shard(self._job(self._source, index))
        yield index


def run(
    indices: Iterable[int], open_source: Callable[[], Source], job: Callable[[Source, int], shards.Job], *,
    runner: str, options: Sequence[str], out: Path,
) -> None:  # fmt: skip
    """Makes the shards `indices` and returns when all are there.

    Args:
      indices: numbers of shards.
      open_source: opens the dataset on a worker; picklable.
      job: (source, number) -> what to convert; picklable.
      runner: of Beam, e.g. DirectRunner, DataflowRunner, FlinkRunner, SparkRunner.
      options: Beam's pipeline options, e.g. ["--project=p", "--region=r", "--temp_location=gs://b/tmp"].
      out: records folder, for messages.

    Raises:
      DataError: the runner or a shard failed; shards that are done are kept.
    """
    numbers = list(indices)
    flags = [f"--runner={runner}", *options]
    try:
        with apache_beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
            made = pipeline | apache_beam.Create(numbers) | apache_beam.Reshuffle()
            _ = made | "convert shards" >> apache_beam.ParDo(_Convert(open_source, job))
    except Exception as error:  # whatever a runner makes of a worker's error
        raise DataError(f"{out}: the Beam pipeline failed: {_reason(error)}\nShards that are done are kept.") from error


def _reason(error: BaseException) -> str:
    """The worker's own words, where a runner wrapped them."""
    found: Any = error
    while found is not None and not isinstance(found, DataError):
        found = found.__cause__
    text = str(found if found is not None else error).strip()
    return text.split(" [while running")[0] or type(error).__name__
