"""Command line: train and evaluate a student, or a teacher (configs/teacher_world.py).

  python -m fsmde_jax.main --config configs/nuscenes.py
  python -m fsmde_jax.main --config configs/nuscenes.py --mode evaluate --config.data.eval_records=records/my_rig
  python -m fsmde_jax.main --config configs/ddad.py --config.optim.lr=1e-4 --workdir runs/ddad_slow

Every key of configs/base.py can be overridden with --config.<key>=<value>. Running the same command again resumes.
"""

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from fsmde_jax import heap
from fsmde_jax.errors import ConfigError, exit_with_message
from fsmde_jax.names import flatten, nearest

_CONFIG = config_flags.DEFINE_config_file("config", None, "Config file, e.g. configs/nuscenes.py.", lock_config=True)
_MODE = flags.DEFINE_enum("mode", "train_and_evaluate", ["train", "evaluate", "train_and_evaluate"], "What to do.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; default runs/<config name>.")
_INIT_FROM = flags.DEFINE_string(
    "init_from",
    "",
    "Whose parameters start this run (fine-tuning) or are evaluated: another run's workdir, a .safetensors file of"
    " fsmde_jax.convert, or lite0, the student in this package.",
)
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "One of several processes that train together, usually one per host; see docs/scaling.md. On Cloud TPU, SLURM, Open"
    " MPI and Kubernetes they find each other; elsewhere name them by the next three flags.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", "", "With --distributed: host:port of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "With --distributed: how many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "With --distributed: which of them this is, from 0.")


def main(argv: Sequence[str]) -> None:
    with exit_with_message():
        if len(argv) > 1:
            raise ConfigError(f"unexpected argument {argv[1]!r}; overrides are written --config.<key>=<value>")
        if _CONFIG.value is None:
            raise ConfigError(f"name a config with --config; there are {_configs()}")
        config = _CONFIG.value
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # orbax tells a page at every start; --verbosity=0 shows it
        if _MODE.value == "evaluate" and _INIT_FROM.value and not _WORKDIR.value:
            raise ConfigError("--mode evaluate --init_from: name a folder for its results with --workdir")
        workdir = Path(_WORKDIR.value or f"runs/{config.name}")
        if not _DISTRIBUTED.value and (_COORDINATOR.value or _NUM_PROCESSES.value or _PROCESS_ID.value >= 0):
            raise ConfigError("--coordinator, --num_processes and --process_id belong to --distributed")
        # JAX is imported only now, so that --help and typing errors answer at once.
        from fsmde_jax import distributed, preemption
        from fsmde_jax.evaluate import evaluate_run
        from fsmde_jax.train import train

        if os.getpid() == 1:
            preemption.end_at_once()
        if _DISTRIBUTED.value:
            distributed.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        distributed.say(f"workdir: {workdir}")
        with distributed.ending_with_peers():
            if _MODE.value != "evaluate":
                train(config, workdir, init_from=_INIT_FROM.value)
            if _MODE.value != "train":
                evaluate_run(config, workdir, _INIT_FROM.value if _MODE.value == "evaluate" else "")


def _parse(argv: list[str]) -> list[str]:
    """absl's parser, with config mistakes turned into messages that suggest the nearest file or key."""
    with exit_with_message():
        path = _config_path(argv)
        if path and not Path(path).is_file():
            raise ConfigError(f"{path}: no such config file; there are {_configs()}")
        try:
            return app.parse_flags_with_usage(_last_of_each_key(argv))
        except (AttributeError, KeyError, ValueError, TypeError) as error:
            raise ConfigError(_explain(error, argv)) from error


def _last_of_each_key(argv: list[str]) -> list[str]:
    """Of repeated `--config.<key>=` overrides, the last one counts (ml_collections would join tuples)."""
    last = {argument.split("=")[0]: i for i, argument in enumerate(argv) if re.match(r"^--?config\.[\w.]+=", argument)}
    return [argument for i, argument in enumerate(argv) if last.get(argument.split("=")[0], i) == i]


def _config_path(argv: list[str]) -> str | None:
    for argument, following in zip(argv, [*argv[1:], ""], strict=True):
        match = re.match(r"^--?config(=(.*))?$", argument)
        if match:
            return match.group(2) if match.group(1) else following
    return None


def _configs() -> str:
    folder = Path(__file__).resolve().parent.parent / "configs"
    return ", ".join(sorted(f"configs/{p.name}" for p in folder.glob("*.py") if p.stem not in ("__init__", "base")))


def _explain(error: Exception, argv: list[str]) -> str:
    text = str(error).strip("'\"")
    known = _known_keys()
    for argument in argv:
        match = re.match(r"^--?config\.([\w.]+)", argument)
        if match and known and match.group(1) not in known:
            near = nearest(match.group(1), known, cutoff=0.0)
            return f"unknown config key {match.group(1)!r}" + (f"; did you mean {near!r}?" if near else "")
    return text


def _known_keys() -> list[str]:
    from configs import base

    return list(flatten(base.get_config().to_dict()))


if __name__ == "__main__":
    heap.keep_freed_memory()
    sys.exit(app.run(main, flags_parser=_parse))
