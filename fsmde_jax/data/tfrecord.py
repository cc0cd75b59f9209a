"""TFRecord files without TensorFlow: a writer, an offset index and a random-access reader with CRC checks.

Layout of a record (TensorFlow's own): length uint64, masked CRC-32C of the length, data, masked CRC-32C of the data.
The index `<file>.index` is built with the records, rebuilt if absent (and kept, where the folder may be written to),
refused if stale.
"""

import bisect
import contextlib
import dataclasses
import os
import struct
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path

import google_crc32c
import numpy as np

from fsmde_jax.errors import DataError

_HEADER = struct.Struct("<QI")  # length, masked crc of the length
_FOOTER = struct.Struct("<I")  # masked crc of the data
_INDEX_MAGIC = b"FSMDEIX1"
_INDEX_HEAD = struct.Struct("<8sQQI")  # magic, number of records, size of the record file, crc of the offsets


def _masked_crc(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def index_path(path: str | Path) -> Path:
    """Where the offset index of a record file lies."""
    return Path(f"{path}.index")


def write_atomically(path: Path, data: bytes) -> None:
    """Writes to a temporary name in the same folder, flushes to disk, then renames."""
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_records(path: str | Path, records: Iterable[bytes]) -> int:
    """Writes `records` and their index; the file appears under its name only when it is whole.

    Returns:
      The number of records.

    Raises:
      DataError: the disk is full or the folder may not be written to; nothing half-written is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
    offsets: list[int] = []
    position = 0
    try:
        with open(temporary, "wb") as file:
            for data in records:
                length = struct.pack("<Q", len(data))
                file.write(length + struct.pack("<I", _masked_crc(length)))
                file.write(data)
                file.write(_FOOTER.pack(_masked_crc(data)))
                offsets.append(position)
                position += _HEADER.size + len(data) + _FOOTER.size
            file.flush()
            os.fsync(file.fileno())
        write_atomically(index_path(path), _encode_index(np.array(offsets, np.uint64), position))
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot write ({error.strerror}); free space or choose another --out folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return len(offsets)


def _encode_index(offsets: np.ndarray, file_size: int) -> bytes:
    body = offsets.astype("<u8").tobytes()
    return _INDEX_HEAD.pack(_INDEX_MAGIC, len(offsets), file_size, google_crc32c.value(body)) + body


def _scan(path: Path) -> np.ndarray:
    """Offsets of all records, from the record file itself.

    Raises:
      DataError: a length is damaged or the file ends inside a record.
    """
    size = path.stat().st_size
    offsets: list[int] = []
    position = 0
    with open(path, "rb") as file:
        while position < size:
            head = os.pread(file.fileno(), _HEADER.size, position)
            if len(head) < _HEADER.size:
                raise DataError(f"{path}: truncated inside record {len(offsets)}; convert this split again")
            length, crc = _HEADER.unpack(head)
            end = position + _HEADER.size + length + _FOOTER.size
            if crc != _masked_crc(head[:8]):
                raise DataError(
                    f"{path}: record {len(offsets)} has a damaged length (CRC mismatch); convert this split again"
                )
            if end > size:
                raise DataError(f"{path}: truncated inside record {len(offsets)}; convert this split again")
            offsets.append(position)
            position = end
    return np.array(offsets, np.uint64)


def load_index(path: str | Path) -> np.ndarray:
    """Offsets [R] uint64 of a record file: from its index, or by a scan where there is none.

    Raises:
      DataError: the record file is missing or damaged, or its index is damaged or belongs to other records.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such record file")
    where = index_path(path)
    if not where.is_file():
        offsets = _scan(path)
        with contextlib.suppress(OSError):  # a read-only folder: scanned again next time
            write_atomically(where, _encode_index(offsets, path.stat().st_size))
        return offsets
    blob = where.read_bytes()
    size = path.stat().st_size
    advice = f"delete {where.name} (it is rebuilt from the records) or convert this split again"
    if len(blob) < _INDEX_HEAD.size or blob[:8] != _INDEX_MAGIC:
        raise DataError(f"{where}: not an index of this version; {advice}")
    _, count, indexed_size, crc = _INDEX_HEAD.unpack_from(blob)
    body = blob[_INDEX_HEAD.size :]
    if len(body) != 8 * count or google_crc32c.value(body) != crc:
        raise DataError(f"{where}: the index is damaged; {advice}")
    if indexed_size != size:
        raise DataError(
            f"{where}: stale index: made for {indexed_size} bytes of records, but {path.name} has {size}; {advice}"
        )
    return np.frombuffer(body, "<u8")


@dataclasses.dataclass
class _Shard:
    path: Path
    offsets: np.ndarray
    descriptor: int | None = None


class TFRecordReader:
    """Random access to the records of several files, in the order given. Safe to share between threads, and to pickle.

    `reader[i]` returns the bytes of record i after checking both CRCs.
    """

    def __init__(self, paths: Sequence[str | Path]):
        self._shards = [_Shard(Path(p), load_index(p)) for p in paths]
        self._starts = np.cumsum([0, *(len(s.offsets) for s in self._shards)]).tolist()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._starts[-1]

    def where(self, index: int) -> str:
        """Name of record `index` for error messages."""
        shard, local = self._locate(index)
        return f"{self._shards[shard].path}, record {local}"

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def _descriptor(self, shard: _Shard) -> int:
        if shard.descriptor is None:
            with self._lock:
                if shard.descriptor is None:
                    shard.descriptor = os.open(shard.path, os.O_RDONLY)
        return shard.descriptor

    def __getitem__(self, index: int) -> bytes:
        which, local = self._locate(int(index))
        shard = self._shards[which]
        descriptor = self._descriptor(shard)
        offset = int(shard.offsets[local])
        advice = "convert this split again"
        if local + 1 < len(shard.offsets):  # the whole record in one read
            block = os.pread(descriptor, int(shard.offsets[local + 1]) - offset, offset)
        else:
            head = os.pread(descriptor, _HEADER.size, offset)
            length = _HEADER.unpack(head)[0] if len(head) == _HEADER.size else 0
            block = head + os.pread(descriptor, min(length, 1 << 40) + _FOOTER.size, offset + _HEADER.size)
        if len(block) < _HEADER.size + _FOOTER.size:
            raise DataError(f"{self.where(index)}: truncated; {advice}")
        length, length_crc = _HEADER.unpack_from(block)
        if length_crc != _masked_crc(block[:8]) or len(block) != _HEADER.size + length + _FOOTER.size:
            raise DataError(f"{self.where(index)}: damaged or stale length (CRC mismatch); {advice}")
        data = block[_HEADER.size : -_FOOTER.size]
        if _FOOTER.unpack_from(block, _HEADER.size + length)[0] != _masked_crc(data):
            raise DataError(f"{self.where(index)}: damaged data (CRC mismatch); {advice}")
        return data

    def close(self) -> None:
        """Closes the files; they are opened again when needed."""
        with self._lock:
            for shard in self._shards:
                if shard.descriptor is not None:
                    os.close(shard.descriptor)
                    shard.descriptor = None

    def __getstate__(self) -> dict:
        return {"paths": [s.path for s in self._shards]}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["paths"])  # type: ignore[misc]
