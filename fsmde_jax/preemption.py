"""Being told to stop: SIGTERM (a scheduler takes the machine away) and SIGINT (Ctrl-C) become an orderly end.

While a run trains, the step that runs is finished, a checkpoint is written, and the process ends with the status that a
shell gives a process ended by that signal, 143 or 130. Schedulers take it for a failure that is to be tried again, and
the same command then goes on where it stopped. A second signal ends the process at once, and so does the first one
where nothing can be lost: before the first step is done, and in an evaluation of its own.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fsmde_jax import sharding
from fsmde_jax.errors import FsmdeError

WATCHED = (signal.SIGTERM, signal.SIGINT)


class Stopped(FsmdeError):
    """A run ended by a signal, after its checkpoint was written; of several processes all end so, at one step."""

    agreed = True

    def __init__(self, message: str, number: int = signal.SIGTERM):
        super().__init__(message)
        self.number = number
        self.status = 128 + number


def end_at_once() -> None:
    """Signals end the process at once from here on, as they do by themselves, but for the first process of a container,
    to which Linux sends no signal that it does not handle."""
    for number in WATCHED:
        signal.signal(number, signal.SIG_DFL if os.getpid() != 1 else lambda number, _: os._exit(128 + number))


class StopSignal:
    """Notes signals from `listen` on; use as a context manager.

    Several processes ask (`reached`) at the same points of a run and get the same answers, whichever of them got the
    signal, so that they end at one step. A question is a maximum over all devices, queued behind the step; the answer
    is that of the question before, which is there by now, so that asking costs no waiting. (JAX has a service for this.
    It goes by the numbers of steps that processes report, and orbax reports older ones in the background: a notice at
    such a moment, or before the first step, chose a step that was over already, and the signal was lost.)
    """

    def __init__(self, mesh: jax.sharding.Mesh):
        self._got = 0
        self._before: dict[int, Any] = {}
        self._mesh, self._asked = mesh, jnp.zeros((), jnp.int32)
        self._largest = jax.jit(jnp.max, out_shardings=sharding.replicated(mesh))

    def __enter__(self) -> "StopSignal":
        return self

    def listen(self) -> None:
        """From here on a signal is noted instead of ending the process."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in WATCHED}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not installed from Python

    def _note(self, number: int, _: FrameType | None) -> None:
        self._got = number
        end_at_once()
        os.write(2, b"\nstopping after this step, with a checkpoint; a second signal ends at once\n")

    def reached(self, *, now: bool = False) -> int:
        """The signal that the run is to end for, 0 = go on; `now` waits for the answer to this very question."""
        if jax.process_count() == 1:
            return self._got
        mine = np.full(len(jax.local_devices()), self._got, np.int32)
        asked = self._largest(jax.make_array_from_process_local_data(sharding.batch_sharding(self._mesh), mine))
        before, self._asked = self._asked, asked
        return int(jax.device_get(asked if now else before))
