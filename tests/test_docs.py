"""Pages of docs/ that are programs or quote the program: snippets of api.md, messages of troubleshooting.md, links."""

import re
from pathlib import Path

import pytest

from tests import rooms
from tests.sample_factory import write_folder

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.mark.slow
def test_the_snippets_of_the_api_are_one_program(tmp_path, monkeypatch):
    samples = [rooms.make(seed, cameras=3, native_size=(48, 96)) for seed in range(2)]
    write_folder(tmp_path / "records" / "my_rig", samples)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.S)
    assert len(snippets) >= 5
    scope: dict = {}
    for snippet in snippets:
        exec(compile(snippet, "docs/api.md", "exec"), scope)
    assert scope["found"].depth.shape == (3, 48, 96)
    assert (tmp_path / "cloud.ply").stat().st_size > 1000
    assert sorted(p.name for p in (tmp_path / "depth" / "sample-0").iterdir()) == ["cloud.ply", "rig.npz"]
    assert scope["page"].ndim == scope["above"].ndim == 3
    assert scope["protocol"].table()["metric"]["all"]["abs_rel"] > 0
    assert float(scope["silog"]) > 0 and float(scope["prob"]) > 0 and float(scope["vrkd"]) < 1e-5


def test_the_functions_that_the_api_names_are_there():
    import importlib

    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for module in ("train", "evaluate", "export", "report", "students", "predict_rig", "predict_images", "rig_frames"):
        found = importlib.import_module(f"fsmde_jax.{module}")
        for name in re.findall(rf"`{module}\.(\w+)\(", text):
            assert callable(getattr(found, name)), f"{module}.{name}"


def sources():
    paths = [*(ROOT / "fsmde_jax").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")]
    joined = "".join(path.read_text(encoding="utf-8") for path in paths)
    return re.sub(r'"\s*\n\s*f?"', "", joined)  # messages that go over several lines


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]*)", text):
        assert not target or (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text):
        headings = re.findall(r"^#+ (.*)$", (page.parent / target if target else page).read_text("utf-8"), re.M)
        anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert anchor in anchors, f"{target}#{anchor}"


def test_the_program_says_what_troubleshooting_quotes():
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    said = sources()
    quoted = [q for q in re.findall(r"`([^`\n]+)`", text) if re.fullmatch(r"[A-Za-z.*,' -]+ [A-Za-z.*,'<>/ -]+", q)]
    messages = [q for q in quoted if not q.startswith(("python ", "pip ", "data_prep ", "--", "like "))]
    assert len(messages) >= 12, messages
    for message in messages:
        assert message in said, message
