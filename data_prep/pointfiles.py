"""Readers of point cloud files: nuScenes .bin, DGP .npz, .npy, .ply and .pcd. All return [P, 3] float64 metres."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.images import read_bytes
from fsmde_jax.errors import DataError

_PLY_TYPES = {
    "char": "i1", "uchar": "u1", "short": "i2", "ushort": "u2",
    "int": "i4", "uint": "u4", "float": "f4", "double": "f8",
    "int8": "i1", "uint8": "u1", "int16": "i2", "uint16": "u2", "int32": "i4", "uint32": "u4",
    "float32": "f4", "float64": "f8",
}  # fmt: skip
SUFFIXES = (".bin", ".npz", ".npy", ".ply", ".pcd")


def read_points(path: str | Path, bin_columns: int = 5) -> np.ndarray:
    """Points [P, 3] float64 in the sensor's frame, in file order.

    Args:
      path: .bin (raw float32 rows), .npz (array `data`, or the only one), .npy, .ply or .pcd (ASCII or binary).
      bin_columns: float32 numbers per point of a .bin file; x, y, z come first (nuScenes: 5).

    Raises:
      DataError: missing, of an unknown or compressed kind, of the wrong length, or with numbers that are not finite.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{path}: unknown point cloud format {suffix!r}; expected one of {', '.join(SUFFIXES)}")
    data = read_bytes(path, "point cloud")
    if not data:
        raise DataError(f"{path}: the file is empty (0 bytes); get this file again")
    try:
        if suffix == ".bin":
            points = _bin(data, path, bin_columns)
        elif suffix in (".npy", ".npz"):
            points = _numpy(data, path)
        else:
            points = _ply(data, path) if suffix == ".ply" else _pcd(data, path)
    except DataError:
        raise
    except Exception as error:  # zip, header and number parsing raise many kinds, all meaning the same here
        raise DataError(f"{path}: truncated or damaged point cloud ({error}); get this file again") from error
    if points.ndim != 2 or points.shape[1] < 3:
        raise DataError(f"{path}: expected points [P, 3 or more], got shape {points.shape}")
    points = np.asarray(points[:, :3], np.float64)
    bad = ~np.all(np.isfinite(points), axis=1)
    if bad.any():
        raise DataError(
            f"{path}: {int(bad.sum())} of {len(points)} points are NaN or infinite (first: point"
            f" {int(bad.argmax())}); remove them"
        )
    return points


def _bin(data: bytes, path: Path, columns: int) -> np.ndarray:
    if len(data) % (4 * columns):
        raise DataError(
            f"{path}: {len(data)} bytes is not a whole number of points of {columns} float32 ({4 * columns} bytes"
            " each);"
            " the file is truncated or has another layout"
        )
    return np.frombuffer(data, "<f4").reshape(-1, columns)


def _numpy(data: bytes, path: Path) -> np.ndarray:
    loaded = np.load(io.BytesIO(data), allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    name = "data" if "data" in loaded.files else loaded.files[0] if len(loaded.files) == 1 else None
    if name is None:
        raise DataError(f"{path}: holds arrays {loaded.files}; expected one named 'data'")
    return loaded[name]


def _xyz(table: np.ndarray, path: Path) -> np.ndarray:
    names = table.dtype.names or ()
    missing = [c for c in "xyz" if c not in names]
    if missing:
        raise DataError(f"{path}: no field {missing} among {list(names)}; expected x, y and z")
    return np.stack([table[c].astype(np.float64) for c in "xyz"], 1)


def _table(body: bytes, dtype: np.dtype, count: int, ascii_text: bool, path: Path) -> np.ndarray:
    """`count` rows of a structured type from a binary or text body."""
    if not ascii_text:
        if len(body) < count * dtype.itemsize:
            raise DataError(
                f"{path}: truncated: {count} points need {count * dtype.itemsize} bytes, {len(body)} are there"
            )
        return np.frombuffer(body, dtype, count)
    rows = (
        np.loadtxt(io.StringIO(body.decode()), ndmin=2, max_rows=count)
        if count
        else np.zeros((0, len(dtype.names or ())))
    )
    width = len(dtype.names or ())
    if rows.shape != (count, width):
        raise DataError(f"{path}: expected {count} lines of {width} numbers, found {rows.shape[0]} of {rows.shape[1]}")
    table = np.zeros(count, dtype)
    for i, name in enumerate(dtype.names or ()):
        table[name] = rows[:, i]
    return table


def _split_header(data: bytes, last: bytes, path: Path) -> tuple[list[list[str]], bytes]:
    """Header lines (words) up to and including the one that starts with `last`, and the body after it."""
    start = 0 if data.startswith(last) else data.find(b"\n" + last) + 1
    end = data.find(b"\n", start)
    if (not data.startswith(last) and start == 0) or end < 0:
        raise DataError(f"{path}: no {last.decode()!r} line; not a point cloud of this kind, or truncated")
    return [line.split() for line in data[:end].decode("ascii").splitlines() if line.strip()], data[end + 1 :]


def _ply(data: bytes, path: Path) -> np.ndarray:
    lines, body = _split_header(data, b"end_header", path)
    form = next(words[1] for words in lines if words[0] == "format")
    order = {"ascii": "<", "binary_little_endian": "<", "binary_big_endian": ">"}[form]
    count, fields, element = 0, [], ""
    for words in lines:
        if words[0] == "element":
            if not element and words[1] != "vertex":
                raise DataError(f"{path}: its first element is {words[1]!r}; expected 'vertex'")
            element = words[1]
            count = int(words[2]) if element == "vertex" else count
        elif words[0] == "property" and element == "vertex":
            fields.append((words[2], order + _PLY_TYPES[words[1]]))
    return _xyz(_table(body, np.dtype(fields), count, form == "ascii", path), path)


def _pcd(data: bytes, path: Path) -> np.ndarray:
    lines, body = _split_header(data, b"DATA", path)
    head: dict[str, Sequence[str]] = {words[0]: words[1:] for words in lines if not words[0].startswith("#")}
    form = head["DATA"][0]
    if form not in ("ascii", "binary"):
        raise DataError(
            f"{path}: PCD data is {form!r}; expected ascii or binary (pcl_convert_pcd_ascii_binary converts it)"
        )
    if any(c != "1" for c in head.get("COUNT", ())):
        raise DataError(f"{path}: fields with COUNT other than 1 are not read; keep x, y and z only")
    kinds = {"F": "f", "I": "i", "U": "u"}
    types = [f"<{kinds[t]}{s}" for t, s in zip(head["TYPE"], head["SIZE"], strict=True)]
    dtype = np.dtype(list(zip(head["FIELDS"], types, strict=True)))
    return _xyz(_table(body, dtype, int(head["POINTS"][0]), form == "ascii", path), path)
