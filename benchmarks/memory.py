"""Memory of a process, and of calls that are made in a process of their own (Linux)."""

import concurrent.futures
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any


def raised_peak(call: Callable[[], Any]) -> float:
    """MB by which a call raises this process's peak of resident memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident()
    call()
    return resident("VmHWM") - before


def resident(key: str = "VmRSS") -> float:
    """MB of this process's resident memory (Linux)."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a fresh process."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()
