"""benchmarks.heap: its table, and a small run of its three processes."""

import json

import pytest

from benchmarks import heap


def test_ratios_are_medians_over_rounds_of_the_same_round():
    found = {
        "before": {"seconds": [1.0, 2.0, 4.0], "page_faults": [10, 10, 10]},
        "kept": {"seconds": [0.5, 1.5, 1.0], "page_faults": [0, 1, 0]},
    }
    assert heap.table(found).splitlines()[2:] == [
        "| before | 2.000 | 1.00 | 10 |",
        "| kept | 1.000 | 0.50 | 0 |",
    ]


@pytest.mark.slow
def test_a_small_run(tmp_path, capsys, monkeypatch):
    for name in ("MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"):
        monkeypatch.delenv(name, raising=False)
    options = ["--cameras", "2", "--bins", "8", "--steps", "2", "--rounds", "3", "--uncounted", "4"]
    heap.main([*options, "--out", str(tmp_path / "heap.json")])
    made = json.loads((tmp_path / "heap.json").read_text())
    assert "--cameras 2" in made["command"]
    assert list(made["result"]) == list(heap.SIDES)
    own, kept, huge = (made["result"][name]["page_faults"] for name in heap.SIDES)
    assert min(own) > 1000
    assert max(*kept, *huge) < min(own) / 10
    assert "kept, in huge pages" in capsys.readouterr().out
