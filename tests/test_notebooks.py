"""Runs the notebooks in colab/ on a CPU, cell by cell as Jupyter does, with small numbers in their forms.

The slow tests run them as they stand, on rendered streets; the fast one on drawn frames, since the renderer compiles
for half a minute.
"""

import ast
import copy
import html
import json
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests import rendered

COLAB = Path(__file__).resolve().parent.parent / "colab"
NAMES = ("01_inference", "02_prepare_and_train", "03_distill_and_evaluate")
FIELD = re.compile(r"^(?P<name>[A-Z_]+) = (?P<value>.*?)  # @param\b(?P<kind>.*)$", re.M)
SIZE = "64x96"
# A network that compiles fast. The forms have no fields for these keys, but one for any keys.
SMALL = (
    "--config.model.encoder=resnet18 --config.model.decoder_channels=4,4,8,8,8 --config.model.num_bins=8"
    " --config.train.log_every=1"
    " --config.train.picture_every=0 --config.eval.num_pictures=1 --config.distill.tokens=4,6"
)

DEVICE_USED = nbformat.v4.new_code_cell("from jax._src import xla_bridge\nxla_bridge.backends_are_initialized()")
DEVICE_USED.id = "device-used"


def read(name):
    return nbformat.read(COLAB / f"{name}.ipynb", as_version=4)


def code_cells(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def fill(source, values):
    """A cell's source with other values in its form; `values` loses what was found."""

    def line(match):
        if match["name"] not in values:
            return match[0]
        return f"{match['name']} = {values.pop(match['name'])!r}  # @param{match['kind']}"

    return FIELD.sub(line, source)


def execute(book, cwd, **values):
    """Runs all cells in `cwd` with `values` in the forms; returns {cell id: what the cell showed, as text}."""
    for cell in code_cells(book):
        cell.source = fill(cell.source, values)
    assert not values, f"no form has a field {', '.join(values)}"
    specs = KernelSpecManager(kernel_dirs=[f"{sys.prefix}/share/jupyter/kernels"])  # this environment's, no user's
    manager = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=specs)
    NotebookClient(book, km=manager, timeout=600, resources={"metadata": {"path": str(cwd)}}).execute(cleanup_kc=True)
    return {cell.id: "".join(text_of(output) for output in cell.outputs) for cell in code_cells(book)}


def text_of(output):
    if output.output_type == "stream":
        return output.text
    data = output.data
    return data.get("text/html") or data.get("text/markdown") or data.get("text/plain", "")


def pictures(book, cell_id):
    (cell,) = [cell for cell in book.cells if cell.id == cell_id]
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_imports_and_never_implements(name):
    book = read(name)
    nbformat.validate(book)
    assert [cell.id for cell in book.cells] == list(dict.fromkeys(cell.id for cell in book.cells))
    assert book.metadata.kernelspec.name == "python3"
    cells = code_cells(book)
    assert len(cells) <= 12
    to_python = TransformerManager().transform_cell
    for cell in cells:
        assert cell.source.startswith("# @title "), cell.id
        assert cell.outputs == [] and cell.execution_count is None, f"{cell.id}: committed with outputs"
        for node in ast.walk(ast.parse(to_python(cell.source))):
            assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda), cell.id
            if isinstance(node, ast.Assign) and isinstance(target := node.targets[0], ast.Name):
                is_field = re.search(rf"^{target.id} = .*  # @param", cell.source, re.M)
                assert not (isinstance(node.value, ast.Constant) and target.id.isupper()) or is_field, target.id
        # A command that fails ends the notebook: IPython itself goes on.
        lines = re.sub(r"\\\n", " ", cell.source).splitlines()
        for number, line in enumerate(lines):
            if line.lstrip().startswith("!"):
                assert lines[number + 1].strip().startswith("assert _exit_code == 0"), f"{cell.id}: {line}"
    assert "nobody has run this notebook there yet" in book.cells[0].source


def test_forms_that_do_not_exist_are_named():
    with pytest.raises(AssertionError, match="no form has a field STEP"):
        execute(read("02_prepare_and_train"), COLAB, STEP=2)
    form = 'A = "x"  # @param {type:"string"}\nB = 1  # @param'
    assert fill(form, {"A": "y z"}) == form.replace('"x"', "'y z'")


def test_a_command_that_fails_ends_the_notebook(tmp_path):
    book = read("02_prepare_and_train")
    book.cells = [cell for cell in book.cells if cell.id in ("setup", "folders", "data")]
    with pytest.raises(CellExecutionError, match="the conversion failed"):
        execute(book, COLAB, WORKDIR=str(tmp_path), DATAROOT=str(tmp_path / "nowhere"))


def run_setup(cwd, before, **values):
    """The first cell alone, where the package is not installed."""
    book = read("01_inference")
    first = nbformat.v4.new_code_cell(f"import importlib.util, sys\nimportlib.util.find_spec = {{}}.get\n{before}")
    book.cells = [first, *(cell for cell in book.cells if cell.id == "setup")]
    return execute(book, cwd, **values)["setup"]


def test_setup_asks_for_the_project_where_there_is_none(tmp_path):
    with pytest.raises(CellExecutionError, match="fill in REPOSITORY"):
        run_setup(tmp_path, "")


@pytest.mark.parametrize("plugin", ["", "libtpu", "jax-cuda12-plugin"])
def test_setup_installs_an_uploaded_project_and_keeps_jax_with_its_plugin(tmp_path, plugin):
    """pip is replaced by a script that writes down how it was called."""
    project = tmp_path / "upload/project-main"
    for name in ("fsmde_jax/main.py", "requirements.txt", "requirements-devkit.txt"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).touch()
    archive = shutil.make_archive(str(tmp_path / "project"), "zip", tmp_path / "upload")
    (tmp_path / "python").write_text(f'echo "$@" >> {tmp_path}/calls\n')
    about = tmp_path / f"site/{plugin or 'other'}-1.0.dist-info/METADATA"
    about.parent.mkdir(parents=True)
    about.write_text(f"Name: {plugin or 'other'}\n")
    before = f"""import functools, importlib.metadata
sys.executable = "sh {tmp_path}/python"
importlib.metadata.distributions = functools.partial(importlib.metadata.distributions, path=["{tmp_path}/site"])"""
    said = run_setup(tmp_path, before, REPOSITORY=archive)
    root = tmp_path / "fsmde-jax/project-main"
    assert f"the project is in {root}" in said
    wanted = {"": "jax", "libtpu": "jax[tpu]", "jax-cuda12-plugin": "jax[cuda12]"}[plugin]
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"-m pip install -r {root}/requirements.txt {wanted}",
        f"-m pip install -q --no-deps -r {root}/requirements-devkit.txt",
        f"-m pip install -q -e {root}",
    ]


def with_drive(book, place):
    """The notebook as on Colab: a stand-in for google.colab, which writes mounts down, and `place` for /content."""
    package = place / "packages/google/colab"
    package.mkdir(parents=True, exist_ok=True)
    mount = f"open({str(place / 'mounted')!r}, 'a').write(place + '\\n')"
    (package / "drive.py").write_text(f"def mount(place):\n    {mount}\n")
    (package / "__init__.py").touch()
    for cell in code_cells(book):
        cell.source = cell.source.replace('"/content/', f'"{place}/content/')
    first = nbformat.v4.new_code_cell(f"import sys\nsys.path.insert(0, {str(place / 'packages')!r})")
    book.cells.insert(0, first)
    return book


@pytest.mark.parametrize("name", NAMES[1:])
def test_with_drive_everything_lies_in_drive(tmp_path, name):
    book = with_drive(read(name), tmp_path)
    book.cells = [cell for cell in book.cells if cell.cell_type == "code"][:3]  # the stand-in, setup, folders
    said = execute(book, COLAB, DRIVE=True, WORKDIR="depth/mine")
    assert f"working in {tmp_path}/content/drive/MyDrive/depth/mine" in said["folders"]
    assert (tmp_path / "mounted").read_text() == f"{tmp_path}/content/drive\n"
    assert (tmp_path / "content/drive/MyDrive/depth/mine").is_dir()


def check_inference(book, said, out, cameras):
    """What notebook 01 has shown and written."""
    assert "lite0 (step" in said["student"]
    assert len(re.findall(r"median +[\d.]+ m, confidence 0\.\d", said["predict"])) == cameras
    assert "twice the focal length: 2.00 times the depth" in said["scale"]
    (folder,) = [file.parent for file in out.rglob("cloud.ply")]
    assert len(list(folder.glob("*_depth.png"))) == cameras and "cloud.ply" in said["files"]
    assert (pictures(book, "panorama"), pictures(book, "above")) == (1, 1)
    assert pictures(book, "confidence") == cameras + 1
    assert "canvas data-cloud" in html.unescape(said["cloud"]) and list(out.rglob("cloud.html"))
    assert ".zip: " in said["download"]


def check_training(book, said, run):
    """What notebook 02 has shown and written, its training cell run twice."""
    assert pictures(book, "look") == 1
    assert "step 2/2" in said["train"] and "resuming" not in said["train"]
    assert f"resuming {run} at step 2" in said["train-again"] and "step 4/4" in said["train-again"]
    assert "step 2/4" not in said["train-again"]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {1, 2, 3, 4} == set(steps)
    assert "trivial" in said["evaluate"] and pictures(book, "evaluate") == 1
    assert "canvas data-cloud" in html.unescape(said["report"])
    assert (run / f"{run.name}.safetensors").is_file()
    assert "False" in said["device-used"], "a TPU serves one process: this one must leave it to the commands"


def run_training(work, **values):
    """Notebook 02 with two steps, and its training cell again with four: (the executed notebook, what it showed)."""
    book = read("02_prepare_and_train")
    values |= {"BATCH_SIZE": 1, "EVALUATE_EVERY": 2, "MORE": SMALL, "IMAGE_SIZE": SIZE}
    (at,) = [number for number, cell in enumerate(book.cells) if cell.id == "train"]
    again = copy.deepcopy(book.cells[at])
    again.id, again.source = "train-again", fill(again.source, {**values, "STEPS": 4})
    book.cells.insert(at + 1, again)
    book.cells.append(DEVICE_USED.copy())
    return book, execute(book, COLAB, WORKDIR=str(work), STEPS=2, **values)


def test_a_mini_dataset_is_prepared_trained_on_resumed_and_looked_at(tmp_path):
    """Notebooks 02 and 01 on drawn frames in the format of nuScenes-mini: quicker than to render."""
    dataroot = rendered.nuscenes(tmp_path / "mini", frames=(2, 1), size=(64, 96), cameras=rendered.RIG_OF_3)
    book, said = run_training(tmp_path / "work", DATAROOT=str(dataroot), TEACHER="")
    check_training(book, said, tmp_path / "work/student")
    (records,) = (tmp_path / "work/records").glob("*_val")
    inference = read("01_inference")
    said = execute(inference, COLAB, INPUT=str(records), FRAMES=1, OUT=str(tmp_path / "depth"))
    check_inference(inference, said, tmp_path / "depth", 3)


@pytest.mark.slow
def test_another_session_resumes_from_drive(tmp_path):
    """Notebook 02 twice, as in two sessions that share nothing but Drive."""
    dataroot = rendered.nuscenes(tmp_path / "mini", frames=(2, 1), size=(64, 96), cameras=rendered.RIG_OF_3)
    values = {"DATAROOT": str(dataroot), "TEACHER": "", "BATCH_SIZE": 1, "EVALUATE_EVERY": 2, "MORE": SMALL}
    run = tmp_path / "content/drive/MyDrive/depth/student"
    for steps in (2, 4):
        book = with_drive(read("02_prepare_and_train"), tmp_path)
        (last,) = [number for number, cell in enumerate(book.cells) if cell.id == "train"]
        book.cells = book.cells[: last + 1]
        said = execute(book, COLAB, DRIVE=True, WORKDIR="depth", STEPS=steps, IMAGE_SIZE=SIZE, **values)
        assert f"step {steps}/{steps}" in said["train"]
        assert (f"resuming {run} at step 2" in said["train"]) == (steps == 4)
    assert "step 2/4" not in said["train"] and said["data"].startswith("to train on")  # nothing was converted again
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {1, 2, 3, 4} == set(steps)


@pytest.mark.slow
def test_inference_on_rendered_streets(tmp_path):
    book = read("01_inference")
    said = execute(book, COLAB, FRAMES=1, RENDERED_SIZE=SIZE, OUT=str(tmp_path))
    check_inference(book, said, tmp_path, 6)


@pytest.mark.slow
def test_a_student_and_its_teacher_on_rendered_streets(tmp_path):
    """Notebooks 02 and 03 each render a world; 02 distills, 03 compares students and exports one."""
    book, said = run_training(tmp_path / "train", SCENES=2, VAL_SCENES=1, TEACHER="lite0")
    check_training(book, said, tmp_path / "train/student")
    assert "ckd" in said["train"]
    book = read("03_distill_and_evaluate")
    book.cells.append(DEVICE_USED.copy())
    said = execute(
        book, COLAB, WORKDIR=str(tmp_path / "distill"), SCENES=2, VAL_SCENES=1, IMAGE_SIZE=SIZE, STEPS=2,
        LABELLED=1, LOOK_AT=1, MORE=SMALL, LATENCY=True, ENCODERS="resnet18", LATENCY_SIZE="32x64",
    )  # fmt: skip
    assert pictures(book, "teacher") == 1 and pictures(book, "pictures") == 2
    alone, distilled = said["train"].split("--- distilled")
    assert "step 2/2" in alone and "ckd" not in alone and "step 2/2" in distilled and "ckd" in distilled
    rows = re.findall(r"<td>(lidar|dense)</td><td>([^<]*)</td>((?:<td>[\d.]+</td>)+)", said["table"])
    for truth in ("lidar", "dense"):
        names = [name for kind, name, _ in rows if kind == truth]
        assert {"labels_alone", "distilled", "lite0"} < set(names) and len(set(names)) == len(names)
        file = tmp_path / "distill/distilled/evaluation" / f"world_val_surround{'_dense' * (truth == 'dense')}.json"
        expected = json.loads(file.read_text())["table"]["metric"]["all"]["abs_rel"]
        (found,) = [of for kind, name, of in rows if (kind, name) == (truth, "distilled")]
        assert found.startswith(f"<td>{expected:.4f}</td>")
    exported = {file.name for file in (tmp_path / "distill/stablehlo").iterdir()}
    assert exported == {"distilled_2.json", "distilled_2.stablehlo"}
    assert "resnet18" in said["latency"]
    assert "False" in said["device-used"]
