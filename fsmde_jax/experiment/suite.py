"""Suites of experiments as data: rows (methods), candidates for tuning, sweeps, rigs and their records.

A suite is a Python file of `configs/experiments/` whose `get_suite()` returns a `Suite`; `plan` makes runs
of it. docs/results/README.md says how runs are compared.
"""

import importlib
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from fsmde_jax.errors import ConfigError
from fsmde_jax.names import check_name, flatten

Overrides = Mapping[str, Any]  # dotted config key -> value
TRUTHS = ("lidar", "dense")
KEEP = ("all", "best", "none")
_SUITES = Path(__file__).resolve().parents[2] / "configs" / "experiments"
_NAME = re.compile(r"[a-z0-9_]+")  # of suites, rigs, rows, sweeps: parts of folder names, where "-" separates
_LABEL = re.compile(r"[A-Za-z0-9._]+")  # of a sweep's value, likewise


@dataclass(frozen=True)
class Split:
    """One folder of records, teacher cache or file of weights, and the command lines ("python -m ...") that make it."""

    records: str
    commands: tuple[str, ...]


@dataclass(frozen=True)
class RigSetup:
    """What is trained and measured on: a config of `configs/` by name, what it is overridden with, three splits.

    `test` is measured by the test phase only; checkpoints and candidates are chosen on `val`. `inputs` are what else
    the configs of its runs name: folders of `teacher.cache`, files of weights.
    """

    config: str
    train: Split
    val: Split
    test: Split
    overrides: Overrides = field(default_factory=dict)
    inputs: tuple[Split, ...] = ()


@dataclass(frozen=True)
class Row:
    """One method: overrides of config keys, seeds 0 ... seeds - 1.

    `candidates` are what tuning chooses from, () = the suite's; every tuned row has the same number of them. A `bound`
    sees labels that the others do not: it says how much there is to gain, and is not compared with them as a method.
    """

    overrides: Overrides
    seeds: int = 3
    candidates: tuple[Overrides, ...] = ()
    tuned: bool = True
    bound: bool = False


@dataclass(frozen=True)
class Sweep:
    """One thing varied: {label: overrides} for some rows, in the order in which it is drawn; labels that are numbers
    become the horizontal axis. A value that leaves a row's config as it is takes that row's own runs."""

    title: str
    values: Mapping[str, Overrides]
    rows: tuple[str, ...]
    seeds: int = 3


def swept(key: str, values: Sequence[Any], rows: tuple[str, ...], *, title: str = "", seeds: int = 3) -> Sweep:
    """A sweep over one config key whose values are their own labels."""
    return Sweep(title or key, {f"{value}": {key: value} for value in values}, rows, seeds)


@dataclass(frozen=True)
class Suite:
    """Rows, sweeps and rigs that are compared with each other.

    Attributes:
      name: of the folder of its runs and of its report.
      title: one line for the report.
      rigs: by name.
      rows: by name, in the order of the tables.
      candidates: what tuning chooses from, unless a row has its own.
      overrides: of every run; a rig's and a row's come after.
      sweeps: by name.
      reference: the row that the others are compared with.
      metric: what tuning minimises on the val records.
      tuning_seeds: seeds of every candidate; none of them is a seed of the test phase.
      truths: the ground truths of the test phase; tuning looks at "lidar" only.
      keep: which checkpoints of a finished run stay: all, best or none; after tuning none.
    """

    name: str
    title: str
    rigs: Mapping[str, RigSetup]
    rows: Mapping[str, Row]
    candidates: tuple[Overrides, ...]
    overrides: Overrides = field(default_factory=dict)
    sweeps: Mapping[str, Sweep] = field(default_factory=dict)
    reference: str = "supervised"
    metric: str = "metric/abs_rel"
    tuning_seeds: tuple[int, ...] = (100,)
    truths: tuple[str, ...] = TRUTHS
    keep: str = "best"

    def __post_init__(self) -> None:
        where = f"suite {self.name!r}"
        for name in (self.name, *self.rigs, *self.rows, *self.sweeps):
            if not _NAME.fullmatch(name):
                raise ConfigError(f"{where}: name {name!r}: expected small letters, digits and _ only")
        check_name(f"{where}, reference", self.reference, self.rows)
        for truth in self.truths:
            check_name(f"{where}, truths", truth, TRUTHS)
        check_name(f"{where}, keep", self.keep, KEEP)
        sizes = {name: len(self.candidates_of(name)) for name, row in self.rows.items() if row.tuned}
        if len(set(sizes.values())) > 1 or 0 in sizes.values():
            raise ConfigError(f"{where}: every tuned row needs equally many candidates, at least one; got {sizes}")
        tuned = {key for name in sizes for candidate in self.candidates_of(name) for key in candidate}
        for name, sweep in self.sweeps.items():
            for row in sweep.rows:
                check_name(f"{where}, sweep {name!r}, rows", row, self.rows)
            for label, overrides in sweep.values.items():
                if not _LABEL.fullmatch(label):
                    raise ConfigError(f"{where}, sweep {name!r}: label {label!r}: letters, digits, . and _ only")
                if both := sorted(tuned & set(overrides)):
                    raise ConfigError(f"{where}, sweep {name!r}: {', '.join(both)} cannot be tuned and swept at once")
        test = max((seeds for each in (self.rows, self.sweeps) for seeds in _seeds(each)), default=0)
        if not self.tuning_seeds or min(self.tuning_seeds) < test:
            raise ConfigError(f"{where}: tuning_seeds = {self.tuning_seeds}: expected seeds of {test} and above")

    def candidates_of(self, row: str) -> tuple[Overrides, ...]:
        """What tuning chooses from for a row."""
        return self.rows[row].candidates or self.candidates


def _seeds(entries: Mapping[str, Any]) -> list[int]:
    return [entry.seeds for entry in entries.values()]


def defaults() -> dict[str, Any]:
    """configs/base.py as a flat dict: what a key means where nobody sets it."""
    return flatten(config_of("base").to_dict())


def names_of_suites() -> list[str]:
    """The suites of configs/experiments/."""
    return sorted(path.stem for path in _SUITES.glob("*.py") if path.stem != "__init__")


def load_suite(name: str) -> Suite:
    """A suite by its name in configs/experiments/, or by the path of a .py file.

    Raises:
      ConfigError: there is none, or it is wrong in itself.
    """
    path = Path(name) if name.endswith(".py") else _SUITES / f"{name}.py"
    if not path.is_file():
        raise ConfigError(f"--suite {name}: no file {path.name}; there are {', '.join(names_of_suites())}")
    spec = importlib.util.spec_from_file_location(f"suite_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    suite = _call(module, "get_suite", path)
    if not isinstance(suite, Suite):
        raise ConfigError(f"{path}: get_suite() returned {type(suite).__name__}, expected a Suite")
    return suite


def config_of(name: str) -> Any:
    """ConfigDict of configs/<name>.py."""
    try:
        module = importlib.import_module(f"configs.{name}")
    except ModuleNotFoundError as error:
        raise ConfigError(f"no config configs/{name}.py, which a rig of the suite names") from error
    return _call(module, "get_config", Path(f"configs/{name}.py"))


def _call(module: ModuleType, name: str, path: Path) -> Any:
    function = getattr(module, name, None)
    if function is None:
        raise ConfigError(f"{path}: has no {name}()")
    return function()
