"""Being told to stop: SIGTERM (a scheduler takes the machine away) and SIGINT (Ctrl-C) become an orderly end.

The step that runs is finished, a checkpoint is written, and the process ends with the status that a shell gives a
process ended by that signal, 143 or 130. Schedulers take it for a failure that is to be tried again, and the same
command then goes on where it stopped. A second signal ends the process at once.
"""

import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

from fsmde_jax.errors import FsmdeError


class Stopped(FsmdeError):
    """A run ended by a signal, after its checkpoint was written; of several processes all end so, at one step."""

    agreed = True

    def __init__(self, message: str, number: int = signal.SIGTERM):
        super().__init__(message)
        self.status = 128 + number


class StopSignal:
    """Watches for signals while a run is in its loop; use as a context manager.

    With several processes JAX's coordination service watches for SIGTERM and chooses a step that all of them reach, so
    that the checkpoint is of one step everywhere, whichever of them got the signal. Ctrl-C is not watched for there.
    """

    def __init__(self) -> None:
        self._got = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not installed from Python

    def _note(self, number: int, _: FrameType | None) -> None:
        self._got = number
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_DFL)
        os.write(2, b"\nstopping after this step, with a checkpoint; a second signal ends at once\n")

    def reached(self, step: int) -> int:
        """The signal that the run is to end for after `step`, 0 = go on. Every process asks once at every step, and
        once before the first, which tells JAX where the run is: it chooses the next step to stop at."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            return int(signal.SIGTERM)
        return self._got

    @property
    def came(self) -> int:
        """A signal to this process alone that came meanwhile, 0 = none."""
        return self._got
