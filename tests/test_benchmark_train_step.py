"""benchmarks.train_step: its PyTorch side is the same network, and a small run measures what it says."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.random_network import random_variables

ROOT = Path(__file__).resolve().parent.parent
torch = pytest.importorskip("torch")


def test_the_pytorch_student_is_the_same_network_and_step():
    """Depth, bins, losses and gradients in training, from the same parameters, batch statistics included."""
    import jax.numpy as jnp

    from benchmarks import torch_student
    from fsmde_jax.losses import distill, supervised
    from fsmde_jax.models import depth_bins, registry

    channels, bins, rigs, (height, width) = (4, 8, 8, 16, 16), 8, 2, (64, 96)
    model = registry.build_student(
        encoder="resnet18", decoder_channels=channels, bins="log", probabilities="softmax", expectation="log",
        num_bins=bins, min_depth=0.5, max_depth=80.0, focal_canonical=500.0, focal_range=(300.0, 700.0),
        cross_view_blocks=0, dtype="float32",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    images = rng.normal(size=(rigs, 3, height, width, 3)).astype(np.float32)
    intrinsics = np.tile(np.diag([70.0, 70.0, 1.0]).astype(np.float32), (rigs, 3, 1, 1))
    label = np.where(rng.random((rigs, 3, height, width)) < 0.1, rng.uniform(1, 60, (rigs, 3, height, width)), 0)
    label = label.astype(np.float32)
    variables = random_variables(model, images, intrinsics)
    target = rng.normal(size=(rigs * 3, bins, height // 2, width // 2)).astype(np.float32)

    def ours(params):
        out, _ = model.apply(
            {"params": params, "batch_stats": variables["batch_stats"]}, images, intrinsics, train=True,
            mutable=["batch_stats"],
        )  # fmt: skip
        loss = supervised.silog(out["pred_depth"], label, label > 0, lam=0.85)
        logits = jnp.asarray(target).transpose(0, 2, 3, 1).reshape(out["bin_logits"].shape)
        mask = jnp.ones(logits.shape[:4], bool)
        return loss + distill.probability_loss(out["bin_logits"], logits, mask, tau=1.0), out

    (loss, out), gradient = jax.jit(jax.value_and_grad(ours, has_aux=True))(variables["params"])

    span = depth_bins.canonical_range(0.5, 80.0, 500.0, (300.0, 700.0))
    student = torch_student.Student(channels, bins, span).train()
    torch_student.load_parameters(student, jax.tree.map(np.asarray, variables["params"]))
    x = torch.from_numpy(images.reshape(-1, height, width, 3)).permute(0, 3, 1, 2)
    ratio = torch.full((rigs * 3,), 70.0 / (500.0 * width / 640))
    logits, centers, depth = student(x, ratio)
    for mine, theirs in (
        (out["pred_depth"].reshape(depth.shape), depth), (out["view_bin_centers"].reshape(centers.shape), centers),
        (out["bin_logits"].reshape(-1, height // 2, width // 2, bins).transpose(0, 3, 1, 2), logits),
    ):  # fmt: skip
        np.testing.assert_allclose(theirs.detach().numpy(), mine, rtol=2e-3, atol=2e-3)
    wanted = torch.from_numpy(target).log_softmax(1)
    total = torch_student.silog(depth, torch.from_numpy(label.reshape(depth.shape)), rigs, 0.85)
    total = total + (wanted.exp() * (wanted - logits.log_softmax(1))).sum(1).mean()
    np.testing.assert_allclose(total.item(), loss, rtol=1e-4)
    total.backward()
    for name, mine in (
        ("depth_bins.logits.weight", gradient["depth_bins"]["logits"]["kernel"].T[..., None, None]),
        ("decoder.fuse_0.conv.weight", gradient["decoder"]["fuse_0"]["conv"]["kernel"].transpose(3, 2, 0, 1)),
        ("backbone.layer4_1.conv2.weight", gradient["backbone"]["layer4_1"]["conv2"]["kernel"].transpose(3, 2, 0, 1)),
    ):
        theirs = student.get_parameter(name).grad.numpy()
        assert np.linalg.norm(theirs - mine) < 0.02 * np.linalg.norm(mine), name


@pytest.mark.slow  # the fast set compares the steps of both sides, above
@pytest.mark.parametrize("memory", [False, True])
def test_a_small_run_measures_both_sides(tmp_path, memory):
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.train_step", "--size", "32x64", "--cameras", "2", "--repeats", "1",
               "--out", str(out), *([] if memory else ["--no-memory"])]  # fmt: skip
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads(out.read_text())["result"]
    for name in (
        "here",
        "here, teacher from a cache",
        "teacher",
        "student forward",
        "forward and backward",
        "update",
        "input",
        "PyTorch eager",
        "PyTorch channels_last",
    ):
        assert found["median"][name] > 0 and f"| {name} |" in result.stdout
    losses = found["first_loss"]
    assert losses["here, teacher from a cache"] == pytest.approx(losses["here"], rel=1e-3)
    assert losses["PyTorch eager"] == pytest.approx(losses["here"], rel=0.05)  # quantiles and padding differ a little
    assert set(found["gflops"]) == {"teacher", "student forward", "forward and backward", "update"}
    assert found["gflops"]["forward and backward"] > 2 * found["gflops"]["student forward"]
    assert found["compile_s"]["cached"] < found["compile_s"]["cold"]
    assert 0 < found["share_of_peak"]["teacher"] < 1.5 and "compilation cold" in result.stdout
    assert set(found["share_of_bandwidth"]) == set(found["gflops"]) and min(found["gbytes"].values()) > 0
    assert found["gbytes"]["update"] > 4 * 4 * 11e6 / 1e9  # parameters, gradients and moments of ResNet-18, once each
    middle = found["median"]
    assert found["differences"]["backward"] == middle["forward and backward"] - middle["student forward"]
    assert ("memory_mb" in found) == memory
    for name in ("here", "PyTorch eager") if memory else ():
        used = found["memory_mb"][name]
        assert 100 < used["before"] <= used["peak"] and f"memory of {name}" in result.stdout


def test_pytorch_in_bfloat16_computes_the_same_step_less_exactly():
    from benchmarks import torch_student

    class Teacher(torch.nn.Module):
        def forward(self, x):
            return types.SimpleNamespace(predicted_depth=x.mean(1) * 2)

    found, dtypes = [], []
    for autocast in (False, True):
        torch.manual_seed(0)
        student = torch_student.Student((4, 8, 8, 16, 16), 8, (0.5, 80.0))
        student.depth_bins.logits.register_forward_hook(lambda module, given, out: dtypes.append(out.dtype))
        step = torch_student.Step(student, Teacher(), lr=1e-4, autocast=autocast)
        images = torch.randn(2, 3, 64, 96)
        found.append(step(images, images[..., :56, :84], torch.ones(2), torch.rand(2, 64, 96) * 50 + 1, 1))
    assert dtypes == [torch.float32, torch.bfloat16]
    assert found[1] == pytest.approx(found[0], rel=0.05) and found[1] != found[0]


def test_the_grid_varies_one_setting_and_draws_it(tmp_path, monkeypatch):
    """With the step itself replaced: its rows, processes and plot."""
    from benchmarks import train_step_grid as grid

    seen = []

    def run(command, check, env, stdout):
        flags = dict(zip(command[3::2], command[4::2], strict=False))
        seen.append((flags["--batch"], flags["--cameras"], env["XLA_FLAGS"]))
        out = Path(command[command.index("--out") + 1])
        out.write_text(json.dumps({"result": {"rigs_per_s": 2.0, "median": {"here": 0.5}, "xla_temporary_mb": 3}}))

    monkeypatch.setattr(grid, "subprocess", types.SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL))
    monkeypatch.setattr(
        sys, "argv", ["grid", "--only", "cameras", "devices", "--out", str(tmp_path / "grid.json")]
    )  # fmt: skip
    grid.main()
    rows = json.loads((tmp_path / "grid.json").read_text())["rows"]
    assert [(row["varied"], row["value"]) for row in rows] == [
        ("cameras", 1), ("cameras", 3), ("cameras", 6), ("devices", 1), ("devices", 2), ("devices", 4)
    ]  # fmt: skip
    assert [each[1] for each in seen[:3]] == ["1", "3", "6"] and seen[-1][0] == "4"
    assert seen[-1][2].endswith("--xla_force_host_platform_device_count=4")
    assert (tmp_path / "grid.png").stat().st_size > 5000
    assert os.environ.get("XLA_FLAGS", "").count("device_count=4") == 0


@pytest.mark.parametrize("keys", [("cameras",), ("size", "cameras", "batch")])
def test_the_grids_plot_shows_every_value(keys):
    """The settings share their axes, and values span two powers of ten; the picture once cut most of them off."""
    from benchmarks import train_step_grid as grid

    values = {"size": (1.8, 0.12), "cameras": (6.5, 1.9), "batch": (1.7, 1.9)}
    rows = [
        {"varied": key, "value": number, "rigs_per_s": value, "xla_temporary_mb": 500 / value}
        for key in keys
        for number, value in enumerate(values[key])
    ]
    figure = grid.plot(rows)
    figure.canvas.draw()
    drawn = [(axis.get_ylim(), line.get_ydata()) for axis in figure.axes for line in axis.get_lines()]
    assert len(drawn) == 2 * len(keys)
    for (low, high), seen in drawn:
        assert low < min(seen) and max(seen) < high
