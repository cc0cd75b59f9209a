"""A student's files for use elsewhere, against the student itself."""

import errno
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import onnx
import pytest

from fsmde_jax import checkpoint, depth_model, export, identity
from fsmde_jax.data import tfrecord
from fsmde_jax.errors import ConfigError, DataError, TrainingError
from fsmde_jax.models.registry import build_student
from fsmde_jax.names import parse_size
from fsmde_jax.students import read_student
from tests.exported import SIZE, compare, inputs, outputs_of, perturbed_tree, shapes_of


def test_the_shipped_student_exported(tmp_path, capsys):
    out = tmp_path / "deep" / "lite0.onnx"
    export.main(["--checkpoint", "lite0", "--out", str(out), "--image_size", "64x96"])
    text = capsys.readouterr().out
    assert "views of 64x96" in text and "note: trained at 96x160" in text
    assert sorted(path.name for path in out.parent.iterdir()) == ["lite0.json", "lite0.onnx"]
    tree, meta, _ = read_student("lite0")
    fields = meta["identity"]["config"]["model"]
    model = build_student(**fields)
    compare(model, tree, str(out), dict(zip(("images", "intrinsics"), inputs(6), strict=True)))
    said = {entry.key: entry.value for entry in onnx.load(out).metadata_props}
    assert json.loads(said["image_size"]) == [64, 96] and json.loads(said["trained_image_size"]) == [96, 160]
    assert json.loads(said["depth_range_m"]) == [fields["min_depth"], fields["max_depth"]]
    assert json.loads(said["focal_range_px"]) == [focal * 96 / 640 for focal in fields["focal_range"]]
    assert "step" in said["source"] and said["trained_dtype"] == "float32" and said["precision"] == "float32"
    card = json.loads(out.with_suffix(".json").read_text())
    assert {key: card[key] for key in said if key != "source"} == {
        key: json.loads(value) if value[0] in "[{" else value for key, value in said.items() if key != "source"
    }
    assert card["images"]["order"] == "RGB" and "inside the file" in card["images"]["normalised"]
    assert "intrinsics" in card["rig"] and card["evaluations"][0]["metric"]["abs_rel"] > 0
    assert "cam_to_ego" not in card["rig"] and "one rig" not in card["rig"]  # every view is on its own
    assert card["inputs"] == [
        {"name": "images", "dtype": "uint8", "shape": ["views", 64, 96, 3]},
        {"name": "intrinsics", "dtype": "float32", "shape": ["views", 3, 3]},
    ]
    assert card["outputs"] == [{"name": "depth", "dtype": "float32", "shape": ["views", 64, 96]}]
    assert card["licence"][0] == "code: Apache-2.0" and build_student(**card["model"]).dtype == np.float32
    with pytest.raises(ConfigError, match="exists already"):
        export.export_onnx("lite0", out)
    out.unlink()
    with pytest.raises(ConfigError, match=r"lite0\.onnx: its card would be .*lite0\.json, which exists already"):
        export.export_onnx("lite0", out)


def test_the_card_names_whose_terms_parameters_may_be_under():
    _, meta, _ = read_student("lite0")
    notes = identity.licence_notes(meta["identity"])
    assert notes[1].startswith("trained on world rendered, nuScenes v1.0-trainval format, seed 5 train: rendered")
    assert "ImageNet" in notes[2] and notes[-1].startswith("parameters may inherit the terms")
    config = {
        "data": {"train_records": "records/mine"}, "teacher": {"weights": "teachers/base"},
        "train": {"encoder_weights": "r18.pth"},
    }  # fmt: skip
    known = {
        "config": config, "init_from": "",
        "records": {"train": [{"dataset": "nuscenes", "source_version": "v1.0-trainval", "split": "train"}]},
        "teacher": {"variant": "base", "source": "depth_anything_v2_vitb.pth"},
    }  # fmt: skip
    said = "\n".join(identity.licence_notes(known))
    assert "trained on nuscenes v1.0-trainval train: CC BY-NC-SA 4.0 and nuScenes' own terms" in said
    assert "taught by base of depth_anything_v2_vitb.pth: Depth Anything's weights of that size are CC-BY-NC" in said
    assert "its encoder began as r18.pth: terms not known here" in said and "ImageNet" not in said
    older = identity.licence_notes({"config": {**config, "train": {}}})
    assert older[1] == "trained on records/mine: terms not known here; ask who made it" and len(older) == 3
    config["teacher"]["weights"] = "lite0"
    student = {"variant": "efficientnet_lite0", "source": "student_world (step 1500)"}
    assert "ships with this project, Apache-2.0" in identity.licence_notes({"config": config, "teacher": student})[2]


def test_bad_flags_leave_nothing_behind(tmp_path, monkeypatch):
    for where, name, size, error, message in (
        ("lite0", "a.pt", "", ConfigError, "ends in .onnx"),
        ("lite0", "a.onnx", "big", ConfigError, "--image_size big: expected HEIGHTxWIDTH"),
        ("lite0", "a.onnx", "60x96", ConfigError, "--image_size 60x96: .* multiples of 32"),
        ("lite0", "a" * 300 + ".onnx", "", ConfigError, "cannot be used"),
        ("nobody", "a.onnx", "", DataError, "nobody: no student here"),
    ):
        with pytest.raises(error, match=message):
            export.export_onnx(where, tmp_path / name, size)
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed: onnx"):
        export.export_onnx("lite0", tmp_path / "a.onnx")
    assert not list(tmp_path.iterdir())


def test_sizes():
    assert parse_size("352x640") == (352, 640) and parse_size("64x96", multiple=32) == (64, 96)
    for text in ("352", "352x", "0x64", "3.2x64", "-32x64", " 32x64"):
        with pytest.raises(ConfigError, match=rf"^--size {text}: expected HEIGHTxWIDTH, e\.g\. 352x640$"):
            parse_size(text, "--size")
    with pytest.raises(ConfigError, match=r"^--image_size 64x90: expected HEIGHTxWIDTH, multiples of 32, e\.g\. 352"):
        parse_size("64x90", multiple=32)


def test_the_card_of_a_student_that_mixes_views_and_still_trains(tmp_path, monkeypatch):
    """It is read once: a moment later there may be another checkpoint."""
    _, meta, said = read_student("lite0")
    config = meta["identity"]["config"]
    config["model"] |= {"cross_view_blocks": 1, "encoder": "resnet18"}
    tree = perturbed_tree(shapes_of(build_student(**config["model"])))
    reads = []
    monkeypatch.setattr(export, "read_student", lambda where: reads.append(where) or (tree, meta, said))
    card = export.export_onnx("x", tmp_path / "a.onnx", "64x96", confidence=True)
    assert reads == ["x"] and card == json.loads((tmp_path / "a.json").read_text())
    assert [(each["name"], each["shape"]) for each in card["inputs"]] == [
        ("images", ["views", 64, 96, 3]), ("intrinsics", ["views", 3, 3]), ("cam_to_ego", ["views", 4, 4]),
    ]  # fmt: skip
    assert [each["name"] for each in card["outputs"]] == ["depth", "confidence"]
    assert "cam_to_ego [4, 4], camera x right" in card["rig"] and "all views of one call are one rig" in card["rig"]


def test_a_teachers_run_is_refused_and_another_dtype_said(tmp_path, monkeypatch, capsys):
    tree, meta, said = read_student("lite0")
    config = meta["identity"]["config"]
    as_bfloat16 = {**meta, "identity": {"config": {**config, "model": {**config["model"], "dtype": "bfloat16"}}}}
    monkeypatch.setattr(export, "read_student", lambda where: (tree, as_bfloat16, said))
    export.main(["--checkpoint", "x", "--out", str(tmp_path / "a.onnx")])
    assert "trained in bfloat16; the file computes in float32" in capsys.readouterr().out
    export.main(["--checkpoint", "x", "--format", "orbax", "--out", str(tmp_path / "a")])
    assert "trained in bfloat16; the file computes in float32" in capsys.readouterr().out
    card = json.loads((tmp_path / "a" / "card.json").read_text())
    assert card["trained_dtype"] == "bfloat16" and build_student(**card["model"]).dtype == np.float32
    as_teacher = {**meta, "identity": {"config": {**config, "task": "teacher"}}}
    monkeypatch.setattr(export, "read_student", lambda where: (tree, as_teacher, said))
    with pytest.raises(ConfigError, match="trains a teacher"):
        export.export_onnx("x", tmp_path / "b.onnx")


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        export.export_onnx("lite0", tmp_path / "file" / "a.onnx")
    with pytest.raises(TrainingError, match="cannot write") as error:
        export.export_orbax("lite0", tmp_path / "file" / "a")
    assert "choose another place" in str(error.value) and "resumes" not in str(error.value)


def test_a_full_disk_leaves_nothing_that_forbids_the_same_command(tmp_path, monkeypatch):
    def full(descriptor):  # the card, which is written first, fits
        if os.fstat(descriptor).st_size > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    program = SimpleNamespace(serialize=lambda: bytes(200_000))
    monkeypatch.setattr(jax.export, "export", lambda *args, **options: lambda *shapes: program)
    with monkeypatch.context() as patch:
        patch.setattr(tfrecord.os, "fsync", full)
        with pytest.raises(DataError, match=r"a\.stablehlo: cannot write \(No space left on device\)"):
            export.export_stablehlo("lite0", tmp_path / "a.stablehlo")
    assert list(tmp_path.iterdir()) == []
    export.export_stablehlo("lite0", tmp_path / "a.stablehlo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.stablehlo"]
    with monkeypatch.context() as patch:
        patch.setattr(tfrecord.os, "fsync", full)
        with pytest.raises(DataError, match=r"b\.onnx: cannot write \(No space left on device\)"):
            export.export_onnx("lite0", tmp_path / "b.onnx", "32x64")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.stablehlo"]


def test_a_full_disk_leaves_no_part_of_an_orbax_folder(tmp_path, monkeypatch):
    def full(path, value):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "dump_json", full)
    with pytest.raises(TrainingError, match=r"a: cannot write \(.*No space left on device\)"):
        export.export_orbax("lite0", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_stablehlo_program_runs_without_the_model_code(tmp_path):
    """In a process in which this package cannot be imported, with other numbers of rigs and cameras than one."""
    card = export.export_stablehlo("lite0", tmp_path / "lite0.stablehlo", "32x64")
    assert json.loads((tmp_path / "lite0.json").read_text()) == card
    assert card["platforms"] == ["cpu", "cuda", "tpu"] and card["image_size"] == [32, 64]
    assert card["evaluations"][0]["metric"]["abs_rel"] > 0 and "Apache-2.0" in card["licence"][0]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 3, 32, 64, 3), np.uint8)
    intrinsics = np.tile(np.array([[50, 0, 31.5], [0, 50, 15.5], [0, 0, 1]], np.float32), (2, 3, 1, 1))
    np.savez(tmp_path / "in.npz", images=images, intrinsics=intrinsics)
    script = (
        "import sys; sys.modules['fsmde_jax'] = None\n"
        "import jax, numpy as np\n"
        "given = np.load('in.npz'); poses = np.tile(np.eye(4, dtype=np.float32), (2, 3, 1, 1))\n"
        "program = jax.export.deserialize(open('lite0.stablehlo', 'rb').read())\n"
        "found = program.call(given['images'], given['intrinsics'], poses)\n"
        "one = program.call(given['images'][:1, :1], given['intrinsics'][:1, :1], poses[:1, :1])\n"
        "np.savez('out.npz', one=one['depth'], **found)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    found = np.load(tmp_path / "out.npz")
    model = depth_model.load_model("lite0", image_size=(32, 64))
    for rig in range(2):
        wanted = model(images[rig], intrinsics[rig])
        np.testing.assert_allclose(found["depth"][rig], wanted.depth, rtol=1e-4)
        np.testing.assert_allclose(found["confidence"][rig], wanted.confidence, atol=1e-4)
    np.testing.assert_allclose(found["one"][0, 0], found["depth"][0, 0], rtol=1e-4)


def test_an_orbax_folder_reloads_with_orbax_and_the_models_alone(tmp_path):
    import orbax.checkpoint as ocp

    export.export_orbax("lite0", tmp_path / "lite0")
    card = json.loads((tmp_path / "lite0" / "card.json").read_text())
    with ocp.StandardCheckpointer() as checkpointer:
        variables = checkpointer.restore((tmp_path / "lite0" / "model").resolve())
    tree, _, _ = read_student("lite0")
    jax.tree.map(np.testing.assert_array_equal, variables, tree)
    model = build_student(**card["model"])
    images, intrinsics = inputs(2)
    found = outputs_of(model, variables, images, intrinsics)["pred_depth"][0]
    wanted = depth_model.load_model("lite0", image_size=SIZE)(images, intrinsics).depth
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    shapes = jax.tree.map(lambda leaf: leaf.shape, shapes_of(model))
    assert jax.tree.map(lambda leaf: leaf.shape, variables) == shapes and card["images"]["order"] == "RGB"
    assert "cam_to_ego [4, 4], camera x right" in card["rig"]  # the models take it, used or not
    with pytest.raises(ConfigError, match=r"lite0: exists already"):
        export.export_orbax("lite0", tmp_path / "lite0")


def test_an_orbax_folder_without_batchnorm(tmp_path):
    """The same depth from parameters alone; they cannot be trained on, and nothing is left of scales and statistics."""
    import orbax.checkpoint as ocp

    out = tmp_path / "lite0"
    export.main(["--checkpoint", "lite0", "--format", "orbax", "--fold_batchnorm", "--out", str(out)])
    with ocp.StandardCheckpointer() as checkpointer:
        variables = checkpointer.restore((out / "model").resolve())
    card = json.loads((out / "card.json").read_text())
    assert list(variables) == ["params"] and card["batch_norm"] == "folded"
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables)]
    assert not [name for name in names if "scale" in name] and all(
        leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables)
    )
    model = build_student(**card["model"])
    images, intrinsics = inputs(2)
    found = outputs_of(model, {**variables, "batch_stats": {}}, images, intrinsics)["pred_depth"][0]
    wanted = depth_model.load_model("lite0", image_size=SIZE)(images, intrinsics).depth
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    with pytest.raises(ConfigError, match="BatchNorm is folded cannot be trained"):
        model.apply(variables, np.zeros((1, 1, *SIZE, 3)), intrinsics[None, :1], train=True, mutable=["batch_stats"])


def test_formats_by_the_command_line(tmp_path, capsys):
    for name, out in (("stablehlo", "a.stablehlo"), ("orbax", "a")):
        export.main(["--checkpoint", "lite0", "--format", name, "--out", str(tmp_path / out), "--image_size", "32x64"])
        assert "any number of views of 32x64" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        export.main(["--checkpoint", "lite0", "--format", "stablehlo", "--out", str(tmp_path / "b.onnx")])
    assert "ends in .stablehlo" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        export.main(["--checkpoint", "lite0", "--fold_batchnorm", "--out", str(tmp_path / "b.onnx")])
    assert "--fold_batchnorm: of --format orbax only, not onnx" in capsys.readouterr().err
