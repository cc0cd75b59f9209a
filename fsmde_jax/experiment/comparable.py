"""Results of runs as they were written: read, and refused where one table cannot hold them."""

import json
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.experiment.plan import TEST, as_run, changed
from fsmde_jax.experiment.suite import Suite, defaults
from fsmde_jax.names import flatten

LISTED = ("row", "variant", "seed", "commit", "commit_of_evaluation", "date", "training", "step", "teacher")
_NEEDED = (*LISTED, "phase", "rig", "config", "data", "hardware", "versions", "titles", "samples", "metrics")

Results = dict[str, dict[int, dict[str, Any]]]  # group -> seed -> content of result.json


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
    """Checks that results may stand in one table.

    Raises:
      ConfigError: they were measured on different records; seeds of a group, or rows in what they share, were run with
        different configs; one name stands for different teachers.
    """
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
    if lines := [*_unlike_configs(suite, results), *_unlike_teachers(results)]:
        raise ConfigError(
            f"{suite.name}/{rig}: one table cannot hold these rows, which differ in what they should share:\n  "
            + "\n  ".join(lines) + "\nDelete the folders of those that are out of date and run them again, or let the"
            " suite's row or sweep override the key."
        )  # fmt: skip


def _unlike_configs(suite: Suite, results: Results) -> list[str]:
    """One line per key that differs between groups, though none of their rows, candidates and sweep values sets it."""
    default = defaults()
    configs: dict[str, dict[str, Any]] = {}
    varied, set_by_row, rows = {}, {}, {}
    for group, by_seed in results.items():
        result = next(iter(by_seed.values()))
        row, (sweep, _, label) = result["row"], result["variant"].partition("=")
        values = suite.sweeps[sweep].values if sweep in suite.sweeps else {"": {}}
        if row not in suite.rows or label not in values:
            continue  # the suite has no such row or value any more, so no table shows it
        candidates = suite.candidates_of(row) if suite.rows[row].tuned else ()
        configs[group], rows[group] = {**default, **as_run(flatten(result["config"]))}, row
        varied[group] = {"seed", *values[label]}
        set_by_row[group] = {*suite.rows[row].overrides, *(key for candidate in candidates for key in candidate)}
    lines = _differing(configs, {group: varied[group] | set_by_row[group] for group in configs})
    for row in dict.fromkeys(rows.values()):  # a sweep's value has all else of its row, the candidate too
        lines += _differing({group: config for group, config in configs.items() if rows[group] == row}, varied)
    return list(dict.fromkeys(lines))


def _differing(configs: Mapping[str, Mapping[str, Any]], free: Mapping[str, Set[str]]) -> list[str]:
    """One line per key that has several values in {group: flat config}, without the groups in which it is free."""
    found: dict[str, dict[str, list[str]]] = {}
    for group, config in configs.items():
        for key in config.keys() - free[group]:
            found.setdefault(key, {}).setdefault(repr(config[key]), []).append(group)
    return [f"{key}: {_who_has_which(values)}" for key, values in sorted(found.items()) if len(values) > 1]


def _unlike_teachers(results: Results) -> list[str]:
    """One line per teacher's name that stands for several weights."""
    found: dict[str, dict[str, list[str]]] = {}
    for group, by_seed in results.items():
        for teacher in (result["teacher"] for result in by_seed.values() if result["teacher"]):
            found.setdefault(teacher["weights"], {}).setdefault(teacher["sha256"], []).append(group)
    return [
        f"teacher {name!r}: " + _who_has_which({f"SHA-256 {sha[:12]}": groups for sha, groups in hashes.items()})
        for name, hashes in found.items()
        if len(hashes) > 1
    ]


def _who_has_which(values: Mapping[str, Iterable[str]]) -> str:
    """{value: groups} in words."""
    return ", ".join(f"{value} in {' '.join(dict.fromkeys(groups))}" for value, groups in values.items())
