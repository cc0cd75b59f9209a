"""The C library's heap while XLA computes on a processor: what a step frees stays for the next one."""

import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re

# Of glibc's malloc.h, by the name of the environment variable that says the same, and what is set.
_PARAMETERS = {
    "MALLOC_ARENA_MAX": (-8, 1),  # one heap for all threads; the others' heaps always give memory back
    "MALLOC_MMAP_MAX_": (-4, 0),  # large buffers lie on it, too
    "MALLOC_TRIM_THRESHOLD_": (-1, -1),  # it never shrinks
    "MALLOC_TOP_PAD_": (-2, 256 * 2**20),  # and grows by so many bytes at a time
}
_OWN = (*_PARAMETERS, "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD")  # of a user who has chosen otherwise
_TUNABLES = re.compile(r"glibc\.malloc\.(arena_max|mmap_max|mmap_threshold|trim_threshold|top_pad)\b")  # likewise


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that it frees, instead of giving it back to the system and asking anew.

    XLA asks the C library for the buffers of every step on a processor. glibc gives large ones back at once, so that
    each step touches fresh pages, which the system has to clear first (docs/scaling.md has what that costs). The
    process then stays as large as it once was.

    To be called at the start of a program, before anything makes threads: heaps that are there already stay. Nothing
    is done without glibc, where the user has settings of malloc in the environment or another allocator (LD_PRELOAD),
    and where JAX has an accelerator to compute on.

    Returns:
      Whether it was done.
    """
    if platform.libc_ver()[0] != "glibc" or _chosen_by_user() or _accelerated():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, value) == 1 for parameter, value in _PARAMETERS.values()])


def _chosen_by_user() -> bool:
    return any(os.environ.get(name) for name in _OWN) or bool(_TUNABLES.search(os.environ.get("GLIBC_TUNABLES", "")))


def _accelerated() -> bool:
    """Whether JAX may take a GPU or TPU. Asking JAX itself would start it, and its threads."""
    if platforms := os.environ.get("JAX_PLATFORMS", ""):
        return platforms != "cpu"
    return bool(importlib.metadata.entry_points(group="jax_plugins")) or importlib.util.find_spec("libtpu") is not None
