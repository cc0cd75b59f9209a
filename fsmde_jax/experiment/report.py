"""From the results of an experiment's runs to its report: one JSON, a Markdown page, plots. Trains nothing.

`comparable` reads every `result.json` of the test phase below the root and checks that they may be compared, `collect`
works out the statistics, `tables` makes the page of it, `viz.experiment_plots` the pictures.
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
from fsmde_jax.experiment.comparable import LISTED, Results, check_comparable, read_results
from fsmde_jax.experiment.plan import numbers, variant_of
from fsmde_jax.experiment.suite import Suite
from fsmde_jax.names import flatten
from fsmde_jax.viz import experiment_plots

SHOWN = (
    *(f"metric/{name}" for name in ("abs_rel", "sq_rel", "rmse", "rmse_log", "a1", "a2", "a3")),
    "median/abs_rel",
    "consistency/overall",
)
MAIN = "metric/abs_rel"  # what sweeps and curves show


def report(suite: Suite, root: Path, rigs: Sequence[str], out: str | Path) -> list[Path]:
    """Writes <suite>.json, <suite>.md and <suite>_<rig>_*.png into `out`; returns the files.

    Raises:
      ConfigError: there is no result, or results that cannot be compared.
      DataError: a damaged result, or a folder that cannot be written to.
    """
    out = Path(out)
    about = {"suite": suite.name, "title": suite.title, "reference": suite.reference, "metric": suite.metric}
    content: dict[str, Any] = {**about, "rigs": {}}
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


def collect(suite: Suite, rig: str, root: Path, results: Results) -> dict[str, Any]:
    """Everything that the report of one rig shows, JSON-ready."""
    check_comparable(suite, rig, results)
    everything = [result for by_seed in results.values() for result in by_seed.values()]
    truths = list(everything[0]["metrics"])
    base = results.get(suite.reference, {})
    common = flatten((next(iter(base.values())) if base else everything[0])["config"])
    setup, folder = suite.rigs[rig], root / suite.name / rig
    shown = [name for name in suite.rows if name in results]
    methods = [name for name in shown if not suite.rows[name].bound]
    curves = {
        name: {seed: c for seed in sorted(results[name]) if (c := _curve(folder / name / f"seed{seed}"))[0]}
        for name in shown
    }
    own = curves.get(suite.reference, {})
    late = [statistics.late_change(*curve) for curve in own.values()]
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
        "leader": {truth: _leader(results, methods, suite.reference, truth) for truth in truths},
        "bounds": [name for name in shown if name not in methods],
        "missing": [name for name in suite.rows if name not in results],
        "chosen": {name: _chosen(suite, name, results[name]) for name in shown},
        "seconds": {name: _seconds(results[name]) for name in shown},
        "sweeps": {name: found for name in suite.sweeps if (found := _sweep(suite, rig, name, results, truths))},
        "curves": {f"seed {seed}": curve for seed, curve in own.items()},
        "late_change": dataclasses.asdict(statistics.spread(known)) if (known := _known(late)) else None,
        "best_at": {
            name: dataclasses.asdict(statistics.spread([statistics.best_at(*curve) for curve in by_seed.values()]))
            for name, by_seed in curves.items()
            if by_seed
        },
        "tuned": _tuned(folder / "tuned.json"),
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


def _leader(results: Results, rows: Sequence[str], reference: str, truth: str) -> dict[str, Any] | None:
    """The row with the highest mean improvement over the reference, and its improvement over each of the others, paired
    by seed; None where nothing can be compared."""

    def over(name: str, other: str) -> statistics.Difference | None:
        return statistics.improvement_over_seeds(_metric(results[name], truth), _metric(results[other], truth))

    means = {name: found.mean for name in rows if reference in rows and (found := over(name, reference))}
    if len(means) < 2:
        return None
    first = max(means, key=lambda name: means[name])
    ahead = {name: dataclasses.asdict(found) for name in means if name != first and (found := over(first, name))}
    return {"row": first, "over": ahead}


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
    named = {name: f"{name} (bound)" for name in found["bounds"]}
    bars = {
        truth: [
            (named.get(name, name), 100 * i["mean"], error and 100 * error, i["counts"])
            for name, row in rows.items()
            if name != reference and (i := row["improvement"])
            for error in (i["standard_error"],)
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
    """(steps, values) of the evaluations during a training; none if it left no file of them."""
    path, key = folder / "metrics.jsonl", f"eval/{MAIN}"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    try:
        points = [(line["step"], line[key]) for line in map(json.loads, lines) if key in line]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path}: damaged ({error!r}); delete its folder and run again") from error
    return [step for step, _ in points], [value for _, value in points]


def _chosen(suite: Suite, row: str, by_seed: Mapping[int, Any]) -> dict[str, Any]:
    """The candidate that a row was run with; {} if it is not tuned."""
    config = flatten(next(iter(by_seed.values()))["config"])
    candidates = suite.candidates_of(row) if suite.rows[row].tuned else ()
    return {key: config.get(key) for key in dict.fromkeys(key for candidate in candidates for key in candidate)}


def _seconds(by_seed: Mapping[int, Any]) -> float | None:
    """Mean seconds of the trainings that were not interrupted."""
    whole = [r["training"]["seconds"] for r in by_seed.values() if r["training"]["from_step"] == 0]
    return float(np.mean(whole)) if whole else None


def _tuned(path: Path) -> dict[str, Any]:
    """What tuning chose from, by row; {} if nothing was tuned."""
    if not path.is_file():
        return {}
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        return {
            name: {"chosen": row["chosen"], "candidates": row["candidates"], "commits": row.get("commits", [])}
            for name, row in rows.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: damaged ({error!r}); delete it and tune again (--phase tune; its runs are not done again)"
        ) from error


def _listed(result: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """One run: where its config differs from the reference's, and what the report shows of it."""
    config = flatten(result["config"])
    differs = {k: config.get(k) for k in {**common, **config} if config.get(k) != common.get(k) and k != "seed"}
    metrics = {truth: {n: v[n] for n in SHOWN if n in v} for truth, v in result["metrics"].items()}
    return {**{key: result[key] for key in LISTED}, "config_differs": differs, "metrics": metrics}


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _unique(values: Iterable[Any]) -> list[Any]:
    """Without repetitions, in order; values need not be hashable."""
    return [json.loads(text) for text in dict.fromkeys(json.dumps(value, sort_keys=True) for value in values)]
