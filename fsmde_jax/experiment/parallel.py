"""Runs one after the other, or several at a time, each in a process of its own with its share of the cores."""

import concurrent.futures
import multiprocessing
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from absl import logging

from fsmde_jax.errors import ConfigError, TrainingError
from fsmde_jax.experiment import runs as runs_of
from fsmde_jax.experiment.plan import Run

Done = tuple[Run, dict[str, Any], float]  # a run, its result, its seconds


def execute_all(runs: Sequence[Run], root: Path, data: Mapping[str, str], jobs: int = 1) -> Iterator[Done]:
    """Makes the runs with `runs.execute`, and yields each when it is done.

    Args:
      runs: what to run, no folder twice.
      root: folder of all experiments.
      data: fingerprints of the records.
      jobs: at a time. With 1 they run in this process. On an accelerator they share it: memory is taken as needed.

    Raises:
      ConfigError: jobs is not positive.
      FsmdeError: of a run; those that run beside it are ended and go on when the command is given again.
      TrainingError: a process was killed.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: expected at least 1")
    if jobs == 1:
        for run in runs:
            yield _timed(run, root, data)
        return
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # for the processes; else the first takes it all
    number = context.Value("i", 0)
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs, mp_context=context, initializer=_settle, initargs=(root, number, jobs)
    )
    try:
        for future in concurrent.futures.as_completed([pool.submit(_timed, run, root, data) for run in runs]):
            yield future.result()
        pool.shutdown()
    except BrokenProcessPool as error:
        raise TrainingError(
            "a process of --jobs was killed, often because memory ran out; the same command goes on from here: give it"
            " fewer --jobs"
        ) from error
    finally:  # after an error: what runs beside it
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
            process.join()


def _timed(run: Run, root: Path, data: Mapping[str, str]) -> Done:
    started = time.monotonic()
    result = runs_of.execute(run, root, data)
    runs_of.release()
    return run, result, time.monotonic() - started


def _settle(root: Path, number: Any, jobs: int) -> None:
    """Start of a process: its cores, where there are enough for all, and what the command itself has set."""
    with number.get_lock():
        mine, number.value = number.value, number.value + 1
    if hasattr(os, "sched_setaffinity") and (cores := sorted(os.sched_getaffinity(0))[mine % jobs :: jobs]):  # Linux
        os.sched_setaffinity(0, cores)
    logging.set_verbosity(logging.WARNING)
    runs_of.use_cache(root)
