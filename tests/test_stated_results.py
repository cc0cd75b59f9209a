"""The ablation's figures that README and docs/method.md state are those of docs/results/ablation.json.

Improvements are computed here anew, in NumPy, from the metrics of the single runs.
"""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
# Of series that ablation.json no longer holds; the text beside them names the commit that does.
EARLIER = {(13.7, 0.2), (22.5, 0.1)}
NAMED = {
    "labels alone": "supervised",
    "view-relational distillation (VRKD)": "vrkd",
    "bins alone, without the crossing": "bins_kd",
    "cross-interaction distillation (CKD)": "ckd",
    "both, CKD + VRKD": "ckd_vrkd",
    "both, from relative depth alone": "ckd_vrkd_affine",
    "FitNets": "fitnets",
    "CWD": "cwd",
}
OTHERS = ("response", "fitnets", "at", "sp", "rkd", "cwd", "dist", "cirkd")


@pytest.fixture(scope="module")
def runs():
    """{rig: {row: {seed: {truth: metrics}}}}, runs of sweeps left out."""
    rigs = json.loads((ROOT / "docs" / "results" / "ablation.json").read_text("utf-8"))["rigs"]
    found: dict = {}
    for rig, results in rigs.items():
        for run in results["runs"]:
            if not run["variant"]:
                found.setdefault(rig, {}).setdefault(run["row"], {})[run["seed"]] = run["metrics"]
    return found


def improvement(row, reference, truth):
    """Percent: (mean over common seeds of the mean relative change in the better direction, its standard error)."""
    means = []
    for seed in set(row) & set(reference):
        of = [
            (row[seed][truth][f"metric/{n}"], reference[seed][truth][f"metric/{n}"])
            for n in ("abs_rel", "sq_rel", "rmse", "rmse_log")
        ]
        a1, base = row[seed][truth]["metric/a1"], reference[seed][truth]["metric/a1"]
        means.append(np.mean([1 - value / other for value, other in of] + [a1 / base - 1]))
    return 100 * np.mean(means), 100 * np.std(means, ddof=1) / np.sqrt(len(means))


def stated(text):
    return [(float(a), float(b)) for a, b in re.findall(r"(?<![\d.])(-?\d+\.\d) ± (\d+\.\d)(?!\d)", text)]


def near(one, other):
    return abs(one[0] - other[0]) < 0.0501 and abs(one[1] - other[1]) < 0.0501


def test_the_table_of_the_readme(runs):
    rows = runs["nuscenes"]
    text = (ROOT / "README.md").read_text("utf-8")
    table = re.search(r"\| against LiDAR \|.*?\n\|[-|]+\|\n((?:\|.*\n)+)", text).group(1)
    seen, wrong = [], []
    for line in table.splitlines():
        name, *cells = (cell.strip().strip("*") for cell in line.strip("|").split("|"))
        name = name.removeprefix("the best two of eight other methods: ")
        row = rows[NAMED[name]]
        for truth, cell in zip(("lidar", "dense"), cells[:2], strict=True):
            if NAMED[name] == "supervised":
                assert not cell
            else:
                (found,) = stated(cell)
                true = improvement(row, rows["supervised"], truth)
                if not near(found, true):
                    wrong.append((name, truth, true))
        assert float(cells[2]) == pytest.approx(
            np.mean([m["dense"]["metric/abs_rel"] for m in row.values()]), abs=5.01e-4
        )
        seen.append(name)
    assert not wrong
    assert sorted(seen) == sorted(NAMED)
    for truth in ("lidar", "dense"):
        best = sorted(OTHERS, key=lambda row: -improvement(rows[row], rows["supervised"], truth)[0])
        assert set(best[:2]) == {"fitnets", "cwd"}


def test_improvements_in_the_text(runs):
    page = (ROOT / "docs" / "method.md").read_text("utf-8")
    text = page.split("## What is known, and what not", 1)[1]
    true = [
        improvement(rows[one], rows[other], truth)
        for rows in runs.values()
        for one, other in itertools.permutations(rows, 2)
        for truth in ("lidar", "dense")
    ]
    figures = stated(text)
    assert len(figures) > 30
    assert not [one for one in figures if one not in EARLIER and not any(near(one, other) for other in true)]
