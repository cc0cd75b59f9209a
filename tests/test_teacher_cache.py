"""The teacher cache: written beside records, joined by record index, refused where it does not fit, loud if damaged."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsmde_jax import teacher_cache
from fsmde_jax.data import augment, pipeline, teacher_maps
from fsmde_jax.data.augment import NO_AUGMENT, AugmentOptions
from fsmde_jax.data.records import open_records
from fsmde_jax.data.teacher_maps import open_cache
from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.losses.teacher_bins import resize_rel_inv_depth
from fsmde_jax.models.student import normalise_images
from fsmde_jax.teacher import Card, Teacher, open_teacher
from fsmde_jax.teacher_signal import cached_maps, pool_tokens, run_teacher, teacher_distribution
from tests import random_teacher, sample_factory
from tests.toy_teacher import CHANNELS, ToyTeacher

SIZE, HEAD, TEACHER, COUNT = (32, 64), (16, 32), (28, 56), 5
FLIP = AugmentOptions(flip=1.0, scale=(1.0, 1.0), jitter_probability=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    samples = [
        sample_factory.make_rig(seed, cameras=3, native_size=(48, 96), num_points=60, masks=True).sample
        for seed in range(COUNT)
    ]
    samples[2].images[1] = b""  # a camera that is absent
    return sample_factory.write_folder(tmp_path_factory.mktemp("records") / "train", samples)


@pytest.fixture(scope="module")
def records(folder):
    return open_records(folder)


def make(records, out, teacher=None, *, tokens=True, batch_size=2, **options):
    teacher = teacher or ToyTeacher()
    defaults = {"image_size": SIZE, "longer_side": 56, "dtype": "float32"}
    manifest = teacher_cache.plan(teacher, records, tokens=tokens, **(defaults | options))
    return teacher_cache.write_cache(teacher, records, out, manifest, batch_size=batch_size)


@pytest.fixture(scope="module")
def cache_folder(records, tmp_path_factory):
    out = tmp_path_factory.mktemp("caches") / "toy"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "RECORDS_PER_SHARD", 2)
        assert make(records, out) == COUNT
    return out


def opened(cache_folder, records, **options):
    return open_cache(cache_folder, records, **({"image_size": SIZE} | options))


def batches(records, count=3, **options):
    defaults = {"image_size": SIZE, "batch_size": 2, "seed": 3, "augment": NO_AUGMENT}
    iterator = iter(pipeline.train_dataset(records, **(defaults | options)))
    result = [next(iterator) for _ in range(count)]
    iterator.close()
    return result


@jax.jit
def signals(params, batch):
    """Distributions and pooled tokens (on the fly, cached) of a batch."""
    fly = run_teacher(ToyTeacher().module(), params, normalise_images(batch["clean_images"]), size=TEACHER)
    kept = cached_maps(batch)
    options = {"kind": "soft_assign", "head_size": HEAD, "num_bins": 16, "tau_bin": 0.0}
    found = [teacher_distribution(m, batch["ego_mask"], view_mask=batch["view_mask"], **options) for m in (fly, kept)]
    p = [jax.nn.softmax(logits, -1) for logits, _, _ in found]
    tokens = pool_tokens(fly.tokens, teacher_cache.TOKEN_GRID)
    return p, [valid for _, valid, _ in found], [mask for _, _, mask in found], tokens


def device(batch):
    return {name: jnp.asarray(array) for name, array in batch.items() if name != "record_index"}


def test_the_hash_names_head_and_taps_besides_the_weights():
    cards = [Card("tiny", sha256="a" * 64), Card("tiny", sha256="b" * 64), Card("tiny", version=1, sha256="a" * 64)]
    cards.append(Card("tiny", max_depth=80.0, sha256="a" * 64))
    assert len({teacher_cache.weight_hash(Teacher({}, card)) for card in cards}) == 4
    assert teacher_cache.weight_hash(Teacher({"w": np.ones(2)}, Card("tiny"))) != teacher_cache.weight_hash(
        Teacher({"w": np.zeros(2)}, Card("tiny"))
    )


def test_the_folder_says_what_it_is(cache_folder, records):
    entries = json.loads((cache_folder / "teacher_cache.json").read_text())
    assert entries["records_fingerprint"] == records.fingerprint and entries["num_records"] == COUNT
    assert entries["sha256"] == teacher_cache.weight_hash(ToyTeacher())
    assert entries["image_size"] == [*SIZE] and entries["head_size"] == [*HEAD] and entries["tokens"] == [6, 10, 5]
    assert entries["teacher_size"] == [*TEACHER] and entries["teacher"]["dtype"] == "float32"
    assert [s["num_records"] for s in entries["shards"]] == [2, 2, 1]
    assert {p.name.split(".")[-1] for p in cache_folder.iterdir()} == {
        "json", "index", *(f"tfrecord-{k:05d}-of-00003" for k in range(3))
    }  # fmt: skip
    assert make(records, cache_folder) == 0  # whole already


@pytest.mark.parametrize("options", [NO_AUGMENT, FLIP], ids=["plain", "flip"])
def test_cached_and_on_the_fly_distributions_agree(cache_folder, records, options):
    """The toy is symmetric, so flipping its input flips its output: what is left is uint16 and rounding."""
    cache = opened(cache_folder, records, tokens=True)
    for batch in batches(records, augment=options, clean_images=True, teacher_cache=cache):
        assert batch["teacher_rel_inv_depth"].shape == (2, 3, *HEAD)
        assert batch["teacher_rel_inv_depth"].dtype == np.float32
        assert batch["teacher_tokens"].shape == (2, 3, 6, 10, CHANNELS) and batch["teacher_tokens"].dtype == np.float16
        (fly, kept), valid, masks, tokens = signals(ToyTeacher().params, device(batch))
        np.testing.assert_array_equal(valid[0], valid[1])
        np.testing.assert_array_equal(valid[0], batch["view_mask"])
        np.testing.assert_array_equal(masks[0], masks[1])
        assert np.abs(np.asarray(fly) - np.asarray(kept)).max() < 1e-3
        there = batch["view_mask"][:, :, None, None, None]
        np.testing.assert_allclose(batch["teacher_tokens"], np.where(there, tokens, 0), atol=3e-3)
    assert np.asarray(fly).max() > 0.2  # the distributions say something


def test_a_crop_of_the_cache_is_near_the_teacher_on_the_crop(records, tmp_path):
    """Approximate, even for a teacher that only looks at what is near: it saw the whole image at a coarser scale.

    Total variation of the distributions: mean below .1.
    """
    teacher = ToyTeacher(ramp=0.0)
    make(records, tmp_path / "c", teacher)
    cache = opened(tmp_path / "c", records)
    options = AugmentOptions(flip=0.5, scale=(1.2, 1.4), jitter_probability=0.0)
    distances, others = [], []
    for batch in batches(records, augment=options, clean_images=True, teacher_cache=cache):
        (fly, kept), _, (mask, _), _ = signals(teacher.params, device(batch))
        fly, kept, mask = np.asarray(fly), np.asarray(kept), np.asarray(mask)
        distances.append(0.5 * np.abs(fly - kept).sum(-1)[mask])
        others.append(0.5 * np.abs(fly[..., ::-1, :] - kept).sum(-1)[mask])
    distance = np.concatenate(distances)
    assert distance.mean() < 0.1, (distance.mean(), distance.max())
    assert np.concatenate(others).mean() > 3 * distance.mean()


def test_tokens_are_mirrored_by_columns_and_refuse_a_crop(cache_folder, records):
    cache = opened(cache_folder, records, tokens=True)
    plain, flipped = (batches(records, augment=o, teacher_cache=cache) for o in (NO_AUGMENT, FLIP))
    for a, b in zip(plain, flipped, strict=True):
        np.testing.assert_array_equal(a["record_index"], b["record_index"])
        np.testing.assert_array_equal(a["teacher_tokens"][:, :, :, ::-1], b["teacher_tokens"])
        np.testing.assert_array_equal(a["teacher_rel_inv_depth"][..., ::-1], b["teacher_rel_inv_depth"])
    with pytest.raises(ConfigError, match=r"augment.scale = \(1.0, 1.2\): cached teacher tokens allow no crop"):
        batches(records, augment=AugmentOptions(scale=(1.0, 1.2)), teacher_cache=cache)


def test_without_a_cache_nothing_changes_and_with_it_only_its_arrays_are_new(cache_folder, records):
    options = {"augment": AugmentOptions(jitter_probability=1.0), "dense_depth": False}
    plain = batches(records, **options)
    more = batches(records, clean_images=True, teacher_cache=opened(cache_folder, records), **options)
    for a, b in zip(plain, more, strict=True):
        assert set(b) - set(a) == {"clean_images", "teacher_rel_inv_depth"} and set(a) <= set(b)
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_clean_images_are_the_images_before_the_jitter(records):
    jittered = AugmentOptions(jitter_probability=0.5)
    calm = AugmentOptions(jitter_probability=0.0)
    changed = 0
    for a, b in zip(*(batches(records, 4, augment=o, clean_images=True) for o in (jittered, calm)), strict=True):
        np.testing.assert_array_equal(a["clean_images"], b["images"])
        np.testing.assert_array_equal(b["clean_images"], b["images"])
        changed += sum(not np.array_equal(x, y) for x, y in zip(a["clean_images"], a["images"], strict=True))
    drawn = [augment.draw(jittered, 3, np.random.default_rng([3, k])).colour is not None for k in range(8)]
    assert 0 < changed == sum(drawn) < 8


def test_cameras_are_taken_by_name(cache_folder, folder):
    some = open_records(folder, ("BACK_RIGHT", "FRONT"))
    cache = opened(cache_folder, some)
    whole = opened(cache_folder, open_records(folder))
    a, b = (c.maps(1, some[1].sample_id)["teacher_rel_inv_depth"] for c in (cache, whole))
    np.testing.assert_array_equal(a, b[[2, 0]])


def test_what_does_not_fit_is_refused_with_both_values(cache_folder, folder, records, tmp_path):
    other = open_records(sample_factory.make_folder(tmp_path / "other", 2, cameras=3, native_size=(48, 96)))
    without = tmp_path / "without"
    make(other, without, tokens=False)
    mine = teacher_cache.weight_hash(ToyTeacher())
    for action, error, message in (
        (lambda: opened(cache_folder, records, sha256="ab" * 32), ConfigError, f"weights {mine[:16]}.*are abababab"),
        (lambda: opened(cache_folder, records, image_size=(64, 96)), ConfigError, "images of 32x64, but.*64x96"),
        (lambda: opened(cache_folder, records, teacher_size=(14, 28)), ConfigError, "teacher at 28x56.*asks for 14x28"),
        (lambda: opened(cache_folder, other), DataError, "of 5 records with fingerprint.*holds 2 with"),
        (lambda: opened(without, other, tokens=True), ConfigError, "without: .*holds no tokens.*--tokens"),
        (lambda: opened(tmp_path / "none", records), DataError, "none: no such teacher cache"),
        (lambda: opened(folder, records), DataError, "no teacher_cache.json"),
    ):
        with pytest.raises(error, match=message):
            action()
    opened(cache_folder, records, sha256=mine, teacher_size=TEACHER, tokens=True).close()
    with pytest.raises(ConfigError, match="images of 32x64"):
        batches(records, image_size=(32, 32), teacher_cache=opened(cache_folder, records))
    with pytest.raises(DataError, match="of 5 records"):
        batches(other, teacher_cache=opened(cache_folder, records))
    with pytest.raises(ConfigError, match=r"holds another teacher cache: tokens is \[6, 10, 5\] there and None now"):
        make(records, cache_folder, tokens=False)
    with pytest.raises(ConfigError, match=r"sha256 is .* there and"):
        make(records, cache_folder, ToyTeacher(scale=2.0))
    with pytest.raises(ConfigError, match="no unfinished teacher cache"):
        make(records, folder)
    with pytest.raises(ConfigError, match=r"--image_size 30x64: .*multiples of 32"):
        make(records, tmp_path / "new", image_size=(30, 64))


def test_damaged_files_are_named(cache_folder, records, tmp_path):
    def broken(change):
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        shutil.copytree(cache_folder, tmp_path / "c")
        change(tmp_path / "c")
        return lambda: [opened(tmp_path / "c", records).maps(i, records[i].sample_id) for i in range(COUNT)]

    def manifest(**entries):
        def change(place):
            path = place / "teacher_cache.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | entries))

        return change

    def flip_byte(place):
        path = next(place.glob("*00001-of-00003"))
        data = bytearray(path.read_bytes())
        data[len(data) // 4] ^= 1
        path.write_bytes(data)

    def cut(place):
        path = next(place.glob("*00001-of-00003"))
        path.write_bytes(path.read_bytes()[:-10])

    def swapped(place):
        a, b = (next(place.glob(f"*0000{k}-of-00003")) for k in (0, 1))
        for one, other in ((a, b), (a.with_name(f"{a.name}.index"), b.with_name(f"{b.name}.index"))):
            content = one.read_bytes()
            one.write_bytes(other.read_bytes())
            other.write_bytes(content)

    for change, message in (
        (flip_byte, r"00001-of-00003, record 0: damaged data.*teacher cache: delete the folder"),
        (cut, "00001-of-00003: has .* bytes, but teacher_cache.json says"),
        (lambda place: next(place.glob("*00002-of-00003")).unlink(), "00002-of-00003: is missing"),
        (swapped, "holds sample .* here, but the records have"),
        (lambda place: (place / "teacher_cache.json").write_text("{"), r"teacher_cache.json: cannot be read as JSON"),
        (manifest(format_version=9), "format version 9, but this program reads version 1"),
        (manifest(head_size=[16, 16]), "not an entry of 3 cameras with maps of 16x16"),
        (manifest(image_size="big"), "image_size cannot be big"),
        (manifest(more=1), r"entries \['more'\] are missing or unknown"),
    ):
        with pytest.raises(DataError, match=message):
            broken(change)()


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(cache_folder, records, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache, "RECORDS_PER_SHARD", 2)
    out, entries = tmp_path / "c", teacher_cache._entries

    def until_killed(*args):
        for k, entry in enumerate(entries(*args)):
            if k == 3:
                raise KeyboardInterrupt
            yield entry

    with monkeypatch.context() as patch:
        patch.setattr(teacher_cache, "_entries", until_killed)
        with pytest.raises(KeyboardInterrupt):
            make(records, out)
    with pytest.raises(DataError, match=r"no teacher_cache.json.*run the same command again"):
        opened(out, records)
    with pytest.raises(ConfigError, match="teacher_size is"):
        make(records, out, longer_side=28)
    (out / "teacher_cache.tfrecord-00001-of-00003.tmp-1-1").write_bytes(b"half")
    assert make(records, out, batch_size=1) == 3  # two records were whole
    assert {p.name for p in out.iterdir()} == {p.name for p in cache_folder.iterdir()}
    for path in out.iterdir():
        assert path.read_bytes() == (cache_folder / path.name).read_bytes(), path.name


def test_a_teacher_that_fails_is_named_with_its_record(records, tmp_path):
    with pytest.raises(DataError, match=r"of-00002, record 0, sample 'sample-0': .*not finite"):
        make(records, tmp_path / "c", ToyTeacher(shift=float("nan")))
    assert not (tmp_path / "c" / teacher_maps.MANIFEST_NAME).exists()


def test_the_command_line_with_a_real_network(records, folder, tmp_path, capsys):
    random_teacher.write_pth(tmp_path / "tiny.pth", random_teacher.params())
    command = ["--teacher", str(tmp_path / "tiny.pth"), "--records", str(folder), "--image_size", "32x64",
               "--longer_side", "28", "--cameras", "FRONT", "--out", str(tmp_path / "c"), "--tokens"]  # fmt: skip
    teacher_cache.main(command)
    assert "teacher cache of 5 records; 5 records were run" in capsys.readouterr().out
    teacher_cache.main(command)
    assert "it was whole already" in capsys.readouterr().out
    teacher, front = open_teacher(tmp_path / "tiny.pth"), open_records(folder, ("FRONT",))
    cache = open_cache(tmp_path / "c", front, image_size=SIZE, sha256=teacher_cache.weight_hash(teacher), tokens=True)
    batch = batches(front, 1, batch_size=1, teacher_cache=cache)[0]
    maps = jax.jit(lambda p, x: run_teacher(teacher.module(), p, x, size=(14, 28)))(
        teacher.params, normalise_images(jnp.asarray(batch["images"]))
    )
    expected = np.asarray(resize_rel_inv_depth(maps.rel_inv_depth, *HEAD))
    assert np.ptp(expected) > 0
    np.testing.assert_allclose(batch["teacher_rel_inv_depth"], expected, atol=1e-4 * np.abs(expected).max())
    tokens = np.asarray(pool_tokens(maps.tokens, (6, 10)))
    np.testing.assert_allclose(batch["teacher_tokens"], tokens, atol=2e-3 * np.abs(tokens).max())
    for change, message in ((["--image_size", "32"], "expected HEIGHTxWIDTH"), (["--longer_side", "3"], "at least 14"),
                            (["--cameras", "FRUNT"], "did you mean 'FRONT'")):  # fmt: skip
        with pytest.raises(SystemExit):
            teacher_cache.main([*command, *change])
        assert message in capsys.readouterr().err


def test_records_are_not_touched(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    make(open_records(folder), tmp_path / "c")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
