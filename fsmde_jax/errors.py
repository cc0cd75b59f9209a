"""Errors that are the user's to mend: each message names the file, record or config key, and what was expected.

The command lines print these without a traceback (`exit_with_message`); anything else is a bug and keeps its
traceback.
"""

import contextlib
import sys
from collections.abc import Iterator


class FsmdeError(Exception):
    """Base class of every error that the user can mend.

    `status` is what the process ends with; `agreed`: of several processes all have this error, at the same point.
    """

    status = 1
    agreed = False


class DataError(FsmdeError):
    """A dataset, record, manifest, image, LiDAR file, calibration or weight file is missing or wrong."""


class ConfigError(FsmdeError):
    """A config key or a command-line flag is unknown, or its value cannot be used."""


class TrainingError(FsmdeError):
    """Training cannot go on, e.g. the loss is not finite or a checkpoint does not fit the config."""


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """Runs a command line's body; an `FsmdeError` is printed as one message and ends the process with its status."""
    try:
        yield
    except FsmdeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
