"""Shared fixtures. Tests on real frames find them through FSMDE_REAL_DATA and skip without it."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # test modules and the commands they run compile the same functions
    _cache = tempfile.mkdtemp(prefix="fsmde_xla_")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache

# Files that take minutes, longest first: they start first, so that no worker is left alone with one at the end.
LONG = (
    "test_notebooks.py", "test_readme.py", "test_train.py", "test_distillation.py", "test_world_geometry.py",
    "test_train_teacher.py", "test_real_frames.py", "test_benchmark_latency.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with nuscenes_keyframe/ and ddad_val_clip/."""
    folder = os.environ.get("FSMDE_REAL_DATA", "")
    if not folder:
        pytest.skip("FSMDE_REAL_DATA is not set: no real frames to test on")
    if not Path(folder, "nuscenes_keyframe").is_dir():
        pytest.fail(f"FSMDE_REAL_DATA={folder} holds no nuscenes_keyframe/")
    return Path(folder)
