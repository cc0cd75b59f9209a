"""The report of a run: one file with everything in it, also as a browser shows it."""

import base64
import dataclasses
import json
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest

from fsmde_jax import report
from fsmde_jax.errors import ConfigError
from fsmde_jax.evaluate import evaluate_run
from fsmde_jax.metrics import NAMES
from fsmde_jax.train import train
from fsmde_jax.viz import report_page
from fsmde_jax.viz.pointcloud import Cloud
from tests import rooms
from tests.sample_factory import write_folder
from tests.test_train import make_config
from tests.toy_encoder import toy_encoder


@pytest.fixture(autouse=True, scope="module")
def toys():
    """An encoder that compiles at once."""
    with toy_encoder():
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    records = write_folder(folder / "rooms", [rooms.make(seed, cameras=3, native_size=(48, 80)) for seed in range(3)])
    config = make_config(
        records, **{"train.steps": 2, "train.eval_every": 1, "eval.num_pictures": 1, "eval.trivial": True}
    )
    train(config, folder / "run")
    evaluate_run(config, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report.html"
    report.main(["--workdir", str(run), "--out", str(out)])
    return out


def test_everything_is_in_the_one_file(made, run):
    text = made.read_text()
    for name in ("Evaluation", "Point cloud", "Pictures", "Curves", "What it was", "Config"):
        assert f"<h2>{name}</h2>" in text
    table = json.loads(next((run / "evaluation").glob("*.json")).read_text())
    assert f"<td>{table['table']['metric']['all']['abs_rel']:.4f}</td>" in text and "trivial: row median" in text
    identity = json.loads((run / "identity.json").read_text())
    assert identity["commit"] in text and "resnet18" in text
    assert [each["dataset"] for each in identity["records"]["train"]] == ["test"]
    for curve in ("train/loss", "train/silog", "eval/metric/abs_rel"):
        assert f'aria-label="{curve}"' in text
    assert text.count("data:image/jpeg;base64,") >= 2  # panorama, bird's-eye view
    # Nothing is fetched from anywhere.
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", text) and "url(" not in text and "import(" not in text


@pytest.fixture(scope="module")
def alone(run, tmp_path_factory):
    """A folder that holds an evaluation alone, of the run's student on two folders of records."""
    folder = tmp_path_factory.mktemp("alone")
    more = write_folder(folder / "more", [rooms.make(seed, cameras=3, native_size=(48, 80)) for seed in (7, 8)])
    both = f"{run.parent}/rooms,{more}"
    config = make_config(run.parent / "rooms", **{"eval.num_pictures": 1, "data.eval_records": both})
    evaluate_run(config, folder / "found", init_from=str(run))
    return folder / "found"


def test_an_evaluation_alone_is_reported(alone, run, tmp_path):
    """With the cloud of what was evaluated, from one of several records folders."""
    report.main(["--workdir", str(alone), "--out", str(tmp_path / "r.html"), "--frame", "4"])
    text = (tmp_path / "r.html").read_text()
    for name in ("Evaluation", "Point cloud", "Pictures", "What it was", "Config"):
        assert f"<h2>{name}</h2>" in text
    assert "<h2>Curves</h2>" not in text and '<canvas data-cloud="cloud"' in text and text.count("data:image/jpeg") == 2
    table = json.loads(next((alone / "evaluation").glob("*.json")).read_text())
    assert f"<td>{table['table']['metric']['all']['abs_rel']:.4f}</td>" in text
    assert f"<dt>evaluated</dt><dd>{run} (best checkpoint, step" in text and "2 steps of 2 rig(s)" in text


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"init_from": ""}, "where to find what was evaluated"),
        ({"init_from": "/nowhere/run"}, "cannot be opened any more (/nowhere/run: no student here"),
        ({"step": 1}, "holds other parameters now than those that were evaluated"),
    ],
)
def test_what_was_evaluated_may_be_gone(alone, tmp_path, change, note):
    (file,) = (alone / "evaluation").glob("*.json")
    found = json.loads(file.read_text())
    (tmp_path / "run/evaluation").mkdir(parents=True)
    found["identity"] |= change
    (tmp_path / "run/evaluation" / file.name).write_text(json.dumps(found))
    report.write_report(tmp_path / "run", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "<p>No point cloud: " in text and note in text and '<canvas data-cloud="cloud"' not in text
    assert "<h2>Evaluation</h2>" in text


def test_a_training_without_a_checkpoint_is_reported(run, tmp_path):
    for name in ("identity.json", "metrics.jsonl"):
        shutil.copy(run / name, tmp_path)
    report.write_report(tmp_path, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "<p>No point cloud: the run has no checkpoint yet.</p>" in text and "<h2>Curves</h2>" in text


def test_records_are_one_folder_or_several_and_may_be_gone(tmp_path):
    folders = [write_folder(tmp_path / name, [rooms.make(i, cameras=3)]) for i, name in enumerate("ab")]
    both = f"{folders[0]}, {folders[1]}"
    data = {"eval_records": both, "cameras": ()}
    assert report._source(None, data).count == report._source(both, data).count == 2
    assert report._source(str(folders[1]), data).count == 1
    chosen = next(report._source(None, data | {"cameras": ("BACK_LEFT", "FRONT")}).frames()).cameras
    assert chosen == ["BACK_LEFT", "FRONT"]
    gone = f"{folders[0]},{tmp_path}/c"
    assert f"the records {gone} are not here" in report._source(None, data | {"eval_records": gone})
    assert "records (none) are not here" in report._source(None, data | {"eval_records": ""})


def test_frames_are_those_with_pictures(tmp_path):
    samples = [rooms.make(seed, cameras=3) for seed in range(3)]
    samples[1] = dataclasses.replace(samples[1], images=[b""] * 3)
    source = report._source(str(write_folder(tmp_path / "rooms", samples)), {})
    assert [report._frame(source, k).name for k in (0, 1)] == [samples[0].sample_id, samples[2].sample_id]
    with pytest.raises(ConfigError, match=r"--frame 2: 2 of 3 records have a picture, and the first is frame 0"):
        report._frame(source, 2)
    with pytest.raises(ConfigError, match=r"--frame -1: expected 0 to 2, there are 3 records"):
        report._frame(source, -1)


def test_the_cloud_is_in_it_point_by_point():
    points = np.array([[1.5, -2, 3], [4, 5, 6]], np.float32)
    text = report_page.cloud(Cloud(points, np.array([[1, 2, 3], [4, 5, 6]], np.uint8), np.zeros(2, int)), "c", "two")
    data = base64.b64decode(re.search(r'id="c">([^<]+)<', text).group(1))
    rows = np.frombuffer(data, np.dtype([("xyz", "<f4", (3,)), ("rgba", "u1", (4,))]))
    np.testing.assert_array_equal(rows["xyz"], points)
    assert rows["rgba"].tolist() == [[1, 2, 3, 255], [4, 5, 6, 255]]
    many = Cloud(np.zeros((200_001, 3), np.float32), np.zeros((200_001, 3), np.uint8), np.zeros(200_001, int))
    thinned = report_page.cloud(many, "c", "many")
    assert len(thinned) < 2_000_000 and ">many; one in 3 is shown. Drag" in thinned and ">two. Drag" in text


def test_charts_leave_out_what_is_not_finite_and_escape_names():
    text = report_page.chart("<loss>", {"<loss>": [(1, 2.0), (2, float("nan")), (3, 1.0)]})
    assert "nan" not in text and "<loss>" not in text and text.count(",") == 2
    assert report_page.chart("x", {"x": [(1, float("inf"))]}) == ""


def test_each_picture_is_shown_once(tmp_path):
    """Beside evaluations whose names begin with another's."""
    stems = ("world_val_surround", "world_val_surround_dense", "world_val_surround_dense_without_CAM_BACK")
    row = dict.fromkeys(NAMES, 0.5)
    found = {"title": "a run", "protocol": "surround", "table": {"metric": {"all": row}}}
    for stem in stems:
        (tmp_path / f"{stem}.json").write_text(json.dumps(found))
        for name in ("00", "01", "confidence"):
            cv2.imwrite(str(tmp_path / f"{stem}_{name}.png"), np.zeros((4, 4, 3), np.uint8))
    _, pictures = report._evaluations(tmp_path)
    shown = re.findall(r"<figcaption>([^<]+)<", pictures)
    assert shown == [f"{stem}_{name}" for stem in stems for name in ("00", "01", "confidence")]


def test_what_is_no_run_is_named(run, tmp_path, capsys):
    page = str(tmp_path / "r.html")
    for flags, message in (
        ([str(tmp_path), "--out", page], "no run (no identity.json in it), and no evaluation"),
        ([str(run), "--out", page, "--frame", "7"], "--frame 7: expected 0 to 2, there are 3 records"),
        ([str(run), "--out", page, "--records", "nowhere"], "error: nowhere: no such folder"),
        ([str(run), "--out", "/proc/r.html"], "--out /proc/r.html: cannot write"),
    ):
        with pytest.raises(SystemExit):
            report.main(["--workdir", *flags])
        assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("width", [1300, 390])
def test_a_browser_shows_it_without_errors(made, tmp_path, width):
    """Headless Chromium: no console errors, nothing wider than the window (a long path neither), a cloud that moves.

    The page is in a frame of the width that is meant, since no window of Chromium is narrower than 500 pixels.
    """
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if not browser:
        pytest.skip("no chromium: the report is not looked at in a browser")
    look = """<script>addEventListener("load", () => setTimeout(() => {
      const canvas = document.querySelector("canvas"), gl = canvas && canvas.getContext("webgl");
      const seen = () => {
        const pixels = gl ? new Uint8Array(4 * canvas.width * canvas.height) : [];
        if (gl) gl.readPixels(0, 0, canvas.width, canvas.height, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
        return pixels;
      };
      const changed = (a, b) => a.filter((v, i) => v !== b[i]).length;
      const first = seen(), lit = first.filter((v, i) => i % 4 < 3 && v > 60).length, root = document.documentElement;
      canvas.setPointerCapture = () => {};  // a made-up finger cannot be captured
      canvas.dispatchEvent(new WheelEvent("wheel", {deltaY: -500, cancelable: true}));
      const nearer = seen();
      for (const [kind, x] of [["pointerdown", 50], ["pointermove", 150], ["pointerup", 150], ["pointermove", 250]])
        canvas.dispatchEvent(new PointerEvent(kind, {pointerId: 7, clientX: x, clientY: 60}));
      const turned = seen();
      const phone = matchMedia("(max-width: 499px)").matches;
      parent.postMessage([root.scrollWidth, root.clientWidth, innerWidth, phone, gl ? lit : -1,
                          changed(first, nearer), changed(nearer, turned)], "*");
    }, 500));</script>"""
    note = f"<p>No point cloud: the records {'/long' * 60} are not here.</p>"
    (tmp_path / "page.html").write_text(made.read_text().replace("</body>", note + look + "</body>"))
    around = tmp_path / "around.html"
    around.write_text(
        f"""<!doctype html><title></title><body style="margin: 0">
        <iframe src="page.html" style="width: {width}px; height: 900px; border: 0"></iframe>
        <script>onmessage = event => document.title = JSON.stringify(event.data);</script></body>"""
    )
    command = [
        browser, "--headless=new", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
        f"--window-size={max(width, 500)},900", "--virtual-time-budget=5000", "--enable-logging=stderr", "--dump-dom",
        f"--user-data-dir={tmp_path / 'profile'}", around.as_uri(),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = json.loads(re.search(r"<title>(\[[^<]*\])</title>", result.stdout).group(1))
    seen, shown, inner, phone, lit, zoomed, turned = found
    assert inner == width and phone == (width < 500), "not looked at in the width that was meant"
    assert seen <= shown <= width
    assert lit > 500, "no WebGL in this browser, though it has a software renderer" if lit == -1 else "an empty cloud"
    assert zoomed > 500 and turned > 500, "a wheel or a finger does not move the cloud"
    errors = [line for line in result.stderr.splitlines() if ":CONSOLE" in line and "GL Driver Message" not in line]
    assert not errors
