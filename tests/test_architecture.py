"""Keeps the house in order: imports go downward only, and heavy libraries stay in their rooms."""

import ast
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A module may import from its own level only where `SAME_LEVEL` allows it, and from every level below.
LEVELS = [
    {"fsmde_jax.main", "fsmde_jax.experiment"},
    {"fsmde_jax.train", "fsmde_jax.predict", "fsmde_jax.report"},
    {"fsmde_jax.loop"},
    {"fsmde_jax.evaluate", "fsmde_jax.teacher_cache"},
    {"fsmde_jax.predict_rig", "fsmde_jax.predict_images"},
    {"fsmde_jax.convert", "fsmde_jax.export", "fsmde_jax.rig_frames"},
    {"fsmde_jax.depth_model", "fsmde_jax.rig_samples", "fsmde_jax.quantize"},
    {"fsmde_jax.build"},
    {"fsmde_jax.build_teacher"},
    {"fsmde_jax.teacher"},
    {"fsmde_jax.students", "fsmde_jax.run_checkpoints"},
    {"fsmde_jax.checkpoint", "fsmde_jax.distillation"},
    {"fsmde_jax.compatible", "fsmde_jax.checkpoint_errors", "fsmde_jax.checksums", "fsmde_jax.preemption",
     "fsmde_jax.history"},
    {"fsmde_jax.state", "fsmde_jax.optim", "fsmde_jax.sharding", "fsmde_jax.writer", "fsmde_jax.identity",
     "fsmde_jax.data.pipeline", "fsmde_jax.losses.total", "fsmde_jax.weights", "fsmde_jax.teacher_weights",
     "fsmde_jax.models.registry", "fsmde_jax.viz.panorama", "fsmde_jax.teacher_signal",
     "fsmde_jax.eval_data"},
    {"fsmde_jax.results", "fsmde_jax.trivial", "fsmde_jax.eval_options", "fsmde_jax.affine",
     "fsmde_jax.relation_probe", "fsmde_jax.confidence"},
    {"fsmde_jax.models", "fsmde_jax.losses", "fsmde_jax.protocols", "fsmde_jax.viz"},
    {"fsmde_jax.consistency", "fsmde_jax.metrics", "fsmde_jax.data.records", "fsmde_jax.data.transforms",
     "fsmde_jax.data.augment", "fsmde_jax.data.teacher_maps", "fsmde_jax.data.prefetch"},
    {"fsmde_jax.geometry", "fsmde_jax.interpolate", "fsmde_jax.data.schema", "fsmde_jax.data.tfrecord",
     "fsmde_jax.data.dense", "fsmde_jax.names", "fsmde_jax.expectation"},
    {"fsmde_jax.distributed", "fsmde_jax.disk", "fsmde_jax.run_lock", "fsmde_jax.heap"},
    {"fsmde_jax.errors", "fsmde_jax"},
]  # fmt: skip
SAME_LEVEL = {
    ("fsmde_jax.state", "fsmde_jax.sharding"),
    ("fsmde_jax.data.schema", "fsmde_jax.geometry"),
    ("fsmde_jax.weights", "fsmde_jax.models.registry"),
    ("fsmde_jax.teacher_weights", "fsmde_jax.weights"),
    ("fsmde_jax.teacher_weights", "fsmde_jax.models.registry"),
}


def level(module: str) -> int:
    def covers(name: str) -> bool:
        return module == name or (name != "fsmde_jax" and module.startswith(name + "."))

    best = max(((len(name), i) for i, names in enumerate(LEVELS) for name in names if covers(name)), default=None)
    assert best is not None, f"{module} has no level; give it one in tests/test_architecture.py"
    return best[1]


def modules(package: str) -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


FSMDE = modules("fsmde_jax")
PREP = modules("data_prep")


@functools.cache
def imports(path: Path) -> set[str]:
    """Absolute names that a file imports, sub-modules of this project resolved."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            base = node.module or ""
            for alias in node.names:
                full = f"{base}.{alias.name}"
                names.add(full if full in FSMDE or full in PREP else base)
    return names


@pytest.mark.parametrize("module", sorted(FSMDE))
def test_imports_go_downward(module):
    for name in imports(FSMDE[module]) & set(FSMDE):
        if name == module:
            continue
        same_package = name.rsplit(".", 1)[0] == module.rsplit(".", 1)[0] and name.count(".") > 1
        allowed = level(name) > level(module) or (module, name) in SAME_LEVEL
        allowed = allowed or (same_package and level(name) == level(module))
        assert allowed, f"{module} must not import {name}"


@pytest.mark.parametrize(
    ("library", "rooms"),
    [
        ("flax.linen", ("fsmde_jax.models", "fsmde_jax.state", "fsmde_jax.build")),  # the latter two: types only
        ("orbax", ("fsmde_jax.checkpoint", "fsmde_jax.run_checkpoints")),
        ("grain", ("fsmde_jax.data",)),
        (
            "ml_collections",
            (
                "fsmde_jax.main",
                "fsmde_jax.train",
                "fsmde_jax.loop",
                "fsmde_jax.evaluate",
                "fsmde_jax.build",
                "fsmde_jax.eval_options",
                "fsmde_jax.build_teacher",
            ),
        ),
        ("torch", ("fsmde_jax.weights",)),
        ("onnx", ("fsmde_jax.models.onnx_graph", "fsmde_jax.models.onnx_nodes", "fsmde_jax.quantize")),
        ("onnxruntime", ("fsmde_jax.quantize",)),
        ("tensorflow", ()),
    ],
)
def test_libraries_stay_in_their_rooms(library, rooms):
    for module, path in {**FSMDE, **PREP}.items():
        used = {n for n in imports(path) if n == library or n.startswith(library + ".")}
        if library == "flax.linen" and any(n == "flax" for n in imports(path)):
            used.add("flax")
        allowed = any(module == room or module.startswith(room + ".") for room in rooms)
        assert not used or allowed, f"{module} must not import {library}"


def test_commands_start_without_torch_and_tensorflow():
    """Also where they are installed, as here: they would take most of a command's start."""
    code = (
        "import importlib, sys\n"
        "for name in ('train', 'predict', 'report', 'export', 'teacher_cache', 'convert', 'experiment.__main__'):\n"
        "    importlib.import_module(f'fsmde_jax.{name}')\n"
        "print(sorted({'torch', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_data_never_imports_models_and_data_prep_never_imports_jobs():
    for module, path in FSMDE.items():
        if module.startswith("fsmde_jax.data"):
            assert not {n for n in imports(path) if n.startswith("fsmde_jax.models")}, module
    rooms = (
        "",
        ".geometry",
        ".errors",
        ".data",
        ".data.dense",
        ".data.schema",
        ".data.tfrecord",
        ".data.records",
        ".viz.colour",
    )
    allowed = {f"fsmde_jax{room}" for room in rooms}
    for module, path in PREP.items():
        used = {n for n in imports(path) if n.startswith("fsmde_jax")}
        assert used <= allowed, f"{module} imports {sorted(used - allowed)}"


def test_files_stay_short():
    for path in [*FSMDE.values(), *PREP.values()]:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 350, f"{path.relative_to(ROOT)} has {lines} lines; split it"


def test_every_config_only_overrides_declared_keys():
    from configs import base

    def keys(node, prefix=""):
        out = set()
        for key, value in node.items():
            out |= keys(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}"}
        return out

    declared = keys(base.get_config().to_dict())
    for path in sorted((ROOT / "configs").glob("*.py")):
        if path.stem == "__init__":
            continue
        namespace: dict = {}
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)
        assert keys(namespace["get_config"]().to_dict()) == declared, path.name


def test_every_declared_key_is_read_somewhere():
    from configs import base

    sources = "\n".join(path.read_text(encoding="utf-8") for path in FSMDE.values())
    config = base.get_config().to_dict()
    for section, entries in config.items():
        keys = entries if isinstance(entries, dict) and section != "augment" else ()  # AugmentOptions knows its fields
        for key in keys:
            by_role = key.startswith(("train_records", "eval_records", "prepare_"))  # read as f"{role}_records"
            assert by_role or re.search(rf"\.{key}\b", sources), f"{section}.{key} is declared, but nothing reads it"
