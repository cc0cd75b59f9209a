"""Cost of the distillation step as it grows: rigs/s and memory against batch, cameras, image size, bins and devices.

    python -m benchmarks.train_step_grid --out grid.json       # and grid.png beside it

One setting changes at a time, the others are those of `BASE`; every row is `benchmarks.train_step --no-torch
--no-split` in a process of its own: all terms of configs/nuscenes.py, teacher Small at the images' size. Devices are
virtual ones that share the cores of this machine, so more of them cannot be faster here: what they show is the price of
dividing.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: its folder holds data_prep.py, which would hide the package data_prep
    sys.path[0] = str(Path(__file__).resolve().parents[1])

VARIED: dict[str, tuple[Any, ...]] = {
    "batch": (1, 2, 4), "cameras": (1, 3, 6), "size": ("96x160", "192x320", "352x640"), "bins": (32, 64, 128),
    "devices": (1, 2, 4),
}  # fmt: skip
BASE = {"batch": 2, "cameras": 6, "size": "96x160", "bins": 64, "devices": 1}  # what a row does not vary


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows in which one setting changes at a time, each in a process of its own, this project's step only."""
    rows = []
    for key in args.only:
        for value in VARIED[key]:
            chosen = {**BASE, key: value}
            if key == "devices":
                chosen["batch"] = max(VARIED["devices"])
            flags = [word for name in ("batch", "cameras", "size", "bins") for word in (f"--{name}", str(chosen[name]))]
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "row.json"
                command = [sys.executable, "-m", "benchmarks.train_step", *flags, "--no-torch", "--no-split", "--out",
                           str(out), "--repeats", str(args.repeats), "--threads", str(args.threads),
                           "--dtype", args.dtype, "--encoder", args.encoder]  # fmt: skip
                virtual = f" --xla_force_host_platform_device_count={chosen['devices']}"
                environment = {**os.environ, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + virtual}
                subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
                found = json.loads(out.read_text(encoding="utf-8"))
            rows.append({"varied": key, "value": value, "setting": chosen, **found["result"]})
            print(
                f"{key} = {value}: {rows[-1]['rigs_per_s']:.3g} rigs/s, median {rows[-1]['median']['here']:.3f} s,"
                f" {rows[-1].get('xla_temporary_mb', 0):.0f} MB", flush=True,
            )  # fmt: skip
    return rows


def plot(rows: Sequence[dict[str, Any]]) -> Any:
    """Rigs per second and memory against each setting, on logarithmic scales that the settings share, as a figure."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    keys = list(dict.fromkeys(row["varied"] for row in rows))
    figure = Figure(figsize=(3 * len(keys), 5), layout="constrained")
    axes = figure.subplots(2, len(keys), sharey="row", squeeze=False)
    for column, key in enumerate(keys):
        own = [row for row in rows if row["varied"] == key]
        names = [str(row["value"]) for row in own]
        for axis, name, label in (
            (axes[0, column], "rigs_per_s", "rigs/s"),
            (axes[1, column], "xla_temporary_mb", "temporary memory, MB"),
        ):
            axis.plot(names, [row.get(name, float("nan")) for row in own], marker="o")
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(label)
        axes[1, column].set_xlabel(f"{key}" + (" (virtual)" if key == "devices" else ""))
    return figure


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_step_grid", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--encoder", default="resnet18", help="of the student (default resnet18)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="compute dtype")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls of each row (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="cores (default 2)")
    parser.add_argument(
        "--only", nargs="+", choices=list(VARIED), default=list(VARIED), help="vary these settings only"
    )
    parser.add_argument("--out", metavar="FILE.json", help="write the numbers here, and a plot beside it")
    args = parser.parse_args()
    from fsmde_jax import identity
    from fsmde_jax.data.tfrecord import write_atomically
    from fsmde_jax.errors import exit_with_message

    with exit_with_message():
        rows = measure(args)
        known = identity.run_identity({}, {})
        made = {key: known[key] for key in ("date", "commit", "versions", "hardware")} | {"rows": rows}
        made["command"] = shlex.join(["python", "-m", "benchmarks.train_step_grid", *sys.argv[1:]])
        if args.out:
            write_atomically(Path(args.out), (json.dumps(made, indent=1) + "\n").encode())
            plot(rows).savefig(Path(args.out).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
