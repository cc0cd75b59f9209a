"""Prefetching in a thread that can be closed at any time, more than once, and that ends with the process."""

import atexit
import weakref
from typing import Any

import grain

_OPEN: weakref.WeakSet[Any] = weakref.WeakSet()


@atexit.register
def _close_iterators() -> None:
    """Stops prefetching threads before the interpreter takes modules away; they would print a traceback otherwise."""
    for iterator in list(_OPEN):
        iterator.close()


class _PrefetchIterator(grain.experimental.ThreadPrefetchDatasetIterator):
    """grain's, but closing it twice is harmless (it closes itself again when it is collected)."""

    def __init__(self, parent: grain.DatasetIterator, prefetch: int):
        super().__init__(parent, prefetch)
        self._finished = False
        _OPEN.add(self)

    def close(self) -> None:
        if not self._finished:
            self._finished = True
            super().close()


class PrefetchDataset(grain.IterDataset):
    """The parent's elements, `prefetch` of them ready ahead of time; saves and resumes as the parent does."""

    def __init__(self, parent: grain.IterDataset, prefetch: int):
        super().__init__(parent)
        self._prefetch = prefetch

    def __iter__(self) -> _PrefetchIterator:
        return _PrefetchIterator(iter(self._parent), self._prefetch)
