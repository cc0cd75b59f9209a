"""One training at a time in a run's folder: two of them would write into each other's checkpoints and log."""

import contextlib
import datetime
import fcntl
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from fsmde_jax.errors import ConfigError, TrainingError

NAME = ".lock"


@contextlib.contextmanager
def held(workdir: Path, *, active: bool = True) -> Iterator[bool]:
    """Makes a run's folder and holds its lock; yields whether it is held.

    The kernel gives the lock back when the process ends, however it ends. It is not held where the file system has no
    locks, which a note says. Of several processes of one run one is `active`; the others take nothing.

    Raises:
      ConfigError: another process holds it; names it.
      TrainingError: the folder cannot be written.
    """
    if not active:
        yield False
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(workdir / NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise TrainingError(f"{workdir}: cannot write here ({error}); choose another --workdir") from error
    try:
        yield _take(workdir, descriptor)
    finally:
        os.close(descriptor)


def _take(workdir: Path, descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        who = os.pread(descriptor, 1000, 0).decode(errors="replace").strip() or "another process"
        raise ConfigError(f"{workdir}: {who} trains here; wait for it, end it, or choose another --workdir") from error
    except OSError as error:
        print(f"note: {workdir}: no locks on this file system ({error.strerror}): see to it that one run writes here")
        return False
    since = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with contextlib.suppress(OSError):  # a full disk: the lock is held all the same
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}, begun {since},\n".encode(), 0)
    return True
