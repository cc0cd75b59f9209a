"""benchmarks.kernels: reading a trace, and what it says where there is no GPU."""

import sys

import pytest

from benchmarks import kernels


def event(name, pid, tid, dur):
    return {"ph": "X", "name": name, "pid": pid, "tid": tid, "ts": 0.0, "dur": dur}


def named(kind, name, **place):
    return {"ph": "M", "name": kind, "args": {"name": name}, **place}


TRACE = [
    named("process_name", "/device:GPU:0", pid=1),
    named("process_name", "/host:CPU", pid=2),
    named("thread_name", "Stream #13(Compute)", pid=1, tid=7),
    named("thread_name", "XLA Modules", pid=1, tid=8),
    named("thread_name", "Stream of consciousness", pid=2, tid=7),
    event("fusion", 1, 7, 2.0),
    event("gemm", 1, 7, 5.0),
    event("fusion", 1, 7, 4.0),
    event("jit_run", 1, 8, 100.0),  # the module, which holds the kernels
    event("wait", 2, 7, 50.0),
    {"ph": "C", "name": "memory", "pid": 1, "tid": 7, "args": {}},
]


def test_kernels_of_the_gpus_streams_are_added_up():
    found = kernels.kernels_of(TRACE)
    assert [(name, each.microseconds, each.runs) for name, each in found.items()] == [
        ("fusion", 6.0, 2),
        ("gemm", 5.0, 1),
    ]


def test_a_row_in_markdown():
    row = {
        "side": "small, bfloat16", "device": "a GPU", "seconds": 0.003, "kernel_seconds": 0.002, "tflops": 100.0,
        "share_of_16_bit_peak": 0.25,
        "kernels": [{"name": "gemm", "microseconds": 1500.0, "runs": 12.0},
                    {"name": "fusion", "microseconds": 500.0, "runs": 3.0}],
    }  # fmt: skip
    text = kernels.show(row, top=1)
    assert "3.000 ms per rig back to back, of which kernels 2.000 ms; 100 TFLOP/s, 25 % of the 16-bit peak" in text
    assert "| gemm | 1500.0 | 12 | 75.0 % |" in text and "fusion" not in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "needs a GPU, but JAX runs on cpu"),
        (["--repeats", "0"], "--repeats 0: expected at least 1"),
        (["--teachers"], "--students, --teachers: name at least one network"),
        (["--attention", "cudnn", "--dtype", "float32"], "--attention cudnn: 16-bit dtypes only"),
    ],
)
def test_flags_that_cannot_work(flags, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["kernels", *flags])
    with pytest.raises(SystemExit):
        kernels.main()
    assert capsys.readouterr().err.startswith(f"error: {message}")
