"""Several processes, usually one per host, as one run: JAX's own distributed runtime, and sums over processes.

Every process runs the same program on the same config, reads its own share of the records and holds its own part of
the mesh. They need one file system for the run's folder. docs/scaling.md has recipes.
"""

import contextlib
import functools
import json
import os
import re
import sys
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from fsmde_jax.errors import ConfigError, FsmdeError

CONNECT_TIMEOUT, PEER_TIMEOUT = 300, 60  # seconds
_LOST = re.compile("peer|gloo|connection|coordination|unavailable|deadline|heartbeat", re.IGNORECASE)


def start(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Joins the other processes; to be called before anything else of JAX.

    Args:
      coordinator: host:port of process 0; "" = found out from Cloud TPU, SLURM, Open MPI or Kubernetes by JAX.
      processes, process: their number and which of them this one is; 0 and -1 = likewise.

    Raises:
      ConfigError: they cannot be found out. (Where the others do not answer in time JAX itself ends the process.)
    """
    jax.config.update("jax_enable_preemption_service", False)  # would take SIGTERM for good; see `preemption`
    try:
        jax.distributed.initialize(
            coordinator or None, processes or None, None if process < 0 else process,
            initialization_timeout=CONNECT_TIMEOUT, heartbeat_timeout_seconds=PEER_TIMEOUT,
            shutdown_timeout_seconds=PEER_TIMEOUT,
        )  # fmt: skip
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise ConfigError(
            f"--distributed: the processes do not find each other ({reason}). Outside Cloud TPU, SLURM, Open MPI and"
            " Kubernetes give every process --coordinator=<host of process 0>:<free port>, --num_processes and"
            " --process_id."
        ) from error


@contextlib.contextmanager
def ending_with_peers() -> Iterator[None]:
    """Ends this one of several processes at once, with a message, after an error of its own or where another has gone:
    the others then notice that it is gone instead of waiting for it. An error that all have passes: they end together.
    """
    try:
        yield
    except Exception as error:
        if jax.process_count() == 1 or (isinstance(error, FsmdeError) and error.agreed):
            raise
        who = f"process {jax.process_index()} of {jax.process_count()}"
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        if isinstance(error, FsmdeError):
            print(f"error: {who}: {error}", file=sys.stderr)
        elif isinstance(error, (jax.errors.JaxRuntimeError, ConnectionError)) and _LOST.search(reason):
            print(
                f"error: {who} lost the others ({reason}).\nLook at what they printed; start all again with the same"
                " command: it goes on from the newest checkpoint.", file=sys.stderr,
            )  # fmt: skip
        else:
            traceback.print_exc()
            print(f"error: {who} ends", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(getattr(error, "status", 1))  # an orderly end would wait for the others, which wait for this one


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def say(text: str, *, warning: bool = False) -> None:
    """Prints once for all processes; a warning to stderr."""
    if is_main():
        print(text, file=sys.stderr if warning else sys.stdout)


def from_main(flag: bool) -> bool:
    """What process 0 says, in all processes."""
    return bool(total({"flag": int(flag and is_main())})["flag"])


def total(tree: dict[str, Any]) -> dict[str, Any]:
    """Sum over all processes of nested dicts of numbers and lists of numbers; keys may differ."""
    if jax.process_count() == 1:
        return tree
    mine = np.frombuffer(json.dumps(tree).encode(), np.uint8)
    lengths = np.ravel(multihost_utils.process_allgather(np.array([len(mine)])))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(mine)] = mine
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(lengths), -1)
    return functools.reduce(added, (json.loads(bytes(row[:n])) for row, n in zip(rows, lengths, strict=True)))


def added(a: Any, b: Any) -> Any:
    """a + b of nested dicts of numbers and lists of numbers."""
    if isinstance(a, dict):
        return {key: added(a[key], b[key]) if key in a and key in b else a.get(key, b.get(key)) for key in {**a, **b}}
    if isinstance(a, list):
        return [added(x, y) for x, y in zip(a, b, strict=True)]
    return a + b
