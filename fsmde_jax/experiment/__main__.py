"""Experiments: many runs of the training and the evaluation job, compared with each other over seeds.

  python -m fsmde_jax.experiment --suite ablation --rig nuscenes --prepare --phase tune    # records without test's
  python -m fsmde_jax.experiment --suite ablation --rig nuscenes --phase tune    # choose learning rates on val
  python -m fsmde_jax.experiment --suite ablation --rig nuscenes --prepare       # now the test records, too
  python -m fsmde_jax.experiment --suite ablation --rig nuscenes                 # train all rows, measure on test
  python -m fsmde_jax.experiment --suite ablation --rig nuscenes --rows supervised ckd --sweeps label_density
  python -m fsmde_jax.experiment --suite ablation --rig nuscenes --jobs 2        # two runs at a time
  python -m fsmde_jax.experiment --suite ablation --report docs/results          # tables and plots, no training

A suite (configs/experiments/<name>.py) says which rows (methods), seeds, candidates and sweeps there are, how the
records are made, and what every run shares. Runs lie in <root>/<suite>/<rig>/<row>[-<variant>]/seed<k>/, each with
log.txt, config.json, metrics.jsonl and, when it is done, result.json. A finished run is never done again, a killed one
goes on; so the same command continues. docs/results/README.md says how runs are compared.
"""

import argparse
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from tqdm import tqdm

from fsmde_jax import build, eval_options, heap
from fsmde_jax.errors import ConfigError, exit_with_message
from fsmde_jax.experiment import inputs, parallel, tables
from fsmde_jax.experiment import report as reports
from fsmde_jax.experiment import runs as runs_of
from fsmde_jax.experiment.plan import TEST, TUNE, Run, planned_tests, planned_tuning
from fsmde_jax.experiment.suite import Split, Suite, load_suite, names_of_suites
from fsmde_jax.names import check_name


def check(runs: Iterable[Run]) -> None:
    """Checks every run's config before any of them costs time.

    Raises:
      ConfigError: naming the suite, the row and the key.
    """
    seen = set()
    for run in runs:
        if run.group in seen:
            continue
        seen.add(run.group)
        try:
            config = run.config()
            build.check(config)
            eval_options.check_best(config)
            for truth in run.truths:
                eval_options.options_from(run.evaluation_config(truth))
        except ConfigError as error:
            raise ConfigError(f"suite {run.suite.name!r}, row {run.group!r}: {error}") from error


def run_all(runs: Sequence[Run], root: Path, data: Mapping[str, str], jobs: int = 1) -> list[dict[str, Any]]:
    """The results of all runs, in order; those that are not there yet are made. One line per run.

    Raises:
      FsmdeError: a run failed, or a finished one was made in another way.
    """
    # All of them first: an odd one costs no time.
    results = {run.folder: result for run in runs if (result := runs_of.finished(run, root, data)) is not None}
    missing = [run for run in runs if run.folder not in results]
    print(f"{len(runs)} runs, {len(results)} of them done before")

    def done() -> Iterator[tuple[Run, str]]:
        for run in runs:
            if run.folder in results:
                runs_of.tidy(run, root)
                yield run, "done before"
        started = time.monotonic()
        made = parallel.execute_all(missing, root, data, jobs)
        for count, (run, result, seconds) in enumerate(made, 1):
            results[run.folder] = result
            left = (time.monotonic() - started) / count * (len(missing) - count)
            yield run, f"{seconds:.0f} s, {_clock(left)} left"

    with tqdm(total=len(runs), desc="runs", unit="run", disable=None, dynamic_ncols=True) as bar:
        for number, (run, note) in enumerate(done(), 1):
            metric, measured = run.suite.metric, results[run.folder]["metrics"]
            values = ", ".join(f"{truth} {found[metric]:.4f}" for truth, found in measured.items() if metric in found)
            tqdm.write(f"[{number}/{len(runs)}] {run.rig} {run.group} seed {run.seed}: {metric} {values} ({note})")
            bar.update()
    return [results[run.folder] for run in runs]


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def tune(suite: Suite, rig: str, rows: Sequence[str], root: Path, data: Mapping[str, str], jobs: int = 1) -> None:
    """Runs every candidate of the rows, and writes which one is best on the val records."""
    runs = planned_tuning(suite, rig, rows)
    chosen = runs_of.choose(zip(runs, run_all(runs, root, data, jobs), strict=True), suite)
    path = runs_of.write_tuned(root, suite, rig, chosen)
    for row, entry in chosen.items():
        values = ", ".join(f"{list(c['overrides'].values())} {c['mean']:.4f}" for c in entry["candidates"])
        print(f"{row}: {entry['chosen']} of {suite.metric} = {values}")
        if tables.at_the_end(entry):
            print(f"  note: the best of {row} is at the end of the candidates; a better one may lie beyond")
    print(f"written: {path}")


def _dry_run(runs: Sequence[Run], root: Path, splits: Mapping[str, Split]) -> None:
    """Says what would be done."""
    for role, split in splits.items():
        there = inputs.is_made(split)
        print(f"{role} records: {split.records}" + ("" if there else ", missing; made by (or all with --prepare):"))
        for command in () if there else split.commands:
            print(f"  {command}")
    for text in inputs.missing_weights(runs):
        print(f"missing: {text}")
    states = []
    for run in runs:
        folder = root / run.folder
        done, begun = (folder / runs_of.RESULT).is_file(), (folder / "config.json").is_file()
        states.append("done" if done else "begun" if begun else "to do")
        print(f"{states[-1]:6} {folder}")
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("done", "begun", "to do"))
    steps = sum(int(run.config().train.steps) for run, state in zip(runs, states, strict=True) if state != "done")
    print(f"{len(runs)} runs: {counts}; {steps} training steps at most. Dry run: nothing was computed")


def _selected(args: argparse.Namespace, suite: Suite) -> tuple[list[str], list[str]]:
    """Names of rows and sweeps from the flags (`ConfigError`: unknown, or without effect)."""
    if args.phase == TUNE and (args.seeds is not None or args.sweeps):
        raise ConfigError("--seeds, --sweeps: not for --phase tune; it uses the suite's tuning_seeds, for rows only")
    if both := set(args.seeds or ()) & set(suite.tuning_seeds):
        raise ConfigError(f"--seeds: {sorted(both)} chose the candidates (tuning_seeds); a test takes other seeds")
    for row in args.rows or ():
        check_name("--rows", row, suite.rows)
    for name in args.sweeps:
        check_name("--sweeps", name, [*suite.sweeps, "all"])
    sweeps = list(suite.sweeps) if "all" in args.sweeps else list(dict.fromkeys(args.sweeps))
    return list(dict.fromkeys(args.rows or suite.rows)), sweeps


def job(args: argparse.Namespace) -> None:
    """What the command line asks for.

    Raises:
      FsmdeError: see `run_all`, `check`, `report.report`; unknown names.
    """
    suite, root = load_suite(args.suite), Path(args.root)
    computing = args.rows or args.seeds is not None or args.sweeps or args.phase or args.jobs != 1
    if args.jobs < 1:
        raise ConfigError(f"--jobs {args.jobs}: expected at least 1")
    if args.jobs > 1:
        parallel.share_device()
    if args.rig:
        check_name("--rig", args.rig, suite.rigs)
    if args.report:
        if computing or args.dry_run or args.prepare:
            raise ConfigError("--report shows all that is there; it goes with --suite, --rig and --root only")
        for path in reports.report(suite, root, [args.rig] if args.rig else list(suite.rigs), args.report):
            print(f"written: {path}")
        return
    if not args.rig:
        raise ConfigError(f"name a rig with --rig; {suite.name} has {', '.join(suite.rigs)}")
    if args.prepare:
        if args.rows or args.seeds is not None or args.sweeps or args.jobs != 1 or args.dry_run:
            raise ConfigError("--prepare only makes records and caches; it goes with --suite, --rig and --phase only")
        inputs.prepare(suite, args.rig, args.phase or TEST)
        return
    args.phase = args.phase or TEST
    rows, sweeps = _selected(args, suite)
    if args.phase == TUNE:
        runs = planned_tuning(suite, args.rig, rows)
    else:
        free: dict[str, dict[str, Any]] = {row: {} for row in rows}
        runs = planned_tests(suite, args.rig, rows, free, seeds=args.seeds, sweeps=sweeps)
    check(runs)
    splits = inputs.splits_of(suite, args.rig, args.phase)
    if args.dry_run:
        _dry_run(runs, root, splits)
        return
    data = inputs.fingerprints(splits)
    inputs.check_scenes(splits)
    inputs.check_weights(runs)
    logging.set_verbosity(logging.WARNING)  # orbax tells a page at every start
    runs_of.use_cache(root)
    if args.phase == TUNE:
        tune(suite, args.rig, rows, root, data, args.jobs)
        return
    chosen = runs_of.read_tuned(root, suite, args.rig, rows, data)
    run_all(planned_tests(suite, args.rig, rows, chosen, seeds=args.seeds, sweeps=sweeps), root, data, args.jobs)
    print(f"tables and plots: python -m fsmde_jax.experiment --suite {args.suite} --root {root} --report docs/results")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m fsmde_jax.experiment", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument(
        "--suite", required=True, metavar="S", help=f"{', '.join(names_of_suites())}, or the path of a suite's .py file"
    )
    made.add_argument("--rig", metavar="R", help="one of the suite's rigs, e.g. nuscenes or ddad")
    made.add_argument(
        "--root", default="runs/experiments", metavar="D", help="folder of all runs (default %(default)s)"
    )
    made.add_argument(
        "--phase", choices=(TUNE, TEST),
        help="tune: train every candidate (learning rates) of every row and choose on the val records; test (default):"
        " train with what was chosen and measure on the test records; refused for rows that were not tuned",
    )  # fmt: skip
    made.add_argument("--rows", nargs="+", metavar="ROW", help="methods (default: all of the suite)")
    made.add_argument(
        "--seeds", nargs="+", type=int, metavar="K", help="instead of each row's own 0 ... n - 1 (test phase)"
    )
    made.add_argument(
        "--sweeps", nargs="+", default=[], metavar="SWEEP",
        help="also these sweeps of the suite, or 'all' (test phase; default none)",
    )  # fmt: skip
    made.add_argument(
        "--jobs", type=int, default=1, metavar="N",
        help="runs at a time, each in a process with its share of the cores (default 1); on a GPU they share it",
    )  # fmt: skip
    made.add_argument("--dry_run", action="store_true", help="list the runs and what they need; compute nothing")
    made.add_argument(
        "--prepare", action="store_true",
        help="make the records and teacher caches that are missing, then stop; with --phase tune no test records",
    )  # fmt: skip
    made.add_argument(
        "--report", metavar="DIR", help="collect all results into DIR: JSON, Markdown, plots; trains nothing"
    )
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    args = parser().parse_args(argv)
    with exit_with_message():
        job(args)


if __name__ == "__main__":
    heap.keep_freed_memory()
    main()
