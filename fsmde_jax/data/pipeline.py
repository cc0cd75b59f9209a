"""Records to batches: shuffled, augmented, resumable streams for training and ordered batches for evaluation.

Reader's side in short::

    records = open_records("records/nuscenes_train")
    stream = train_dataset(records, image_size=(352, 640), batch_size=8, seed=0)
    batches = iter(to_device(stream, sharding))   # jax.Arrays, batch axis sharded; or iter(stream) for NumPy
    batch = next(batches)                         # `record_index` stays NumPy: records.where(batch["record_index"][0])
    state = batches.get_state()                   # JSON; the same in every process, whatever their number

One endless sequence of records (every epoch its own permutation) is dealt out to the hosts, host k of n taking every
n-th position. What happens to a record depends on (seed, position in that sequence) alone: not on threads, batch size
or the number of hosts. The state is the number of batches read and the `layout` that gives it a meaning.

Each thread builds a whole batch in place, so memory is about (num_threads + prefetch) batches. Processes were slower.
"""

import concurrent.futures
import itertools
from collections import deque
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from fsmde_jax.data import transforms
from fsmde_jax.data.augment import NO_AUGMENT, AugmentOptions, Draw, draw
from fsmde_jax.data.prefetch import PrefetchDataset
from fsmde_jax.data.records import Records, require_dense_depth
from fsmde_jax.data.schema import RigSample
from fsmde_jax.data.teacher_maps import TeacherCache
from fsmde_jax.errors import ConfigError, TrainingError

Batch = dict[str, Any]

ORDER_VERSION = 1  # raise it when the order of records or what a seed does to a sample changes


def check_batch_size(batch_size: int, num_devices: int) -> None:
    """Raises `ConfigError` unless `batch_size` rigs can be divided evenly over `num_devices` devices."""
    if batch_size < 1:
        raise ConfigError(f"data.batch_size = {batch_size}: must be at least 1")
    if num_devices < 1:
        raise ConfigError(f"data.batch_size = {batch_size} cannot be divided over {num_devices} devices")
    if batch_size % num_devices:
        low = batch_size - batch_size % num_devices
        choices = f"{low} or {low + num_devices}" if low else str(num_devices)
        raise ConfigError(
            f"data.batch_size = {batch_size} is not divisible by the {num_devices} devices; choose a multiple of"
            f" {num_devices}, e.g. {choices}"
        )


def layout(records: Records, *, batch_size: int, seed: int, limit: int = 0, labelled: int = 0) -> dict[str, Any]:
    """What a stream's position is counted in. A state saved under one layout means other records under another.

    The numbers of threads and of processes are not in it: after k batches of one process or of several the same records
    have been read.
    """
    return {
        **({"labelled": labelled} if labelled else {}),
        "order_version": ORDER_VERSION,
        "records": records.fingerprint,
        "num_records": len(chosen_indices(len(records), limit)),
        "cameras": list(records.cameras),
        "batch_size": int(batch_size),
        "seed": int(seed),
    }


def check_layout(saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises `TrainingError` naming every entry in which two layouts differ: going on would read wrong records."""
    differences = [
        f"  {key}: {saved.get(key)!r} when saved, {current.get(key)!r} now"
        for key in sorted(set(saved) | set(current))
        if saved.get(key) != current.get(key)
    ]
    if differences:
        raise TrainingError(
            "the saved position in the training data belongs to another layout:\n" + "\n".join(differences) + "\n"
            "restore with the same settings, or start a new run from the weights with --init_from"
        )


class _GuardedIterator(grain.DatasetIterator):
    """Keeps the layout inside the state, and refuses a state of another layout."""

    def __init__(self, parent: grain.DatasetIterator, the_layout: dict[str, Any]):
        super().__init__(parent)
        self._layout = the_layout

    def __next__(self) -> Batch:
        return next(self._parent)

    def get_state(self) -> dict[str, Any]:
        return {"layout": self._layout, "position": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        check_layout(state.get("layout", {}), self._layout)
        self._parent.set_state(state["position"])


class _GuardedDataset(grain.IterDataset):
    def __init__(self, parent: grain.IterDataset, the_layout: dict[str, Any]):
        super().__init__(parent)
        self._layout = the_layout

    def __iter__(self) -> _GuardedIterator:
        return _GuardedIterator(iter(self._parent), self._layout)


def _build(
    records: Records,
    rows: list[tuple[int, Draw]],
    size: tuple[int, int],
    use_extra: bool,
    label_fraction: float,
    labelled: frozenset[int] | None,
    cache: TeacherCache | None,
    **extras: bool,
) -> Batch:
    """A batch [len(rows), ...] of (record index, random choices)."""
    batch = transforms.empty_batch(len(rows), len(records.cameras), size, **extras)
    batch |= cache.empty(len(rows)) if cache else {}
    for row, (index, choice) in enumerate(rows):
        arrays = {name: array[row] for name, array in batch.items() if name != "record_index"}
        share = label_fraction if labelled is None or index in labelled else 0.0
        sample, where = transforms.thin_labels(records[index], share, index), records.where(index)
        cached = cache.maps(index, sample.sample_id) if cache else None
        transforms.load_rig(sample, arrays, choice=choice, use_extra=use_extra, cached=cached, where=where)
        batch["record_index"][row] = index
    return batch


def _order(used: list[int], labelled: frozenset[int] | None, seed: int) -> grain.MapDataset:
    """Record indices without end, every epoch shuffled anew; labelled and unlabelled ones in turn."""

    def shuffled(indices: list[int]) -> grain.MapDataset:
        return grain.MapDataset.range(len(indices)).seed(seed).shuffle().repeat().map(indices.__getitem__)

    if labelled is None or len(labelled) == len(used):
        return shuffled(used)
    parts = [[i for i in used if (i in labelled) == wanted] for wanted in (True, False)]
    return grain.MapDataset.mix([shuffled(part) for part in parts], weights=[0.5, 0.5])


def train_dataset(
    records: Records,
    *,
    image_size: tuple[int, int],
    batch_size: int,
    seed: int,
    augment: AugmentOptions = NO_AUGMENT,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 2,
    prefetch: int = 2,
    use_extra_sweeps: bool = True,
    label_fraction: float = 1.0,
    limit: int = 0,
    labelled: int = 0,
    unlabelled: bool = True,
    dense_depth: bool = False,
    clean_images: bool = False,
    teacher_cache: TeacherCache | None = None,
) -> grain.IterDataset:
    """Endless training batches; `iter()` of it can be saved (`get_state`) and set back exactly (`set_state`).

    Every epoch visits every record once, in another order; batches run on across the end of an epoch, so none is cut
    and no record is dropped.

    Args:
      records: what to read.
      image_size: network input, (height, width) in pixels.
      batch_size: rigs per step over ALL processes; a process gets batch_size / process_count of them.
      seed: of the order and of the augmentation.
      augment: `AugmentOptions`, none by default.
      process_index: this host, 0 <= process_index < process_count hosts.
      num_threads: reading and decoding threads of this process; 0 = in the calling thread.
      prefetch: batches kept ready besides the ones being built.
      use_extra_sweeps: labels also from neighbouring sweeps, where the records hold them.
      label_fraction: share of a record's points that become labels, the same ones in every epoch
        (`transforms.thin_labels`).
      limit: train on this many records only, spread evenly over all; 0 = all.
      labelled: labels for this many of them only, spread evenly; 0 = for all. Every second rig of the stream is then a
        labelled one. unlabelled: False = leave the others out, as there is no teacher.
      dense_depth: adds `dense_depth` to the batches.
      clean_images: adds `clean_images` [B,N,H,W,3] uint8, the images before colour jitter: what a teacher sees.
      teacher_cache: adds its `teacher_rel_inv_depth` [B,N,h,w] float32, cropped and mirrored with the images, and
        `teacher_tokens` [B,N,gh,gw,C] float16 if it was opened with them.

    Returns:
      A grain dataset of NumPy batches: images [B,N,H,W,3] uint8 RGB, intrinsics [B,N,3,3], cam_to_ego and
      ego_to_global [B,N,4,4], depth [B,N,H,W] float32 metres (0 = none), ego_mask [B,N,H,W] bool (True = not the
      car's own body), view_mask [B,N] bool (True = camera present), record_index [B] int64; if asked for, dense_depth
      [B,N,H,W] float32 metres (0 = none), cropped, scaled and mirrored with the images.

    Raises:
      ConfigError: batch_size is not divisible by process_count, image_size or seed cannot be used, or the records lack
        the dense depth that is asked for; the cache does not fit the image size or the augmentation.
      DataError: the cache is of other records; (while iterating) a record is damaged: names the file and the record.
    """
    check_batch_size(batch_size, process_count)
    if not 0 <= process_index < process_count:
        raise ConfigError(f"process_index {process_index} of {process_count} processes")
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed = {seed}: must lie in [0, 2^32)")
    if min(image_size) < 1:
        raise ConfigError(f"data.image_size = {tuple(image_size)}: height and width must be positive")
    if not 0 < label_fraction <= 1:
        raise ConfigError(f"data.label_fraction = {label_fraction}: expected a share above 0, at most 1")
    if not 0 <= limit <= len(records):
        raise ConfigError(f"data.train_samples = {limit}: there are {len(records)} samples; 0 takes all")
    used = chosen_indices(len(records), limit)
    if not 0 <= labelled <= len(used):
        raise ConfigError(f"data.labelled_samples = {labelled}: there are {len(used)} samples; 0 labels all")
    if dense_depth:
        require_dense_depth(records, "data.dense_depth = True")
    size = (int(image_size[0]), int(image_size[1]))
    if teacher_cache:
        teacher_cache.check(records, size, augment.scale)

    with_labels = None
    if labelled:
        kept = [used[i] for i in chosen_indices(len(used), labelled)]
        used, with_labels = (used, frozenset(kept)) if unlabelled else (kept, None)

    def with_position(local: int, index: int) -> np.ndarray:
        return np.array([process_index + local * process_count, index], np.int64)

    def build(rows: np.ndarray) -> Batch:
        choices = [draw(augment, len(records.cameras), np.random.default_rng([seed, int(p)])) for p, _ in rows]
        chosen = [(int(i), c) for (_, i), c in zip(rows, choices, strict=True)]
        extras = {"dense_depth": dense_depth, "clean_images": clean_images}
        return _build(records, chosen, size, use_extra_sweeps, label_fraction, with_labels, teacher_cache, **extras)

    # Repeating before slicing deals the hosts one common sequence: epochs stay in step though n may not divide them.
    positions = _order(used, with_labels, seed)[process_index::process_count]
    batches = positions.map_with_index(with_position).batch(batch_size // process_count, drop_remainder=True).map(build)
    ahead = num_threads + prefetch if num_threads else 0
    stream = batches.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead))
    the_layout = layout(records, batch_size=batch_size, seed=seed, limit=limit, labelled=labelled)
    return _GuardedDataset(stream, the_layout)


def to_device(dataset: grain.IterDataset, sharding: Any, *, prefetch: int = 2) -> grain.IterDataset:
    """Puts batches on the devices ahead of time, already sharded; the iterator still saves and resumes exactly.

    Args:
      dataset: what `train_dataset` returns.
      sharding: `jax.sharding.Sharding` whose first axis shards the batch, for every array alike.
      prefetch: batches kept ready on the devices.

    Returns:
      A dataset of batches of `jax.Array`s, global over all processes; `record_index` stays a NumPy array of this
      process's own rows: take it out of the batch before a jitted step.
    """
    placed = dataset.map(lambda batch: put_batch(batch, sharding))
    return PrefetchDataset(placed, prefetch)


def put_batch(batch: Batch, sharding: Any) -> Batch:
    """One NumPy batch on the devices (see `to_device`)."""
    import jax

    return {
        name: array if name == "record_index" else jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def chosen_indices(num_records: int, limit: int = 0) -> list[int]:
    """Which records are used: all, or `limit` of them spread evenly; in order, without repeats."""
    if not limit or limit >= num_records:
        return list(range(num_records))
    return [int(i) for i in (np.arange(limit) * num_records) // limit]


def eval_batches(
    records: Records,
    image_size: tuple[int, int],
    batch_size: int,
    limit: int = 0,
    *,
    start: int = 0,
    stop: int | None = None,
    num_threads: int = 2,
) -> Iterator[tuple[Batch, list[RigSample], list[int]]]:
    """Every record once, in order, without augmentation, for evaluation.

    All batches have the same shape; in the last one the rows beyond the end repeat a record, with `view_mask` False,
    no labels and record_index -1.

    Args:
      records: what to read.
      image_size: network input, (height, width) in pixels.
      batch_size: rigs per batch.
      limit: evaluate only this many, spread evenly over the records; 0 = all.
      start, stop: only these of them, as a slice.
      num_threads: batches decoded at the same time.

    Yields:
      (NumPy batch as `train_dataset` yields, labels of the sample's own sweep only; the real rows' `RigSample`s; their
      record indices). The two lists have one entry per real row, so they may be shorter than the batch.

    Raises:
      ConfigError: batch_size is not positive.
      DataError: a record is damaged; names the file and the record.
    """
    check_batch_size(batch_size, 1)
    size = (int(image_size[0]), int(image_size[1]))
    chosen = chosen_indices(len(records), limit)[start:stop]

    def load(start: int) -> tuple[Batch, list[RigSample], list[int]]:
        indices = chosen[start : start + batch_size]
        batch = transforms.empty_batch(batch_size, len(records.cameras), size)
        samples = [records[i] for i in indices]
        for row in range(batch_size):
            arrays = {name: array[row] for name, array in batch.items() if name != "record_index"}
            index = indices[row] if row < len(indices) else chosen[start]
            sample = samples[row] if row < len(indices) else records[index]
            transforms.load_rig(sample, arrays, where=records.where(index))
            batch["record_index"][row] = index
            if row >= len(indices):
                arrays["view_mask"][:] = False
                arrays["depth"][:] = 0
                batch["record_index"][row] = -1
        return batch, samples, indices

    starts = iter(range(0, len(chosen), batch_size))
    with concurrent.futures.ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="eval-batches") as pool:
        ahead = deque(pool.submit(load, start) for start in itertools.islice(starts, max(1, num_threads) + 1))
        try:
            while ahead:
                result = ahead.popleft().result()
                for start in itertools.islice(starts, 1):
                    ahead.append(pool.submit(load, start))
                yield result
        finally:  # the consumer stopped early: do not load what nobody will read
            for future in ahead:
                future.cancel()
