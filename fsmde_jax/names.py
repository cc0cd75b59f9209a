"""What users write: keys of a config in dotted form, names (and what is said where one is not known), and sizes."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from fsmde_jax.errors import ConfigError

_MANY = 40  # more known names than this are not listed


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> dotted keys; lists become tuples, so that what JSON gives back compares equal."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = tuple(value) if isinstance(value, list) else value
    return flat


def nearest(name: object, known: Iterable[str], *, cutoff: float = 0.4) -> str:
    """The known name that is most like `name`; "" if none is as like as `cutoff` (0 = any, 1 = equal)."""
    return next(iter(difflib.get_close_matches(str(name), list(known), n=1, cutoff=cutoff)), "")


def check_name(what: str, name: object, known: Iterable[str]) -> None:
    """Raises `ConfigError` unless `name` is one of `known`.

    Args:
      what: the config key, flag or place where it was written.
      name: what was written.
      known: what may be written; the nearest is suggested, and a few are all listed.
    """
    known = list(known)
    if name in known:
        return
    near = nearest(name, known)
    hint = f"; did you mean {near!r}?" if near else "."
    listing = f" There are: {', '.join(known)}" if len(known) <= _MANY else ""
    raise ConfigError(f"{what}: unknown name {name!r}{hint}{listing}")


def parse_size(text: str, flag: str = "--image_size", multiple: int = 1) -> tuple[int, int]:
    """Height and width in pixels of HEIGHTxWIDTH, both multiples of `multiple` (`ConfigError`, which names `flag`)."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found or any(int(side) % multiple for side in found.groups()):
        multiples = f", multiples of {multiple}" if multiple > 1 else ""
        raise ConfigError(f"{flag} {text}: expected HEIGHTxWIDTH{multiples}, e.g. 352x640")
    return int(found[1]), int(found[2])
