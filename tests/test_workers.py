"""The pool of worker processes: order of work, counting, and nothing left behind when it ends badly."""

import multiprocessing
import os
import time

import cv2
import pytest

from data_prep import workers
from fsmde_jax.errors import DataError


def square(number: int) -> int:
    workers.count()
    return number * number


def threads_of_opencv(_: int) -> int:
    return cv2.getNumThreads()


def die(_: int) -> None:
    os._exit(7)


def fail(number: int) -> None:
    raise DataError(f"job {number}")


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def nothing() -> None:
    pass


def test_jobs_are_taken_lazily_counted_and_all_done():
    counter, taken, calls = workers.new_counter(), [], []

    def jobs():
        for number in range(9):
            taken.append(number)
            yield f"job {number}", number

    with workers.pool(2, counter, "finished things") as pool:
        assert pool.submit(threads_of_opencv, 0).result() == 1
        found = {}
        for key, value in workers.results(pool, square, jobs(), ahead=3, refresh=lambda: calls.append(counter.value)):
            found[key] = value
            assert len(taken) <= len(found) + 3
    assert found == {f"job {number}": number**2 for number in range(9)}
    assert counter.value == 9 and calls[-1] == 9 and calls == sorted(calls)
    assert not multiprocessing.active_children()


def test_no_jobs_need_no_process():
    with workers.pool(1, workers.new_counter(), "things") as pool:
        assert list(workers.results(pool, square, [], ahead=1, refresh=nothing)) == []


def test_a_worker_that_dies_is_an_error_that_says_what_is_kept():
    message = r"a worker process died, .*; run again with fewer --workers \(finished things are kept\)"
    with (
        pytest.raises(DataError, match=message),
        workers.pool(1, workers.new_counter(), "finished things") as pool,
    ):
        list(workers.results(pool, die, [(0, 0)], ahead=1, refresh=nothing))
    assert not multiprocessing.active_children()


def test_errors_of_jobs_come_through_and_end_the_pool():
    with pytest.raises(DataError, match="job 0"), workers.pool(1, workers.new_counter(), "things") as pool:
        list(workers.results(pool, fail, enumerate(range(50)), ahead=2, refresh=nothing))
    assert not multiprocessing.active_children()


def test_an_interrupt_ends_the_processes_at_once():
    def interrupted() -> None:
        raise KeyboardInterrupt

    other = multiprocessing.get_context("spawn").Process(target=sleep, args=(60.0,))
    other.start()  # not of the pool, so it stays
    with pytest.raises(KeyboardInterrupt), workers.pool(1, workers.new_counter(), "things") as pool:
        assert pool.submit(square, 3).result() == 9
        list(workers.results(pool, sleep, [(0, 3600.0)], ahead=1, refresh=interrupted))
    assert multiprocessing.active_children() == [other]
    other.terminate()
    other.join()
