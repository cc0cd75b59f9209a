"""Runs one after the other, or several at a time, each in a process of its own with its share of the cores."""

import concurrent.futures
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from absl import logging

from fsmde_jax import heap
from fsmde_jax.errors import TrainingError
from fsmde_jax.experiment import runs as runs_of
from fsmde_jax.experiment.plan import Run

Done = tuple[Run, dict[str, Any], float]  # a run, its result, its seconds


def execute_all(runs: Sequence[Run], root: Path, data: Mapping[str, str], jobs: int = 1) -> Iterator[Done]:
    """Makes the runs with `runs.execute`, and yields each when it is done.

    Args:
      runs: what to run, no folder twice.
      root: folder of all experiments.
      data: fingerprints of the records.
      jobs: at a time. One runs in this process. On an accelerator they share it (see `share_device`).

    Raises:
      FsmdeError: of a run; those that run beside it are ended and go on when the command is given again.
      TrainingError: a process was killed.
    """
    jobs = min(jobs, len(runs))
    if jobs <= 1:
        for run in runs:
            yield _timed(run, root, data)
        return
    context, others = multiprocessing.get_context("spawn"), set(multiprocessing.active_children())
    settings = (root, context.Value("i", 0), jobs, os.getpid())
    pool = concurrent.futures.ProcessPoolExecutor(jobs, context, _settle, settings)
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
            process.kill()  # told to stop, it would begin what is left; a killed run goes on exactly
            process.join()


def share_device() -> None:
    """Lets the processes that this one starts take an accelerator's memory as they need it, instead of most of it each.

    To be called before JAX is used here, which counts as one of them.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def cores_of(number: int, jobs: int, cores: Sequence[int]) -> list[int]:
    """Cores of job `number` of 0 ... jobs - 1: a share of its own, or all where there are fewer cores than jobs."""
    return list(cores[number::jobs] if len(cores) >= jobs else cores)


def _timed(run: Run, root: Path, data: Mapping[str, str]) -> Done:
    started = time.monotonic()
    result = runs_of.execute(run, root, data)
    runs_of.release()
    return run, result, time.monotonic() - started


def _settle(root: Path, started: Any, jobs: int, parent: int) -> None:
    """Start of a process: its cores, what the command itself has set, and no life after the parent's."""
    heap.keep_freed_memory()
    with started.get_lock():
        number, started.value = started.value, started.value + 1
    if hasattr(os, "sched_setaffinity"):  # Linux
        os.sched_setaffinity(0, cores_of(number, jobs, sorted(os.sched_getaffinity(0))))
    logging.set_verbosity(logging.WARNING)
    runs_of.use_cache(root)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
