"""The record file format: against TensorFlow's published layout, random access, and every kind of damage."""

import pickle
import struct
import threading

import numpy as np
import pytest

from fsmde_jax.data import tfrecord
from fsmde_jax.errors import DataError

RECORDS = [b"", b"a", b"hello world" * 50, bytes(range(256)) * 40]


def crc32c(data: bytes) -> int:
    """CRC-32C bit by bit (Castagnoli, reflected 0x82F63B78)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@pytest.fixture
def path(tmp_path):
    assert tfrecord.write_records(tmp_path / "a.tfrecord", RECORDS) == len(RECORDS)
    return tmp_path / "a.tfrecord"


def test_layout_is_tensorflows(path):
    assert crc32c(b"123456789") == 0xE3069283  # the published check value
    expected = b""
    for data in RECORDS:
        length = struct.pack("<Q", len(data))
        expected += length + struct.pack("<I", masked(length)) + data + struct.pack("<I", masked(data))
    assert path.read_bytes() == expected
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.tfrecord", "a.tfrecord.index"]


def test_random_access_over_files(path):
    tfrecord.write_records(path.with_name("b"), [b"last"])
    tfrecord.write_records(path.with_name("empty"), [])
    reader = tfrecord.TFRecordReader([path, path.with_name("empty"), path.with_name("b")])
    assert len(reader) == 5 and [reader[i] for i in (4, 0, 3, 1, 2)] == [b"last", *(RECORDS[i] for i in (0, 3, 1, 2))]
    assert reader.where(4).endswith("b, record 0") and reader.where(2).endswith("a.tfrecord, record 2")
    for wrong in (-1, 5):
        with pytest.raises(IndexError):
            reader[wrong]
    reader.close()
    assert pickle.loads(pickle.dumps(reader))[3] == RECORDS[3] == reader[np.int64(3)]


def test_threads_share_a_reader(path):
    reader, wrong = tfrecord.TFRecordReader([path]), []

    def read(seed):
        for i in np.random.default_rng(seed).integers(0, 4, 300):
            if reader[i] != RECORDS[i]:
                wrong.append(i)

    threads = [threading.Thread(target=read, args=(s,)) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_index_is_rebuilt_when_absent(path):
    offsets = tfrecord.load_index(path).tolist()
    tfrecord.index_path(path).unlink()
    assert tfrecord.load_index(path).tolist() == offsets == [0, 16, 33, 599]
    assert tfrecord.index_path(path).is_file() and tfrecord.load_index(path).tolist() == offsets


def test_index_that_cannot_be_kept_is_no_error(path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError("read-only folder")

    tfrecord.index_path(path).unlink()
    monkeypatch.setattr(tfrecord, "write_atomically", refuse)
    assert tfrecord.load_index(path).tolist() == [0, 16, 33, 599] and not tfrecord.index_path(path).exists()
    assert tfrecord.TFRecordReader([path])[2] == RECORDS[2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-1], "index is damaged"),
        (lambda b: b"X" + b[1:], "not an index of this version"),
        (lambda b: b[:-8] + bytes(8), "index is damaged"),
        (lambda b: b"", "not an index"),
    ],
)
def test_damaged_index_is_refused(path, damage, message):
    index = tfrecord.index_path(path)
    index.write_bytes(damage(index.read_bytes()))
    with pytest.raises(DataError, match=rf"a\.tfrecord\.index: .*{message}.*delete a\.tfrecord\.index"):
        tfrecord.load_index(path)


def test_stale_index_is_refused(path):
    index = tfrecord.index_path(path).read_bytes()
    tfrecord.write_records(path, RECORDS[:2])
    tfrecord.index_path(path).write_bytes(index)
    with pytest.raises(DataError, match="stale index: made for"):
        tfrecord.TFRecordReader([path])


def test_same_size_but_other_records_is_found_when_reading(path):
    """A stale index that fits the file size by chance: the checksum of the length finds it."""
    index = tfrecord.index_path(path).read_bytes()
    tfrecord.write_records(path, [RECORDS[1], RECORDS[0], *RECORDS[2:]])
    tfrecord.index_path(path).write_bytes(index)
    with pytest.raises(DataError, match="record 0: damaged or stale length"):
        tfrecord.TFRecordReader([path])[0]


@pytest.mark.parametrize("keep_index", [True, False])
@pytest.mark.parametrize("cut", [1, 5, 10250])
def test_truncated_file_is_refused(path, keep_index, cut):
    path.write_bytes(path.read_bytes()[:-cut])
    if not keep_index:
        tfrecord.index_path(path).unlink()
    with pytest.raises(DataError, match="stale index" if keep_index else r"a\.tfrecord: truncated inside record 3"):
        tfrecord.TFRecordReader([path])


def test_every_flipped_bit_is_found(path):
    """In each byte of a small record, data or framing: reading it, or scanning without index, must fail."""
    tfrecord.write_records(path, [b"front", b"abc", b"back"])
    whole = path.read_bytes()
    start = 12 + 5 + 4
    for position in range(start, start + 12 + 3 + 4):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.tfrecord, record 1"):
            tfrecord.TFRecordReader([path])[1]
    damaged = bytearray(whole)
    damaged[start + 7] ^= 64  # a huge length
    path.write_bytes(damaged)
    tfrecord.index_path(path).unlink()
    with pytest.raises(DataError, match="record 1 has a damaged length"):
        tfrecord.TFRecordReader([path])


def test_failed_writes_leave_nothing(tmp_path):
    def records():
        yield b"one"
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        tfrecord.write_records(tmp_path / "a", records())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="cannot write"):
        tfrecord.write_records(tmp_path / "none" / "a", [b"x"])
    with pytest.raises(DataError, match="no such record file"):
        tfrecord.load_index(tmp_path / "a")


def test_a_new_file_never_meets_an_old_index(tmp_path, monkeypatch):
    """Killed between the two renames: the old records must not be read through the new index."""
    path = tmp_path / "a"
    tfrecord.write_records(path, [b"old", b"older"])
    replace = tfrecord.os.replace

    def killed(source, target):
        if str(target) == str(path):
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(tfrecord.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        tfrecord.write_records(path, [b"new one"])
    monkeypatch.undo()
    with pytest.raises(DataError, match="stale index"):
        tfrecord.TFRecordReader([path])
