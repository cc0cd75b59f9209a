"""Reading and converting weight files: safely, and strictly both ways."""

import os
import pickle
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fsmde_jax import weights
from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.models import registry


def fake_tensors(encoder, naming, seed=0):
    """A whole state dict of random numbers for an encoder, in PyTorch's shapes, built from its parameter shapes."""
    rng = np.random.default_rng(seed)
    tensors = {}
    flat = jax.tree_util.tree_flatten_with_path(weights.encoder_template(encoder))[0]
    for keys, spec in flat:
        path = tuple(key.key for key in keys)[1:]
        shape = spec.shape
        if path[-1] == "kernel":  # HWIO -> OIHW
            shape = (shape[3], shape[2], shape[0], shape[1])
        tensors[naming(path)] = rng.normal(size=shape).astype(np.float32)
    return tensors


@pytest.fixture(scope="module")
def resnet18():
    """As torchvision's file: with classifier and step counters."""
    tensors = fake_tensors("resnet18", weights.torchvision_resnet_name)
    tensors |= {"fc.weight": np.zeros((1000, 512), np.float32), "fc.bias": np.zeros(1000, np.float32)}
    tensors |= {"bn1.num_batches_tracked": np.array(7), "layer1.0.bn1.num_batches_tracked": np.array(7)}
    return tensors


def save_safetensors(tensors, path):
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    return path


def test_torchvision_names():
    """Spelled out, so that the naming functions are not their own witness."""
    names = weights.torchvision_resnet_name, weights.transformers_resnet_name
    expected = {
        ("conv1", "kernel"): ("conv1.weight", "embedder.embedder.convolution.weight"),
        ("bn1", "mean"): ("bn1.running_mean", "embedder.embedder.normalization.running_mean"),
        ("layer1_0", "conv2", "kernel"): (
            "layer1.0.conv2.weight", "encoder.stages.0.layers.0.layer.1.convolution.weight"),
        ("layer4_1", "bn1", "scale"): (
            "layer4.1.bn1.weight", "encoder.stages.3.layers.1.layer.0.normalization.weight"),
        ("layer2_0", "downsample_0", "kernel"): (
            "layer2.0.downsample.0.weight", "encoder.stages.1.layers.0.shortcut.convolution.weight"),
        ("layer2_0", "downsample_1", "var"): (
            "layer2.0.downsample.1.running_var", "encoder.stages.1.layers.0.shortcut.normalization.running_var"),
    }  # fmt: skip
    for path, both in expected.items():
        assert tuple(name(path) for name in names) == both
    lite = weights.efficientnet_lite_name
    assert lite(("blocks_12", "depthwise_conv", "kernel")) == "_blocks.12._depthwise_conv.weight"
    assert lite(("bn0", "bias")) == "_bn0.bias"


def test_torchvision_layout_gives_the_same_encoder_as_the_transformers_layout(resnet18, tmp_path):
    """The reference `ResNetModel`, its tensors renamed as torchvision names them, loads to the reference's outputs."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2], layer_type="basic")
    model = transformers.ResNetModel(config).eval()
    renamed = {}
    for name, value in model.state_dict().items():
        name = name.replace("embedder.embedder.convolution", "conv1").replace("embedder.embedder.normalization", "bn1")
        for i in range(4):
            name = name.replace(f"encoder.stages.{i}.layers.", f"layer{i + 1}.")
        for i in (1, 2):
            name = name.replace(f".layer.{i - 1}.convolution", f".conv{i}")
            name = name.replace(f".layer.{i - 1}.normalization", f".bn{i}")
        name = name.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
        renamed[name] = value
    renamed |= {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}
    assert set(resnet18) <= set(renamed)
    torch.save(renamed, tmp_path / "resnet18.pth")
    params, stats = weights.load_encoder(tmp_path / "resnet18.pth", "resnet18")
    x = np.random.default_rng(0).normal(size=(1, 32, 64, 3)).astype(np.float32)
    apply = jax.jit(partial(registry.build_encoder("resnet18").apply, train=False))
    taps = apply({"params": params, "batch_stats": stats}, x)
    with torch.no_grad():
        expected = model(torch.from_numpy(x).permute(0, 3, 1, 2)).last_hidden_state.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(taps[-1], expected, atol=1e-4 * np.abs(expected).max())

    # A classifier of transformers: the same tensors under `resnet.`, and its own head.
    state = {f"resnet.{name}": value.numpy() for name, value in model.state_dict().items()}
    state |= {"classifier.1.weight": np.zeros((1000, 512)), "classifier.1.bias": np.zeros(1000)}
    again, _ = weights.convert_encoder(state, "resnet18", source="test")
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_safetensors_and_torch_files_hold_the_same(resnet18, tmp_path):
    torch = pytest.importorskip("torch")
    save_safetensors(resnet18, tmp_path / "a.safetensors")
    state = {f"module.{name}": torch.from_numpy(np.asarray(value)) for name, value in resnet18.items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "a.pth")
    one, other = (weights.load_encoder(tmp_path / f"a.{end}", "resnet18") for end in ("safetensors", "pth"))
    jax.tree.map(np.testing.assert_array_equal, one, other)
    params, stats = one
    assert params["layer1_0"]["conv1"]["kernel"][1, 2, 3, 4] == resnet18["layer1.0.conv1.weight"][4, 3, 1, 2]
    expected = resnet18["layer2.0.downsample.1.running_var"]
    np.testing.assert_array_equal(stats["layer2_0"]["downsample_1"]["var"], expected)
    shapes = jax.tree.map(lambda leaf: leaf.shape, weights.encoder_template("resnet18"))
    assert jax.tree.map(np.shape, {"params": params, "batch_stats": stats}) == shapes


def test_half_precision_files_become_float32(tmp_path):
    torch = pytest.importorskip("torch")
    save_torch = pytest.importorskip("safetensors.torch").save_file
    tensors = {"a": torch.tensor([1.5, -2.0]).bfloat16(), "b": torch.tensor([0.25]).half(), "n": torch.tensor([3])}
    save_torch(tensors, tmp_path / "x.safetensors")
    torch.save(tensors, tmp_path / "x.pt")
    for name in ("x.safetensors", "x.pt"):
        read = weights.load_tensors(tmp_path / name)
        assert read["a"].dtype == read["b"].dtype == np.float32 and read["n"].dtype == np.int64
        np.testing.assert_array_equal(read["a"], [1.5, -2.0])


def test_every_problem_is_reported_at_once(resnet18):
    broken = dict(resnet18)
    del broken["layer3.1.bn2.running_mean"], broken["bn1.bias"]
    broken["layer4.0.conv1.weight"] = np.zeros((512, 256, 1, 1), np.float32)
    broken["layer4.2.conv1.weight"] = np.zeros((512, 512, 3, 3), np.float32)
    broken["layer1.1.bn1.weight"] = np.full(64, np.nan, np.float32)
    with pytest.raises(DataError) as error:
        weights.convert_encoder(broken, "resnet18", source="weights.pth")
    text = str(error.value)
    for part in (
        "weights.pth: 5 tensors",
        "missing: layer3.1.bn2.running_mean",
        "missing: bn1.bias",
        "unexpected: layer4.2.conv1.weight",
        "wrong shape: layer4.0.conv1.weight is (512, 256, 1, 1), expected (512, 256, 3, 3)",
        "not finite: layer1.1.bn1.weight",
    ):
        assert part in text
    assert "fc." not in text and "num_batches" not in text


def test_a_file_of_another_architecture_is_named(resnet18, tmp_path):
    path = save_safetensors(resnet18, tmp_path / "r.safetensors")
    for encoder in ("resnet34", "efficientnet_lite0"):
        with pytest.raises(DataError, match=rf"not weights of {encoder}.*it looks like resnet18") as error:
            weights.load_encoder(path, encoder)
        assert str(path) in str(error.value)
    lite1 = fake_tensors("efficientnet_lite1", weights.efficientnet_lite_name)
    with pytest.raises(DataError, match="looks like efficientnet_lite1"):
        weights.convert_encoder(lite1, "efficientnet_lite0", source="x")
    with pytest.raises(DataError, match="looks like a Depth Anything model"):
        weights.convert_encoder({"backbone.embeddings.cls_token": np.zeros(3)}, "resnet18", source="x")
    with pytest.raises(DataError, match=r"it holds something\.else"):
        weights.convert_encoder({"something.else": np.zeros(3)}, "resnet18", source="x")
    with pytest.raises(DataError, match="no tensors at all"):
        weights.convert_encoder({}, "resnet18", source="x")
    with pytest.raises(ConfigError, match="did you mean 'resnet18'"):
        weights.load_encoder(path, "resnet19")


class Malicious:
    def __reduce__(self):
        return (os.mkdir, (os.environ["FSMDE_TEST_CANARY"],))


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    canary = tmp_path / "canary"
    monkeypatch.setenv("FSMDE_TEST_CANARY", str(canary))
    torch.save({"a": Malicious()}, tmp_path / "evil.pth")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({"a": Malicious()}))
    for name in ("evil.pth", "plain.bin"):
        with pytest.raises(DataError, match=name):
            weights.load_tensors(tmp_path / name)
    assert not canary.exists()


def test_unreadable_files_have_clear_errors(resnet18, tmp_path):
    torch = pytest.importorskip("torch")
    whole = save_safetensors(resnet18, tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 not a zip")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "w.onnx").write_bytes(b"x")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    cases = {
        "none.pth": "no such weight file", "cut.safetensors": "not a whole safetensors file", "cut.pth": "damaged",
        "empty.pth": "damaged", "w.onnx": "unknown kind of weight file", "list.pth": "expected a state dict",
    }  # fmt: skip
    for name, message in cases.items():
        with pytest.raises(DataError, match=message) as error:
            weights.load_tensors(tmp_path / name)
        assert name in str(error.value)


def test_torch_files_without_torch_say_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.pth").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DataError, match=r"fsmde-jax\[convert\].*\.safetensors"):
        weights.load_tensors(tmp_path / "a.pth")


def test_assemble_keeps_other_leaves_and_transposes_linear_layers():
    kernel, token = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 3), (1, 4)))
    template = {"params": {"fc": {"kernel": kernel}, "token": token}}
    tensors = {"fc.weight": np.arange(6.0).reshape(3, 2), "token": np.ones((1, 4))}
    out = weights.assemble(tensors, template, weights.torchvision_resnet_name, source="x")
    np.testing.assert_array_equal(out["params"]["fc"]["kernel"], tensors["fc.weight"].T)
    assert out["params"]["token"].dtype == np.float32
