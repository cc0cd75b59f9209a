"""From the results of an experiment's runs to its report: one JSON, a Markdown page, plots. Trains nothing.

`collect` reads every `result.json` of the test phase below the root, checks that they may be compared, and works out
the statistics; `tables` makes the page of it, `viz.experiment_plots` the pictures.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fsmde_jax.data.tfrecord import write_atomically
from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.experiment import statistics, tables
from fsmde_jax.experiment.plan import TEST, changed, numbers, variant_of
from fsmde_jax.experiment.suite import Suite, defaults, flatten
from fsmde_jax.viz import experiment_plots

SHOWN = (
    *(f"metric/{name}" for name in ("abs_rel", "sq_rel", "rmse", "rmse_log", "a1", "a2", "a3")),
    "median/abs_rel",
    "consistency/overall",
)
MAIN = "metric/abs_rel"  # what sweeps and curves show
_LISTED = ("row", "variant", "seed", "commit", "commit_of_evaluation", "date", "training", "step", "teacher")
_NEEDED = (*_LISTED, "phase", "rig", "config", "data", "hardware", "versions", "titles", "samples", "metrics")

Results = dict[str, dict[int, dict[str, Any]]]  # group -> seed -> content of result.json


def report(suite: Suite, root: Path, rigs: Sequence[str], out: str | Path) -> list[Path]:
    """Writes <suite>.json, <suite>.md and <suite>_<rig>_*.png into `out`; returns the files.

    Raises:
      ConfigError: there is no result, or results that cannot be compared.
      DataError: a damaged result, or a folder that cannot be written to.
    """
    out = Path(out)
    content: dict[str, Any] = {"suite": suite.name, "title": suite.title, "reference": suite.reference, "rigs": {}}
    for rig in rigs:
        results = read_results(root / suite.name / rig)
        if results:
            content["rigs"][rig] = collect(suite, rig, root, results)
    if not content["rigs"]:
        raise ConfigError(
            f"{root / suite.name}: no results of the test phase for {', '.join(rigs)}; run\n"
            f"  python -m fsmde_jax.experiment --suite {suite.name} --rig {rigs[0]} --root {root}"
        )
    blobs: dict[str, bytes] = {}
    for rig, found in content["rigs"].items():
        pictures = plots(found, suite.reference)
        found["pictures"] = [f"{suite.name}_{rig}_{name}.png" for name in pictures]
        blobs |= dict(zip(found["pictures"], pictures.values(), strict=True))
    blobs |= {
        f"{suite.name}.json": (json.dumps(content, indent=1) + "\n").encode(),
        f"{suite.name}.md": tables.page(content).encode(),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, blob in blobs.items():
            write_atomically(out / name, blob)
    except OSError as error:
        raise DataError(f"{out}: cannot write the report ({error.strerror}); choose another folder") from error
    return [out / name for name in blobs]


def read_results(folder: Path) -> Results:
    """The test phase's results below a rig's folder, by group and seed.

    Raises:
      DataError: one is damaged.
    """
    results: Results = {}
    for path in sorted(folder.glob("*/seed*/result.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if missing := [key for key in _NEEDED if key not in result]:
                raise ValueError(f"without {', '.join(missing)}")
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}: damaged result ({error}); delete it and run again") from error
        if result["phase"] == TEST:
            results.setdefault(path.parent.parent.name, {})[int(result["seed"])] = result
    return results


def check_comparable(suite: Suite, rig: str, results: Results) -> None:
    """Raises `ConfigError` if results were measured on different records, or one group's were made differently."""
    first = next(iter(next(iter(results.values())).values()))
    for group, by_seed in results.items():
        own = next(iter(by_seed.values()))
        for seed, result in by_seed.items():
            where = f"{suite.name}/{rig}/{group}/seed{seed}"
            if result["data"] != first["data"] or set(result["metrics"]) != set(first["metrics"]):
                raise ConfigError(
                    f"{where}: was trained or measured on other records than {suite.name}/{rig}/{first['row']}"
                    f"/seed{first['seed']}: one table cannot hold both; delete the results of one kind, or use another"
                    " --root for them"
                )
            configs = [{**flatten(each["config"]), "seed": 0} for each in (own, result)]
            if lines := changed(configs[0], configs[1], defaults()):
                raise ConfigError(
                    f"{where}: was run with another config than seed {own['seed']} of the same row:\n  "
                    + "\n  ".join(lines)
                )


def collect(suite: Suite, rig: str, root: Path, results: Results) -> dict[str, Any]:
    """Everything that the report of one rig shows, JSON-ready."""
    check_comparable(suite, rig, results)
    everything = [result for by_seed in results.values() for result in by_seed.values()]
    truths = list(everything[0]["metrics"])
    base = results.get(suite.reference, {})
    common = flatten((next(iter(base.values())) if base else everything[0])["config"])
    curves = {seed: _curve(root / suite.name / rig / suite.reference / f"seed{seed}") for seed in sorted(base)}
    late = [statistics.late_change(*curve) for curve in curves.values() if curve[0]]
    setup = suite.rigs[rig]
    return {
        "truths": truths,
        "records": {role: getattr(setup, role).records for role in ("train", "val", "test")},
        "made_by": {role: list(getattr(setup, role).commands) for role in ("train", "val", "test")},
        "data": everything[0]["data"],
        "titles": everything[0]["titles"],
        "commits": _unique(r[key] for r in everything for key in ("commit", "commit_of_evaluation")),
        "hardware": _unique(r["hardware"] for r in everything),
        "versions": _unique({k: r["versions"].get(k) for k in ("python", "jax", "flax")} for r in everything),
        "teachers": _unique(r["teacher"] for r in everything if r["teacher"]),
        "dates": [min(r["date"] for r in everything), max(r["date"] for r in everything)],
        "rows": {truth: summaries(results, suite.rows, suite.reference, truth) for truth in truths},
        "missing": [name for name in suite.rows if name not in results],
        "seconds": {name: _seconds(results[name]) for name in suite.rows if name in results},
        "sweeps": {name: found for name in suite.sweeps if (found := _sweep(suite, rig, name, results, truths))},
        "curves": {f"seed {seed}": curve for seed, curve in curves.items() if curve[0]},
        "late_change": dataclasses.asdict(statistics.spread(known)) if (known := _known(late)) else None,
        "tuned": _tuned(root / suite.name / rig / "tuned.json"),
        "config": {key: value for key, value in common.items() if key != "seed"},
        "runs": [_listed(result, common) for result in everything],
    }


def summaries(results: Results, groups: Iterable[str], reference: str, truth: str) -> dict[str, Any]:
    """Per group that has results: seeds; per metric mean and std; differences to `reference`; average improvement."""
    return {group: _summary(results[group], results.get(reference, {}), truth) for group in groups if group in results}


def _summary(own: Mapping[int, Any], base: Mapping[int, Any], truth: str) -> dict[str, Any]:
    found: dict[str, Any] = {"seeds": sorted(own), "metrics": {}, "difference": {}, "improvement": None}
    for name in SHOWN:
        values, others = (
            {seed: r["metrics"][truth][name] for seed, r in rows.items() if name in r["metrics"][truth]}
            for rows in (own, base)
        )
        if values:
            found["metrics"][name] = dataclasses.asdict(statistics.spread([values[s] for s in sorted(values)]))
            difference = statistics.paired_difference(values, others)
            found["difference"][name] = dataclasses.asdict(difference) if difference else None
    if own is not base:
        improvement = statistics.improvement_over_seeds(_metric(own, truth), _metric(base, truth))
        found["improvement"] = dataclasses.asdict(improvement) if improvement else None
    return found


def _metric(rows: Mapping[int, Any], truth: str) -> dict[int, dict[str, float]]:
    """{seed: {abs_rel, ...}} of the unscaled prediction."""
    return {s: {n: r["metrics"][truth][f"metric/{n}"] for n in statistics.AVERAGED} for s, r in rows.items()}


def _sweep(suite: Suite, rig: str, name: str, results: Results, truths: Sequence[str]) -> dict[str, Any] | None:
    """One sweep: {truth: {row: {label: summary}}}; None if none of its own runs is there."""
    sweep, own, rows = suite.sweeps[name], False, {truth: {} for truth in truths}  # type: ignore[var-annotated]
    for row in sweep.rows:
        for label in sweep.values:
            variant = variant_of(suite, rig, row, name, label)
            group = f"{row}-{variant}" if variant else row
            same = f"{suite.reference}-{variant}" if variant else suite.reference
            base = results.get(same if suite.reference in sweep.rows else suite.reference, {})
            own = own or bool(variant and group in results)
            for truth in truths if group in results else ():
                rows[truth].setdefault(row, {})[label] = _summary(results[group], base, truth)
    labels = list(sweep.values)
    return {"title": sweep.title, "labels": labels, "numbers": numbers(labels), "rows": rows} if own else None


def plots(found: Mapping[str, Any], reference: str) -> dict[str, bytes]:
    """{name: PNG} of one rig's content."""
    made: dict[str, bytes] = {}
    bars = {
        truth: [
            (name, 100 * i["mean"], None if i["standard_error"] is None else 100 * i["standard_error"], i["counts"])
            for name, row in rows.items()
            if name != reference and (i := row["improvement"])
        ]
        for truth, rows in found["rows"].items()
    }
    if any(bars.values()):
        made["improvement"] = experiment_plots.improvement_bars(bars, reference)
    for name, sweep in found["sweeps"].items():
        panels = {
            truth: {row: [_point(values.get(label)) for label in sweep["labels"]] for row, values in rows.items()}
            for truth, rows in sweep["rows"].items()
        }
        made[name] = experiment_plots.sweep_lines(sweep["title"], sweep["labels"], sweep["numbers"], panels, "abs_rel")
    if found["curves"]:
        made["curves"] = experiment_plots.validation_curves(found["curves"], "abs_rel on val", f"{reference}: training")
    return made


def _point(summary: Mapping[str, Any] | None) -> tuple[float, float | None] | None:
    return (summary["metrics"][MAIN]["mean"], summary["metrics"][MAIN]["std"]) if summary else None


def _curve(folder: Path) -> tuple[list[int], list[float]]:
    """(steps, values) of the evaluations during a training."""
    path, key = folder / "metrics.jsonl", f"eval/{MAIN}"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    points = [(line["step"], line[key]) for line in map(json.loads, lines) if key in line]
    return [step for step, _ in points], [value for _, value in points]


def _seconds(by_seed: Mapping[int, Any]) -> float | None:
    """Mean seconds of the trainings that were not interrupted."""
    whole = [r["training"]["seconds"] for r in by_seed.values() if r["training"]["from_step"] == 0]
    return float(np.mean(whole)) if whole else None


def _tuned(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return {name: {"chosen": row["chosen"], "candidates": row["candidates"]} for name, row in rows.items()}


def _listed(result: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """One run: where its config differs from the reference's, and what the report shows of it."""
    config = flatten(result["config"])
    differs = {k: config.get(k) for k in {**common, **config} if config.get(k) != common.get(k) and k != "seed"}
    metrics = {truth: {n: v[n] for n in SHOWN if n in v} for truth, v in result["metrics"].items()}
    return {**{key: result[key] for key in _LISTED}, "config_differs": differs, "metrics": metrics}


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _unique(values: Iterable[Any]) -> list[Any]:
    """Without repetitions, in order; values need not be hashable."""
    return [json.loads(text) for text in dict.fromkeys(json.dumps(value, sort_keys=True) for value in values)]
