"""What goes wrong with checkpoints, as errors that a user can act on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import absl.logging
import jax

from fsmde_jax.errors import FsmdeError, TrainingError

RESUMES = (
    "cannot write a checkpoint ({}); earlier ones are as they were. Free space, or give the folder write permission,"
    " and run the same command again: it resumes."
)
ANEW = (  # a folder that is no run's: nothing is there to go on from
    "cannot write ({}). Free space, give the folder above it write permission, or choose another place, and run the"
    " same command again."
)


@contextlib.contextmanager
def writing(what: Path, message: str = RESUMES) -> Iterator[None]:
    """Turns the many kinds of errors of a failed write (tensorstore raises ValueError) into one message."""
    try:
        yield
    except jax.errors.JaxRuntimeError:  # of a device, or another process is lost
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise TrainingError(f"{what}: {message.format(reason)}") from error


class DamagedError(TrainingError):
    """A checkpoint is there and cannot be read."""


@contextlib.contextmanager
def reading(what: Path) -> Iterator[None]:
    """Turns the errors of a damaged checkpoint into one message; our own errors pass.

    Raises:
      DamagedError: it cannot be read.
    """
    try:
        yield
    except (FsmdeError, jax.errors.JaxRuntimeError, PermissionError, MemoryError):  # no damage
        raise
    except Exception as error:  # orbax raises bare ones
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        advice = "delete this folder, then the one before it is used"
        if what.parent.name == "best":  # only one is kept
            advice = "delete this folder and take the newest: --config.eval.checkpoint=latest"
        raise DamagedError(f"{what}: damaged checkpoint ({reason}); {advice}") from error


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Orbax warns when one item of a step is read by itself, although that is what is wanted."""
    level = absl.logging.get_verbosity()
    absl.logging.set_verbosity(absl.logging.ERROR)
    try:
        yield
    finally:
        absl.logging.set_verbosity(level)
