"""Teachers as users handle them: a weight file is converted once, opened without torch, and predicts image folders."""

import json
import shutil
import subprocess
import sys

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsmde_jax import checkpoint, convert, predict
from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.models.depth_anything import DepthAnything
from fsmde_jax.models.student import normalise_images
from fsmde_jax.teacher import open_teacher
from tests import random_teacher


@pytest.fixture(scope="module")
def params():
    return random_teacher.params()


@pytest.fixture(scope="module")
def weight_file(params, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    random_teacher.write_pth(path, params)
    return path


@pytest.fixture(scope="module")
def folder(weight_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("teachers") / "tiny"
    convert.main(["--weights", str(weight_file), "--out", str(out)])
    return out


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(1)
    place = tmp_path / "images"
    (place / "CAM_FRONT").mkdir(parents=True)
    for name, size in (("a.png", (28, 42)), ("CAM_FRONT/b.png", (28, 42)), ("wide.jpg", (30, 61))):
        noise = rng.integers(0, 255, (*size, 3), np.uint8)
        cv2.imwrite(str(place / name), cv2.GaussianBlur(noise, (0, 0), 2))
    (place / "notes.txt").write_text("no image")
    return place


def run(place, teacher, out, *more):
    predict.main(["--teacher", str(teacher), "--images", str(place), "--out", str(out), "--size", "28", *more])


def test_a_converted_folder_holds_the_file_and_says_what_it_is(folder, params, weight_file):
    teacher = open_teacher(folder)
    assert jax.tree.all(jax.tree.map(np.array_equal, teacher.params, params))
    card = json.loads((folder / "card.json").read_text())
    assert card["variant"] == "tiny" and card["version"] == 2 and card["max_depth"] is None
    assert card["source"] == "tiny.pth" and len(card["sha256"]) == 64
    assert str(weight_file.parent) not in (folder / "card.json").read_text()
    assert open_teacher(weight_file).card == teacher.card


def test_training_with_a_converted_folder_needs_no_torch(folder):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from fsmde_jax.teacher import open_teacher\n"
        f"print(open_teacher({str(folder)!r}).card.variant)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "tiny"


def test_pictures_and_numbers_of_a_folder(folder, params, images, tmp_path, capsys):
    out = tmp_path / "out"
    run(images, folder, out, "--npy")
    assert "3 pictures" in capsys.readouterr().out
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert names == {f"{n}_depth.{s}" for n in ("a", "CAM_FRONT/b", "wide") for s in ("png", "npy")}
    picture, image = cv2.imread(str(out / "a_depth.png")), cv2.imread(str(images / "a.png"))
    assert picture.shape == (28, 84, 3)
    np.testing.assert_array_equal(picture[:, :42], image)
    # At the network's own size nothing is resized, so the numbers are the network's.
    network_input = normalise_images(jnp.asarray(image[None, ..., ::-1]))
    expected = jax.jit(DepthAnything("tiny").apply)({"params": params}, network_input)["rel_inv_depth"][0]
    got = np.load(out / "a_depth.npy")
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
    assert got.std() > 0
    red_minus_blue = picture[:, 42:, 2].astype(int) - picture[:, 42:, 0]
    near, far = got > np.percentile(got, 95), got <= np.percentile(got, 5)
    assert red_minus_blue[near].mean() > 60 and red_minus_blue[far].mean() < -60
    assert np.load(out / "wide_depth.npy").shape == (30, 61)


def test_metric_files_get_metres_and_a_bar(weight_file, images, tmp_path):
    run(images / "a.png", weight_file, tmp_path / "out", "--max_depth", "80", "--npy")
    depth = np.load(tmp_path / "out/a_depth.npy")
    assert depth.min() > 0 and depth.max() < 80
    assert cv2.imread(str(tmp_path / "out/a_depth.png")).shape == (28 + 40, 84, 3)


def test_contradictions_and_other_folders_are_refused(folder, weight_file, tmp_path, capsys):
    with pytest.raises(ConfigError, match="card says max_depth = None, not 80"):
        open_teacher(folder, max_depth=80.0)
    with pytest.raises(ConfigError, match="expected metres above 0"):
        open_teacher(weight_file, max_depth=-1.0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: not a converted teacher .*no card.json"):
        open_teacher(tmp_path / "empty")
    with pytest.raises(SystemExit):
        convert.main(["--weights", str(weight_file), "--out", str(folder)])
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        convert.main(["--weights", str(tmp_path / "none.pth"), "--out", str(tmp_path / "new")])
    assert "no such weight file" in capsys.readouterr().err
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".new*"))


def test_a_folder_with_another_card_or_damaged_arrays_is_refused(weight_file, tmp_path):
    convert.main(["--weights", str(weight_file), "--out", str(tmp_path / "t")])
    card = tmp_path / "t/card.json"
    whole = card.read_text()
    card.write_text(whole.replace('"tiny"', '"small"'))
    with pytest.raises(DataError, match="its parameters are not those of small"):
        open_teacher(tmp_path / "t")
    card.write_text(whole.replace('"tiny"', '"tini"'))
    with pytest.raises(DataError, match="did you mean 'tiny'"):
        open_teacher(tmp_path / "t")
    card.write_text(whole)
    params = open_teacher(tmp_path / "t").params
    *_, last = jax.tree.leaves(params)
    last.flat[-1] += 1  # numbers of another file under this card
    checkpoint.write_tree(tmp_path / "other", params, {})
    shutil.move(tmp_path / "t/model", tmp_path / "t/kept")
    shutil.copytree(tmp_path / "other/model", tmp_path / "t/model")
    with pytest.raises(DataError, match="not those that were written"):
        open_teacher(tmp_path / "t")
    shutil.rmtree(tmp_path / "t/model")
    shutil.move(tmp_path / "t/kept", tmp_path / "t/model")
    for file in (tmp_path / "t/model").rglob("*"):
        if file.is_file() and file.stat().st_size > 10_000:
            file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DataError, match="not a converted teacher"):
        open_teacher(tmp_path / "t")


def test_bad_images_are_named(folder, images, tmp_path, capsys):
    for make, message in (
        (lambda: (images / "b.png").write_bytes(b"no"), "b.png: not an image"),
        (lambda: ((images / "b.png").unlink(), (images / "a.jpg").write_bytes(b"")), "would both become a_depth.png"),
    ):
        make()
        with pytest.raises(SystemExit):
            run(images, folder, tmp_path / "out")
        assert message in capsys.readouterr().err
    for place, message in ((tmp_path / "nowhere", "no such file or folder"), (folder, "no images here")):
        with pytest.raises(SystemExit):
            run(place, folder, tmp_path / "out")
        assert message in capsys.readouterr().err
