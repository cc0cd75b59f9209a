"""Freed memory stays with the process: page faults of a compiled program in fresh processes; where it is left alone."""

import os
import platform
import subprocess
import sys

import pytest

from fsmde_jax import heap

STEPS, PAGES = 20, 4_000  # buffers of 16 MB are some 4,000 pages of 4 KiB

# Page faults of a call of a program with large temporary buffers, after calls that have grown the heap.
SCRIPT = f"""
import resource, statistics
from fsmde_jax import heap
print(heap.keep_freed_memory())
import jax
import jax.numpy as jnp

def step(x):
    for _ in range(3):
        x = jnp.cumsum(x, axis=0)[::-1]
    return x.sum()

step, x = jax.jit(step), jax.random.normal(jax.random.key(0), (100, 40_000))
for _ in range(20):
    step(x).block_until_ready()
faults = []
for _ in range({STEPS}):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(statistics.median(faults)))
"""


def run(**environment: str) -> tuple[str, int]:
    """(what keep_freed_memory returned, page faults of the median call: the heap may still grow in some)."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**own, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    kept, faults = done.stdout.split()
    return kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc only")
def test_a_step_touches_no_fresh_pages() -> None:
    kept, faults = run(GLIBC_TUNABLES="glibc.malloc.hugetlb=0")  # says nothing of what is set here
    assert kept == "True"
    untouched, faults_before = run(MALLOC_TOP_PAD_="131072")  # glibc's default, said by the user
    assert untouched == "False"
    assert faults_before > PAGES / 2, "the test's program no longer asks the system for memory at each step"
    assert faults < faults_before / 20


@pytest.mark.parametrize(
    "environment",
    [
        {"JAX_PLATFORMS": "cuda"},
        {"JAX_PLATFORMS": "tpu,cpu"},
        {"MALLOC_ARENA_MAX": "4"},
        {"LD_PRELOAD": "libtcmalloc.so"},
        {"GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.arena_max=4"},
    ],
)
def test_left_alone(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: None) -> None:
        raise AssertionError("malloc's settings were touched")

    monkeypatch.setattr(heap.ctypes, "CDLL", refuse)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert not heap.keep_freed_memory()


def test_left_alone_where_an_accelerator_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(heap.importlib.metadata, "entry_points", lambda group: [group])
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: pytest.fail("malloc's settings were touched"))
    assert not heap.keep_freed_memory()


@pytest.mark.parametrize("module", ["main", "predict", "teacher_cache", "experiment"])
def test_programs_begin_with_it(module: str) -> None:
    """In a process of its own, since running a module twice would define its flags twice."""
    script = f"""
import runpy, sys
from fsmde_jax import heap
heap.keep_freed_memory = lambda: print("kept", flush=True)
sys.argv = ["x", "--help"]
runpy.run_module("fsmde_jax.{module}", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("kept\n"), done.stderr
