"""Worker processes: how one is set up, and how jobs run in a pool that leaves nothing behind."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import cv2

from fsmde_jax.errors import DataError

done: Any = None  # samples or keyframes finished over all workers, for the progress bar; shared memory


def new_counter() -> Any:
    """A shared number for `done`, 0."""
    return multiprocessing.get_context("spawn").Value("q", 0)


def count() -> None:
    """One more sample or keyframe is finished."""
    if done is not None:
        with done.get_lock():
            done.value += 1


def start_worker(counter: Any, parent: int) -> None:
    """Set-up of a worker process: one thread of OpenCV, and no life after the parent's."""
    global done
    done = counter
    cv2.setNumThreads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def pool(number: int, counter: Any, kept: str) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """A pool of spawned processes for the time of a `with`; none is left afterwards.

    Args:
      number: of processes.
      counter: what `count` adds to in them, see `new_counter`.
      kept: what a next run need not do again, e.g. "finished shards", for the message.

    Raises:
      DataError: a process died. KeyboardInterrupt: as it came, after the processes were ended.
    """
    others = multiprocessing.active_children()
    executor = concurrent.futures.ProcessPoolExecutor(
        number, multiprocessing.get_context("spawn"), start_worker, (counter, os.getpid())
    )
    try:
        yield executor
    except concurrent.futures.process.BrokenProcessPool as error:
        raise DataError(
            f"a worker process died, most likely for lack of memory; run again with fewer --workers ({kept} are kept)"
        ) from error
    except KeyboardInterrupt:  # half-done jobs are done again, so nobody waits for them
        for worker in set(multiprocessing.active_children()) - set(others):
            worker.terminate()
        raise
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def results(
    executor: concurrent.futures.Executor, function: Callable[[Any], Any], jobs: Iterable[tuple[Any, Any]],
    *, ahead: int, refresh: Callable[[], None],
) -> Iterator[tuple[Any, Any]]:  # fmt: skip
    """(key, function(job)) of each (key, job), as they get ready; at most `ahead` are taken from `jobs` before that.

    `refresh` is called at least twice a second.
    """
    coming, waiting = iter(jobs), dict[concurrent.futures.Future, Any]()
    more = True
    while more or waiting:
        while more and len(waiting) < ahead:
            following = next(coming, None)
            more = following is not None
            if following is not None:
                waiting[executor.submit(function, following[1])] = following[0]
        ready, _ = concurrent.futures.wait(waiting, 0.5, concurrent.futures.FIRST_COMPLETED)
        refresh()
        for future in [future for future in waiting if future in ready]:  # of several the first given
            yield waiting.pop(future), future.result()
