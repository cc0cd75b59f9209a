"""The runs of a suite: the config and the folder of each, and what an earlier config differs in. Nothing is trained."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fsmde_jax.errors import ConfigError
from fsmde_jax.experiment.suite import Overrides, Split, Suite, config_of
from fsmde_jax.names import check_name, flatten

TUNE, TEST = "tune", "test"  # the phases


@dataclass(frozen=True)
class Run:
    """One training with its evaluations. `group` is its folder below the rig's, without the seed."""

    suite: Suite
    rig: str
    row: str
    seed: int
    phase: str
    variant: str = ""
    overrides: Overrides = field(default_factory=dict)  # beyond those of suite, rig and row

    @property
    def group(self) -> str:
        return f"{self.row}-{self.variant}" if self.variant else self.row

    @property
    def folder(self) -> Path:
        """Below the root of all experiments."""
        return Path(self.suite.name, self.rig, self.group, f"seed{self.seed}")

    @property
    def measured(self) -> Split:
        setup = self.suite.rigs[self.rig]
        return setup.val if self.phase == TUNE else setup.test

    @property
    def truths(self) -> tuple[str, ...]:
        return ("lidar",) if self.phase == TUNE else self.suite.truths

    def config(self) -> Any:
        """The ConfigDict of its training; evaluations during it are on the val records.

        Raises:
          ConfigError: an override names no config key, or its value cannot be used.
        """
        setup, where = self.suite.rigs[self.rig], f"suite {self.suite.name!r}, {self.rig}, {self.group}"
        config = config_of(setup.config)
        flat = {**self.suite.overrides, **setup.overrides, **self.suite.rows[self.row].overrides, **self.overrides}
        flat |= {"name": self.suite.name, "seed": self.seed}
        for role, split in (("train", setup.train), ("eval", setup.val)):
            flat |= {f"data.{role}_records": split.records, f"data.prepare_{role}": "\n  ".join(split.commands)}
        declared = flatten(config.to_dict())
        for key in flat:
            check_name(f"{where}: config key", key, declared)
        try:
            config.update_from_flattened_dict(flat)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{where}: {error}") from error
        return config

    def evaluation_config(self, truth: str) -> Any:
        """The ConfigDict of an evaluation on the records that its phase measures."""
        config = self.config()
        config.data.eval_records = self.measured.records
        config.data.prepare_eval = "\n  ".join(self.measured.commands)
        config.eval.ground_truth = truth
        return config


def as_run(saved: Overrides) -> dict[str, Any]:
    """A saved flat config of a student with what it meant but could not say yet: its depth was the mean of depth."""
    return {"model.expectation": "depth", **saved} if "model.bins" in saved else dict(saved)


def changed(saved: Overrides, current: Overrides, default: Overrides) -> list[str]:
    """One line per key whose value differs between two flat configs.

    A key that `saved` does not know yet is no difference while it has its value of configs/base.py (`default`): it was
    added later, and what base.py says is what was done before.
    """
    found, saved = [], as_run(saved)
    for key in sorted(set(saved) | set(current)):
        if key not in current:
            found.append(f"{key}: {saved[key]!r} there, no such key now")
        elif key not in saved:
            if current[key] != default.get(key):
                found.append(f"{key}: unknown there, {current[key]!r} now")
        elif saved[key] != current[key]:
            found.append(f"{key}: {saved[key]!r} there, {current[key]!r} now")
    return found


def label_of(candidate: Overrides) -> str:
    """A candidate as part of a folder's name, e.g. "lr=0.0003"."""
    parts = (f"{key.rsplit('.', 1)[-1]}={value}" for key, value in sorted(candidate.items()))
    return re.sub(r"[^A-Za-z0-9._=,]", "_", ",".join(parts))


def is_base(suite: Suite, rig: str, row: str, overrides: Overrides) -> bool:
    """Whether a sweep's value leaves the row's own config as it is."""
    own = flatten(Run(suite, rig, row, 0, TEST).config().to_dict())
    varied = flatten(Run(suite, rig, row, 0, TEST, overrides=overrides).config().to_dict())
    return own == varied


def planned_tuning(suite: Suite, rig: str, rows: Iterable[str]) -> list[Run]:
    """The runs that choose each row's candidate: every candidate of every tuned row, the same seeds for all.

    Candidate by candidate, so that two at a time are seldom of one row: both would compile the same program.
    """
    candidates = {row: suite.candidates_of(row) for row in rows if suite.rows[row].tuned}
    return [
        Run(suite, rig, row, seed, TUNE, f"tune_{label_of(candidate)}", candidate)
        for same in zip(*candidates.values(), strict=True)  # every row has equally many
        for row, candidate in zip(candidates, same, strict=True)
        for seed in suite.tuning_seeds
    ]


def planned_tests(
    suite: Suite, rig: str, rows: Sequence[str], chosen: Mapping[str, Overrides], *,
    seeds: Sequence[int] | None = None, sweeps: Iterable[str] = (),
) -> list[Run]:  # fmt: skip
    """The runs of a test: rows, then the sweeps' values that are not a row's own runs; seed by seed, so that an
    interrupted session has all rows of the first seeds.

    Args:
      suite: the suite.
      rig: name of the rig.
      rows: names; a sweep takes those of its rows that are among them.
      chosen: tuned overrides per row ({} for rows that are not tuned).
      seeds: instead of the suite's.
      sweeps: names.
    """

    def order(run: Run) -> int:
        return run.seed

    def of(row: str, count: int, variant: str, overrides: Overrides) -> list[Run]:
        merged = {**chosen[row], **overrides}
        return [
            Run(suite, rig, row, seed, TEST, variant, merged) for seed in (range(count) if seeds is None else seeds)
        ]

    runs = sorted((run for row in rows for run in of(row, suite.rows[row].seeds, "", {})), key=order)
    for name in sweeps:
        sweep = suite.sweeps[name]
        extra = [
            run
            for label, overrides in sweep.values.items()
            for row in sweep.rows
            if row in rows
            for run in of(row, sweep.seeds, variant_of(suite, rig, row, name, label), overrides)
        ]
        runs += sorted(extra, key=order)
    return list({run.folder: run for run in runs}.values())


def variant_of(suite: Suite, rig: str, row: str, sweep: str, label: str) -> str:
    """Name of a sweep's value in folder names; "" where it is the row itself."""
    return "" if is_base(suite, rig, row, suite.sweeps[sweep].values[label]) else f"{sweep}={label}"


def numbers(labels: Iterable[str]) -> list[float] | None:
    """Labels as numbers; None if one of them is none."""
    try:
        values = [float(label) for label in labels]
    except ValueError:
        return None
    return values if all(math.isfinite(value) for value in values) else None
