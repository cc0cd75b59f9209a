"""Renders a dataset with several processes; resumable, with the same bytes for any number of them.

Every scene is rendered by one process and depends on the seed, its split and its number only (and on the world's
version and the kind of machine). When its files are there, a row file in `.scenes/` says so; the tables or the index of
the dataset come last and hold all scenes that have one. So a run that was killed at any moment is not taken for a whole
dataset, and the same command goes on from the scenes that are done.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from data_prep import workers as processes
from data_prep.rendered import ROWS
from data_prep.world import WORLD_VERSION, rigs, write_dgp, write_nuscenes
from data_prep.world.output import Job, Look, SceneWriter
from data_prep.world.rigs import Rig
from fsmde_jax.data import tfrecord
from fsmde_jax.errors import DataError

_LOOK = "look.json"
_SPLITS = ("train", "val")  # in the tables' order
_WRITERS: dict[str, tuple[type[SceneWriter], Any, Any, str]] = {  # scene files, scene names, end, what marks the end
    "nuscenes": (
        write_nuscenes.NuscenesScene, write_nuscenes.scene_names, write_nuscenes.write_tables, write_nuscenes.VERSION,
    ),
    "dgp": (write_dgp.DgpScene, write_dgp.scene_names, write_dgp.write_index, write_dgp.INDEX),
}  # fmt: skip
# One thread per process: results cannot depend on their number, and processes do not get into each other's way.
_THREADS = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
_RIG_STREAM = 1  # random numbers of a scene's rig, apart from those of its drive


def rig_of(look: Look) -> Rig:
    """The rig of a look, at its image size."""
    rig = rigs.read_rig(look.rig)
    return rigs.scaled(rig, scale=look.scale, size=look.size) if look.scale or look.size else rig


def rig_of_scene(job: Job, rig: Rig) -> Rig:
    """The rig that drives through a scene: the look's (`rig`), or with `vary_rig` one that depends on it and on
    (seed, split, index) only."""
    if not job.look.vary_rig:
        return rig
    return rigs.varied(rig, np.random.default_rng([job.look.seed, _SPLITS.index(job.split), job.index, _RIG_STREAM]))


def write_dataset(look: Look, out: str | Path, scenes: dict[str, int], workers: int) -> tuple[Path, dict[str, int]]:
    """Writes a dataset, or what is missing of it.

    Args:
      look: what is rendered.
      out: dataroot; made if missing. One that was made with another look or version is refused.
      scenes: how many of each split, {"train": n, "val": m}; further scenes can be added later with the same look, and
        those that are there stay.
      workers: processes; 0 = in this process, with as many threads as XLA likes.

    Returns:
      The tables' folder or the index file, and how many scenes of each split it holds.

    Raises:
      ConfigError: too many scenes, or the rig cannot be read. DataError: the folder holds something else, cannot be
        written, or a worker died.
    """
    out, rig = Path(out), rig_of(look)
    _, names_of, finish, marker = _WRITERS[rig.format]
    for split, count in scenes.items():
        names_of(split, count)  # too many are refused before anything is written
    try:
        with _locked_folder(out):
            _check_look(out, look, marker)
            jobs = _jobs(look, out, scenes, names_of)
            rows = _finished(jobs)
            if rows:
                print(f"{out}: {len(rows)} of {len(jobs)} scenes are done already", file=sys.stderr)
            if missing := [job for job in jobs if job.name not in rows]:

                def begin(backend: str) -> None:
                    _check_backend(out, backend)
                    _unmark(out, marker)

                for job, row in _run(missing, look.frames, workers, begin):
                    rows[job.name] = row
            finish(out, rig, look.seed, [rows[job.name] for job in jobs])
    except OSError as error:
        raise DataError(
            f"{error.filename or out}: cannot write ({error.strerror}); free space or choose another --out, and run"
            " again: finished scenes are kept"
        ) from error
    return out / marker, {split: sum(job.split == split for job in jobs) for split in _SPLITS}


@contextlib.contextmanager
def _locked_folder(out: Path) -> Iterator[None]:
    """Makes the folder and holds a lock on it, so that two runs never write into one."""
    (out / ROWS).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{out}: another process is rendering here; wait for it or choose another --out") from error
        yield
    finally:
        os.close(descriptor)


def _check_look(out: Path, look: Look, marker: str) -> None:
    """`DataError` unless the folder is new or was begun with the same look."""
    path, wanted = out / ROWS / _LOOK, dataclasses.asdict(look)
    wanted |= {"rig": Path(look.rig).name, "world_version": WORLD_VERSION}
    if not path.exists():
        if others := [p.name for p in out.iterdir() if p.name != ROWS]:
            with contextlib.suppress(OSError):
                (out / ROWS).rmdir()
            raise DataError(f"{out}: holds {others[0]} and is no rendered dataset; choose another --out")
        tfrecord.write_atomically(path, json.dumps(wanted).encode())
        return
    try:
        found = {"vary_rig": False, **json.loads(path.read_bytes())}  # datasets of older versions do not say it
    except ValueError:
        found = {}
    wanted = json.loads(json.dumps(wanted))
    different = [f"{key} {found.get(key)} (now {value})" for key, value in wanted.items() if found.get(key) != value]
    if different:
        whole = "a dataset" if (out / marker).exists() else "an unfinished dataset"
        raise DataError(f"{out}: holds {whole} with other {', '.join(different)}; delete it or choose another --out")


def _check_backend(out: Path, backend: str) -> None:
    """`DataError` unless all scenes of the folder are rendered on one kind of device: each has bytes of its own."""
    path = out / ROWS / _LOOK
    content = json.loads(path.read_bytes())
    if content.setdefault("backend", backend) != backend:
        raise DataError(
            f"{out}: its scenes were rendered on {content['backend']}, and JAX runs on {backend} now, where pictures"
            " differ a little; go on with the same device or choose another --out"
        )
    tfrecord.write_atomically(path, json.dumps(content).encode())


def _row_file(job: Job) -> Path:
    return job.out / ROWS / f"{job.split}-{job.index}.json"


def _jobs(look: Look, out: Path, scenes: dict[str, int], names_of: Callable[[str, int], list[str]]) -> list[Job]:
    """All scenes that the dataset is to hold: those asked for, and those that earlier runs finished."""
    jobs = []
    for split in _SPLITS:
        found = (re.fullmatch(rf"{split}-(\d+)\.json", path.name) for path in (out / ROWS).iterdir())
        numbers = sorted({*range(scenes.get(split, 0)), *(int(match[1]) for match in found if match)})
        names = names_of(split, numbers[-1] + 1 if numbers else 0)
        jobs += [Job(look, out, split, number, names[number]) for number in numbers]
    return jobs


def _finished(jobs: list[Job]) -> dict[str, Any]:
    """Rows of the scenes that are done, by scene name: those whose files are all there, with their sizes."""
    rows = {}
    for job in jobs:
        with contextlib.suppress(OSError, ValueError):
            content = json.loads(_row_file(job).read_bytes())
            if all((job.out / name).stat().st_size == size for name, size in content["files"].items()):
                rows[job.name] = content["rows"]
    return rows


def _unmark(out: Path, marker: str) -> None:
    """While scenes are being added, the dataset is not whole; its tables are made again from the scenes' rows."""
    if (out / marker).is_dir():
        unfinished = out / f"{marker}.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        (out / marker).rename(unfinished)  # at once, so that no half of it is ever there under its name
        shutil.rmtree(unfinished)
    (out / marker).unlink(missing_ok=True)


@functools.lru_cache(maxsize=2)
def _renderer(look: Look) -> Any:
    from data_prep.world import drive  # builds the functions: only where something is rendered

    return drive.Renderer(rig_of(look), samples=look.samples)


def _backend() -> str:
    return jax.default_backend()


def render_scene(job: Job) -> Any:
    """Renders and writes one scene; returns its rows."""
    from data_prep.world import drive, scene

    renderer = _renderer(job.look)
    rig = rig_of_scene(job, renderer.rig)
    writer = _WRITERS[rig.format][0](job, rig)
    one = drive.Drive(renderer, scene.scene_key(job.look.seed, job.split, job.index), rig)
    for number in range(job.look.frames):
        writer.keyframe(one, number)
        processes.count()
    rows = writer.finish()
    tfrecord.write_atomically(_row_file(job), json.dumps({"rows": rows, "files": writer.files}).encode())
    return rows


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    """Environment of worker processes: XLA reads it when it starts in them."""
    changed = {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {_THREADS}".strip(),
        "XLA_PYTHON_CLIENT_PREALLOCATE": os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE", "false"),
    }
    before = {key: os.environ.get(key) for key in changed}
    os.environ.update(changed)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _run(jobs: list[Job], frames: int, workers: int, begin: Callable[[str], None]) -> Iterator[tuple[Job, Any]]:
    """Renders scenes in worker processes (also if there is only one, so that all run under the same settings).

    `begin` is called before the first scene with the backend of JAX in a worker: this process starts none.
    """
    if not workers:
        begin(_backend())
        yield from ((job, render_scene(job)) for job in jobs)
        return
    counter = processes.new_counter()
    with (
        _single_threaded(),
        tqdm(
            total=len(jobs) * frames, unit="frame", desc="rendering (compiles first)", disable=None, dynamic_ncols=True
        ) as bar,
        processes.pool(min(workers, len(jobs)), counter, "finished scenes") as pool,
    ):

        def refresh() -> None:
            if counter.value > bar.n:
                bar.set_description("rendering", refresh=False)
            bar.update(counter.value - bar.n)

        begin(pool.submit(_backend).result())
        yield from processes.results(pool, render_scene, ((job, job) for job in jobs), ahead=len(jobs), refresh=refresh)


def describe(look: Look, out: Path, scenes: dict[str, int]) -> str:
    """How to convert what was written."""
    rig = rig_of(look)
    lines, root = [], out.resolve().name
    for split, count in scenes.items():
        if not count:
            continue
        if rig.format == "nuscenes":
            words = ["data_prep.nuscenes", "--dataroot", str(out), "--version", write_nuscenes.VERSION]
        else:
            words = ["data_prep.ddad", "--json", str(out / write_dgp.INDEX), "--masks", str(out / write_dgp.MASKS)]
        words += ["--split", split, "--image_size", "native", "--out", f"records/{root}_{split}"]
        lines.append(f"  {shlex.join(['python', '-m', *words])}")
    return "convert it with:\n" + "\n".join(lines)
