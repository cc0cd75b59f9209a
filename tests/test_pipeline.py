"""Order, sharding, determinism and exact resume of the training stream; evaluation batches; loud failures."""

import itertools
import json

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fsmde_jax.data import augment, pipeline, tfrecord, transforms
from fsmde_jax.data.augment import AugmentOptions
from fsmde_jax.data.records import open_records
from fsmde_jax.errors import ConfigError, DataError, TrainingError
from tests import sample_factory

SIZE = (16, 32)
COUNT = 11
SHAPES = {
    "images": ((6, *SIZE, 3), np.uint8), "intrinsics": ((6, 3, 3), np.float32), "cam_to_ego": ((6, 4, 4), np.float32),
    "ego_to_global": ((6, 4, 4), np.float32), "depth": ((6, *SIZE), np.float32), "ego_mask": ((6, *SIZE), np.bool_),
    "view_mask": ((6,), np.bool_), "record_index": ((), np.int64),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline") / "train"
    return sample_factory.make_folder(path, COUNT, shards=3, native_size=(24, 48), num_points=80, masks=True)


@pytest.fixture(scope="module")
def records(folder):
    return open_records(folder)


def stream(records, **options):
    defaults = {"image_size": SIZE, "batch_size": 2, "seed": 1, "augment": AugmentOptions(jitter_probability=0.8)}
    return pipeline.train_dataset(records, **(defaults | options))


def take(dataset, count):
    iterator = iter(dataset)
    result = [next(iterator) for _ in range(count)]
    iterator.close()
    return result


def indices(dataset, batches):
    return np.concatenate([batch["record_index"] for batch in take(dataset, batches)]).tolist()


def assert_same_batch(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(np.asarray(a[name]), np.asarray(b[name]), err_msg=name)


def test_batches_follow_the_contract(records):
    batch = take(stream(records, batch_size=3), 1)[0]
    assert {name: (array.shape[1:], array.dtype) for name, array in batch.items()} == SHAPES
    assert all(len(array) == 3 for array in batch.values())
    assert batch["view_mask"].all() and (batch["depth"] > 0).any() and not batch["ego_mask"].all()


def test_a_row_is_its_record_with_the_choices_of_its_position(records):
    """What train_dataset promises about randomness, rebuilt from the seed and the place in the sequence."""
    options = AugmentOptions(jitter_probability=1.0)
    batches = take(stream(records, augment=options, seed=9), 7)
    for position, index in enumerate(np.concatenate([b["record_index"] for b in batches])):
        choice = augment.draw(options, 6, np.random.default_rng([9, position]))
        expected = {k: v[0] for k, v in transforms.empty_batch(1, 6, SIZE).items() if k != "record_index"}
        transforms.load_rig(records[int(index)], expected, choice=choice)
        row = {k: v[position % 2] for k, v in batches[position // 2].items() if k != "record_index"}
        assert_same_batch(row, expected)


def test_every_epoch_visits_every_record_once_in_another_order(records):
    seen = indices(stream(records, batch_size=3), 11)  # 33 = 3 epochs of 11; batches run across their ends
    epochs = [seen[k * COUNT : (k + 1) * COUNT] for k in range(3)]
    assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != epochs[2]
    assert epochs[0] != list(range(COUNT))
    assert indices(stream(records, batch_size=3, seed=2), 11) != seen


def test_augmentation_differs_between_epochs(records):
    batches = take(stream(records, batch_size=1), 2 * COUNT)
    halves = (batches[:COUNT], batches[COUNT:])
    first, second = ({int(b["record_index"][0]): b["intrinsics"] for b in half} for half in halves)
    assert all(not np.array_equal(first[i], second[i]) for i in range(COUNT))


@pytest.mark.parametrize("threads", [0, 2, 4])
def test_any_number_of_threads_gives_the_same_batches(records, threads):
    expected = take(stream(records, num_threads=1), 9)
    for a, b in zip(take(stream(records, num_threads=threads), 9), expected, strict=True):
        assert_same_batch(a, b)


def test_batch_size_does_not_change_what_happens_to_a_record(records):
    ones, threes = take(stream(records, batch_size=1), 9), take(stream(records, batch_size=3), 3)
    for position, one in enumerate(ones):
        row = {k: v[position % 3] for k, v in threes[position // 3].items()}
        assert_same_batch({k: v[0] for k, v in one.items()}, row)


@pytest.mark.parametrize("hosts", [2, 3, 4])
def test_hosts_share_every_epoch_without_overlap_and_match_a_single_host(records, hosts):
    batch_size = 2 * hosts
    steps = 2 * COUNT // 2  # 2 epochs x hosts
    alone = take(stream(records, batch_size=batch_size), steps)
    shared = {"batch_size": batch_size, "process_count": hosts}
    parts = [take(stream(records, process_index=k, **shared), steps) for k in range(hosts)]
    dealt = np.concatenate([np.concatenate([parts[k][s]["record_index"] for k in range(hosts)]) for s in range(steps)])
    sequence = np.concatenate([b["record_index"] for b in alone])
    for step in range(steps):
        for k in range(hosts):
            assert parts[k][step]["record_index"].tolist() == alone[step]["record_index"][k::hosts].tolist()
            np.testing.assert_array_equal(parts[k][step]["images"], alone[step]["images"][k::hosts])
    assert sorted(dealt) == sorted(sequence)
    for epoch in range(2):
        assert sorted(sequence[epoch * COUNT : (epoch + 1) * COUNT]) == list(range(COUNT))


def test_fewer_records_than_a_batch(records, tmp_path):
    single = open_records(sample_factory.make_folder(tmp_path / "one", 1, shards=1, native_size=(24, 48)))
    assert indices(stream(single, batch_size=4), 2) == [0] * 8
    assert sorted(indices(stream(records, batch_size=2 * COUNT), 1)) == sorted(list(range(COUNT)) * 2)


@pytest.mark.parametrize("where", [0, 1, 5, 6, 13])
@pytest.mark.parametrize("on_device", [False, True])
def test_resume_is_exact(records, where, on_device):
    def begin(threads):
        dataset = stream(records, num_threads=threads)
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return iter(pipeline.to_device(dataset, sharding) if on_device else dataset)

    whole = begin(2)
    for _ in range(where):
        next(whole)
    state = json.loads(json.dumps(whole.get_state()))  # what a checkpoint keeps
    expected = [next(whole) for _ in range(4)]
    resumed = begin(1)  # another number of threads is fine
    next(resumed)
    resumed.set_state(state)
    for batch in expected:
        assert_same_batch(next(resumed), batch)
    whole.set_state(state)  # and back again on the same iterator
    assert_same_batch(next(whole), expected[0])
    whole.close()
    resumed.close()


def test_resume_through_an_orbax_checkpoint(records, tmp_path):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    iterator = iter(pipeline.to_device(stream(records), sharding))
    for _ in range(4):
        next(iterator)
    with ocp.CheckpointManager(tmp_path / "ckpt") as manager:
        manager.save(4, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
        manager.wait_until_finished()
        expected = next(iterator)
        iterator.close()
        fresh = iter(pipeline.to_device(stream(records), sharding))
        manager.restore(4, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
        assert_same_batch(next(fresh), expected)
        fresh.close()
        other = iter(pipeline.to_device(stream(records, batch_size=3), sharding))
        with pytest.raises(TrainingError, match="batch_size: 2 when saved, 3 now"):
            manager.restore(4, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(other)))
        other.close()


def test_a_position_of_one_process_is_gone_on_from_by_two(records):
    alone = iter(stream(records, batch_size=4))
    for _ in range(3):
        next(alone)
    state = alone.get_state()
    following = [next(alone)["record_index"] for _ in range(4)]
    for process in (0, 1):
        part = iter(stream(records, batch_size=4, process_index=process, process_count=2))
        part.set_state(state)
        for whole in following:
            np.testing.assert_array_equal(next(part)["record_index"], whole[process::2])
        assert part.get_state() == alone.get_state()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 4}, "batch_size: 2 when saved, 4 now"),
        ({"seed": 2}, "seed: 1 when saved, 2 now"),
        ({"cameras": ("FRONT", "BACK")}, "cameras: "),
        ({"records": True}, "num_records: 11 when saved, 3 now"),
    ],
)
def test_a_state_of_another_layout_is_refused(folder, records, tmp_path, change, words):
    iterator = iter(stream(records))
    next(iterator)
    state = iterator.get_state()
    if "cameras" in change:
        other = stream(open_records(folder, cameras=change["cameras"]))
    elif "records" in change:
        other = stream(open_records(sample_factory.make_folder(tmp_path / "o", 3, native_size=(24, 48))))
    else:
        other = stream(records, **change)
    with pytest.raises(TrainingError, match=f"another layout(.|\n)*{words}"):
        iter(other).set_state(state)
    with pytest.raises(TrainingError, match="another layout"):
        iter(stream(records)).set_state({"next_index": 3})  # a state that names no layout


def test_batches_on_the_devices(records):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    iterator = iter(pipeline.to_device(stream(records), sharding))
    for expected in take(stream(records), 3):
        batch = next(iterator)
        for name, array in batch.items():
            if name == "record_index":
                assert isinstance(array, np.ndarray) and array.dtype == np.int64
            else:
                assert isinstance(array, jax.Array) and array.sharding.is_equivalent_to(sharding, array.ndim)
        assert_same_batch(batch, expected)
    iterator.close()
    iterator.close()


def test_rig_of_three_cameras_and_a_subset(folder, tmp_path):
    three = open_records(sample_factory.make_folder(tmp_path / "three", 2, cameras=3, native_size=(24, 48)))
    assert take(stream(three), 1)[0]["images"].shape == (2, 3, *SIZE, 3)
    part = open_records(folder, cameras=("BACK", "FRONT"))
    plain = {"augment": augment.NO_AUGMENT, "batch_size": 1}
    for a, b in zip(take(stream(part, **plain), 3), take(stream(open_records(folder), **plain), 3), strict=True):
        assert a["record_index"] == b["record_index"]
        np.testing.assert_array_equal(a["images"], b["images"][:, [3, 0]])
        np.testing.assert_array_equal(a["depth"], b["depth"][:, [3, 0]])


def test_damaged_record_stops_the_stream_and_names_itself(folder, tmp_path):
    target = tmp_path / "damaged"
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    shard = sorted(target.glob("*-of-00003"))[1]
    data = bytearray(shard.read_bytes())
    data[tfrecord.load_index(shard)[2].item() + 300] ^= 1
    shard.write_bytes(bytes(data))
    damaged = open_records(target)
    with pytest.raises(DataError, match=r"00001-of-00003, record 2: damaged data \(CRC mismatch\)"):
        take(stream(damaged), COUNT)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with pytest.raises(DataError, match="00001-of-00003, record 2"):
        take(pipeline.to_device(stream(damaged), sharding), COUNT)
    with pytest.raises(DataError, match="00001-of-00003, record 2"):
        list(pipeline.eval_batches(damaged, SIZE, 2))


def test_broken_image_inside_a_whole_record_names_record_and_camera(tmp_path):
    rig = sample_factory.make_rig(0, native_size=(24, 48), image_format=".jpg").sample
    rig.images[2] = rig.images[2][:-40]
    broken = open_records(sample_factory.write_folder(tmp_path / "broken", [rig], shards=1))
    with pytest.raises(DataError, match=r"00000-of-00001, record 0, camera BACK_LEFT: the image .* is truncated"):
        take(stream(broken), 1)


@pytest.mark.parametrize(
    ("batch_size", "limit", "sizes"), [(4, 0, [4, 4, 3]), (11, 0, [11]), (3, 7, [3, 3, 1]), (20, 0, [11])]
)
def test_evaluation_visits_every_record_once_in_order(records, batch_size, limit, sizes):
    batches = list(pipeline.eval_batches(records, SIZE, batch_size, limit))
    assert [len(chosen) for _, _, chosen in batches] == sizes
    chosen = [i for _, _, part in batches for i in part]
    assert chosen == sorted(set(chosen)) and len(chosen) == (limit or COUNT)
    if not limit:
        assert chosen == list(range(COUNT))
    for batch, samples, part in batches:
        assert batch["images"].shape == (batch_size, 6, *SIZE, 3)
        assert [s.sample_id for s in samples] == [f"sample-{i}" for i in part]
        assert batch["record_index"].tolist() == part + [-1] * (batch_size - len(part))
        assert batch["view_mask"][: len(part)].all() and not batch["view_mask"][len(part) :].any()
        assert not batch["depth"][len(part) :].any()
        for row, index in enumerate(part):
            expected = {k: v[0] for k, v in transforms.empty_batch(1, 6, SIZE).items() if k != "record_index"}
            transforms.load_rig(records[index], expected)
            assert_same_batch({k: v[row] for k, v in batch.items() if k != "record_index"}, expected)


def test_a_limit_is_spread_over_the_records():
    assert pipeline.chosen_indices(10, 0) == pipeline.chosen_indices(10, 99) == list(range(10))
    assert pipeline.chosen_indices(10, 4) == [0, 2, 5, 7]


def test_evaluation_of_a_slice_and_of_the_rest_is_of_every_record_once(records):
    parts = [list(pipeline.eval_batches(records, SIZE, 2, start=a, stop=b)) for a, b in ((0, 5), (5, None))]
    assert [i for part in parts for _, _, chosen in part for i in chosen] == list(range(COUNT))
    assert len(parts[0]) == 3 and parts[0][-1][0]["record_index"].tolist() == [4, -1]
    assert list(pipeline.eval_batches(records, SIZE, 2, start=COUNT, stop=COUNT + 4)) == []


def test_evaluation_may_be_left_early(records):
    first = next(iter(pipeline.eval_batches(records, SIZE, 1, num_threads=3)))
    assert first[2] == [0]
    assert len(list(itertools.islice(pipeline.eval_batches(records, SIZE, 2), 2))) == 2


def test_batch_size_must_divide():
    for batch_size, devices in ((8, 4), (1, 1), (6, 3)):
        pipeline.check_batch_size(batch_size, devices)
    with pytest.raises(ConfigError, match=r"data\.batch_size = 6 .*4 devices.*4 or 8"):
        pipeline.check_batch_size(6, 4)
    with pytest.raises(ConfigError, match=r"data\.batch_size = 2 .*8 devices.*e\.g\. 8$"):
        pipeline.check_batch_size(2, 8)
    with pytest.raises(ConfigError, match=r"data\.batch_size = 0"):
        pipeline.check_batch_size(0, 1)


def test_arguments_that_cannot_be_used(records):
    for wrong, words in (
        ({"process_count": 3}, "divisible"),
        ({"process_index": 2, "process_count": 2}, "process_index 2 of 2"),
        ({"seed": -1}, "seed = -1"),
        ({"image_size": (0, 32)}, "data.image_size"),
    ):
        with pytest.raises(ConfigError, match=words):
            stream(records, **wrong)


def test_fewer_labels_are_the_same_in_every_epoch_and_nested(records):
    options = {"image_size": SIZE, "batch_size": 1, "seed": 3, "num_threads": 0}

    def labels(fraction, epochs=1):
        stream = iter(pipeline.train_dataset(records, label_fraction=fraction, **options))
        found: dict = {}
        for _ in range(epochs * len(records)):
            batch = next(stream)
            found.setdefault(int(batch["record_index"][0]), []).append(batch["depth"][0] > 0)
        return found

    whole, half, tenth = labels(1.0), labels(0.5, epochs=2), labels(0.1)
    for index, masks in half.items():
        assert len(masks) == 2 and (masks[0] == masks[1]).all()
        assert not (masks[0] & ~whole[index][0]).any() and not (tenth[index][0] & ~masks[0]).any()
    counts = [sum(int(m[0].sum()) for m in found.values()) for found in (whole, half, tenth)]
    assert 0.35 * counts[0] < counts[1] < 0.75 * counts[0] and 0 < counts[2] < 0.3 * counts[0]
    for wrong in (0.0, 1.5):
        with pytest.raises(ConfigError, match=r"data.label_fraction"):
            pipeline.train_dataset(records, label_fraction=wrong, **options)


def test_training_on_some_of_the_records(records):
    stream = iter(pipeline.train_dataset(records, limit=2, image_size=SIZE, batch_size=1, seed=3, num_threads=0))
    seen = [int(next(stream)["record_index"][0]) for _ in range(6)]
    assert set(seen) == set(pipeline.chosen_indices(len(records), 2)) and len(set(seen)) == 2
    assert pipeline.layout(records, batch_size=1, seed=3, limit=2)["num_records"] == 2
    with pytest.raises(ConfigError, match=r"data.train_samples = 99: there are"):
        pipeline.train_dataset(records, limit=99, image_size=SIZE, batch_size=1, seed=3)


def test_labels_for_some_samples_only_and_every_second_rig_is_one_of_them(records):
    options = {"image_size": SIZE, "batch_size": 1, "seed": 3, "num_threads": 0}
    chosen = set(pipeline.chosen_indices(len(records), 2))
    batches = take(pipeline.train_dataset(records, labelled=2, **options), 4 * len(records))
    seen = [int(batch["record_index"][0]) for batch in batches]
    assert [index in chosen for index in seen] == [True, False] * (2 * len(records))
    assert set(seen) == set(range(len(records)))  # the others come in turn, each as often
    others = [seen.count(index) for index in range(len(records)) if index not in chosen]
    assert max(others) - min(others) <= 1
    for index, batch in zip(seen, batches, strict=True):
        assert (batch["depth"] > 0).any() == (index in chosen)
        assert batch["images"].any()
    # Hosts share this order as any other, a position can be resumed, and the layout knows how many have labels.
    hosts = [
        pipeline.train_dataset(records, labelled=2, process_index=i, process_count=2, **options | {"batch_size": 2})
        for i in range(2)
    ]
    dealt = [int(b["record_index"][0]) for pair in zip(*(take(host, 5) for host in hosts), strict=True) for b in pair]
    assert dealt == seen[:10]
    iterator = iter(pipeline.train_dataset(records, labelled=2, **options))
    for _ in range(3):
        next(iterator)
    resumed = iter(pipeline.train_dataset(records, labelled=2, **options))
    resumed.set_state(iterator.get_state())
    assert_same_batch(next(resumed), batches[3])
    with pytest.raises(TrainingError, match="labelled: 2 when saved, None now"):
        iter(pipeline.train_dataset(records, **options)).set_state(iterator.get_state())
    with pytest.raises(ConfigError, match=r"data.labelled_samples = 99: there are"):
        pipeline.train_dataset(records, labelled=99, **options)
    without_teacher = pipeline.train_dataset(records, labelled=2, unlabelled=False, **options)
    assert set(indices(without_teacher, 6)) == chosen
    all_of_them = pipeline.train_dataset(records, labelled=len(records), **options)
    assert [int(b["record_index"][0]) for b in take(all_of_them, 5)] == indices(
        pipeline.train_dataset(records, **options), 5
    )
