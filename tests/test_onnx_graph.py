"""The ONNX graph of a student, in onnxruntime, against the student itself."""

import jax
import jax.numpy as jnp
import numpy as np
import onnx
import pytest

from fsmde_jax import geometry, quantize
from fsmde_jax.errors import ConfigError, DataError
from fsmde_jax.models import cross_view, onnx_cross_view, onnx_nodes
from fsmde_jax.models.onnx_graph import student_graph
from fsmde_jax.models.registry import build_student
from fsmde_jax.models.student import ENCODER_SCOPE
from tests.exported import SIZE, SMALL, compare, inputs, outputs_of, perturbed, rig, session
from tests.sample_factory import ring_cam_to_ego


@pytest.fixture(scope="module", autouse=True)
def quick():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def graph_of(model, variables, **options):
    return student_graph(model, variables, SIZE, **options)


def named(views, seed=0):
    return dict(zip(("images", "intrinsics"), inputs(views, seed), strict=True))


ENCODERS = ["resnet18", "efficientnet_lite0"]
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet50", "efficientnet_lite2")]


@pytest.mark.parametrize("encoder", ENCODERS + MORE)
def test_every_encoder_and_any_number_of_views(encoder):
    model = build_student(encoder=encoder, **SMALL)
    variables = perturbed(model)
    graph = graph_of(model, variables)
    kinds = [node.op_type for node in graph.graph.node]
    assert "BatchNormalization" not in kinds and kinds.count("Transpose") == 2  # folded; pixels in, features out
    assert [given.name for given in graph.graph.input] == ["images", "intrinsics"]
    assert [node.op_type for node in graph.graph.node if "images" in node.input] == ["Cast"]  # as TensorRT wants it
    for views in (1, 3):
        compare(model, variables, graph.SerializeToString(), named(views, seed=views))


@pytest.mark.parametrize(
    "options",
    [
        {"bins": "log", "expectation": "depth"},
        {"bins": "linear", "expectation": "log"},
        {"bins": "uniform", "expectation": "depth"},
        {"bins": "sid", "expectation": "log"},
        {"bins": "attractor", "expectation": "log"},
        {"bins": "attractor", "expectation": "depth", "probabilities": "log_binomial"},
        {"bins": "log", "probabilities": "log_binomial"},
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_every_kind_of_bins_and_probabilities(options):
    """Depth, and the confidence that `depth_model.read` gives."""
    model = build_student(encoder="resnet18", **options, **SMALL)
    variables = perturbed(model, seed=2)
    graph = graph_of(model, variables, confidence=True)
    found = compare(model, variables, graph.SerializeToString(), named(2, seed=2))
    assert found["confidence"].min() >= 0 and found["confidence"].max() <= 1 + 1e-6


@pytest.mark.parametrize(
    ("encoder", "blocks", "bins"),
    [("resnet18", 2, "log"), pytest.param("efficientnet_lite0", 1, "attractor", marks=pytest.mark.slow)],
)
def test_attention_between_views(encoder, blocks, bins):
    """One camera, cameras that do not see each other, three in a row, and six; wide and narrow ones."""
    model = build_student(encoder=encoder, cross_view_blocks=blocks, bins=bins, **SMALL)
    variables = perturbed(model)
    graph = graph_of(model, variables)
    assert [given.name for given in graph.graph.input] == ["images", "intrinsics", "cam_to_ego"]
    source = graph.SerializeToString()
    for chosen, focal in (((2,), 60), ((0, 3), 60), ((5, 0, 1), 60), (range(6), 60), (range(6), 200), (range(6), 10)):
        compare(model, variables, source, rig(chosen, focal, seed=len(chosen)))
    # Views that see each other change each other's depth; those that do not leave it alone.
    run = session(source)
    whole = rig(range(6), 60)
    (together,) = run.run(None, whole)
    for others, same in (((3,), True), ((1,), False)):
        kept = {name: value[[0, *others]] for name, value in whole.items()}
        (pair,) = run.run(None, kept)
        (alone,) = run.run(None, {name: value[:1] for name, value in whole.items()})
        assert np.allclose(pair[0], alone[0], rtol=1e-4) == same
    assert not np.allclose(together[0], alone[0], rtol=1e-3)


def evaluated(build, **given):
    """What a graph of one output gives; `build` gets the graph and returns the output's name."""
    g = onnx_nodes.Graph()
    name = build(g)
    kinds = onnx.TensorProto
    made = onnx.helper.make_graph(
        g.nodes,
        "part",
        [
            onnx.helper.make_tensor_value_info(key, kinds.FLOAT, [None, *value.shape[1:]])
            for key, value in given.items()
        ],
        [onnx.helper.make_empty_tensor_value_info(name)],
        g.constants,
    )
    opset = [onnx.helper.make_opsetid("", onnx_nodes.OPSET)]
    model = onnx.helper.make_model(made, opset_imports=opset, ir_version=onnx_nodes.IR_VERSION)
    return session(onnx.shape_inference.infer_shapes(model).SerializeToString()).run(None, given)[0]


def test_adjacency_is_that_of_the_geometry():
    """Against NumPy in float64, on random rigs, narrow and wide, with an axis straight up and one straight back."""
    rng = np.random.default_rng(0)
    for focal in (3.0, 20.0, 60.0, 400.0):
        poses = ring_cam_to_ego(6)[rng.integers(0, 6, 9)]
        turn = rng.uniform(-np.pi, np.pi, 9)
        spin = np.zeros((9, 4, 4))
        spin[:, 0, 0], spin[:, 1, 1] = np.cos(turn), np.cos(turn)
        spin[:, 1, 0], spin[:, 0, 1] = np.sin(turn), -np.sin(turn)
        spin[:, 2, 2] = spin[:, 3, 3] = 1
        poses = spin @ poses
        poses[0, :3, :3] = np.array([[0, -1, 0], [-1, 0, 0], [0, 0, -1.0]]).T  # looks straight down: yaw 0
        poses[1, :3, :3], poses[2, :3, :3] = ring_cam_to_ego(2)[:, :3, :3]  # forward and back
        intrinsics = rig(range(6), focal)["intrinsics"][rng.integers(0, 6, 9)]
        expected = geometry.adjacency(poses, intrinsics.astype(np.float64), SIZE[1]) | np.eye(9, dtype=bool)
        found = evaluated(
            lambda g: onnx_cross_view.visible(g, "intrinsics", "cam_to_ego", SIZE[1]),
            intrinsics=intrinsics, cam_to_ego=poses.astype(np.float32),
        )  # fmt: skip
        np.testing.assert_array_equal(found, expected)
        assert focal > 3 or expected.sum() > 50  # wide ones see nearly all


def test_activations_that_overflow_float16_are_found_before_the_file_is_written():
    model = build_student(encoder="resnet18", **SMALL)
    variables = perturbed(model)
    quantize.check_half(graph_of(model, variables), "here")
    norm = variables["params"][ENCODER_SCOPE]["bn1"]
    norm["bias"] = np.full_like(norm["bias"], 6e4)
    with pytest.raises(DataError, match=r"here: values up to .* \(encoder/.*\) do not fit float16; export float32"):
        quantize.check_half(graph_of(model, variables), "here")


@pytest.mark.parametrize("count", [3, 4, 6, 8])
def test_views_that_only_touch_are_not_adjacent(count):
    intrinsics = np.tile(np.eye(3, dtype=np.float32), (count, 1, 1))
    intrinsics[:, 0, 0], intrinsics[:, 0, 2] = SIZE[1] / 2 / np.tan(np.pi / count), SIZE[1] / 2 - 0.5
    for turn in (0.0, 0.3, 1.1):
        spin = np.eye(4)
        spin[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
        found = evaluated(
            lambda g: onnx_cross_view.visible(g, "intrinsics", "cam_to_ego", SIZE[1]),
            intrinsics=intrinsics, cam_to_ego=(spin @ ring_cam_to_ego(count)).astype(np.float32),
        )  # fmt: skip
        np.testing.assert_array_equal(found, np.eye(count, dtype=bool))


def test_rays_are_those_of_the_network():
    given = rig(range(6), 60)
    calibration = {name: given[name] for name in ("intrinsics", "cam_to_ego")}
    cells = SIZE[0] // 32, SIZE[1] // 32
    found = evaluated(lambda g: onnx_cross_view.rays(g, "intrinsics", "cam_to_ego", cells, 32), **calibration)
    wanted = cross_view.ray_directions(*(jnp.asarray(each)[None] for each in calibration.values()), *cells, 32)
    np.testing.assert_allclose(found.reshape(wanted.shape[1:]), wanted[0], atol=1e-6)


def test_focal_length_sets_the_scale():
    model = build_student(encoder="resnet18", **SMALL)
    variables = perturbed(model)
    run = session(graph_of(model, variables).SerializeToString())
    images, intrinsics = inputs(2)
    (depth,) = run.run(None, {"images": images, "intrinsics": intrinsics})
    intrinsics[0, 0, 0] *= 2
    (longer,) = run.run(None, {"images": images, "intrinsics": intrinsics})
    np.testing.assert_allclose(longer[0], 2 * depth[0], rtol=1e-5)
    np.testing.assert_array_equal(longer[1], depth[1])


def test_levels_of_one_channel_are_not_depthwise():
    model = build_student(encoder="resnet18", **{**SMALL, "decoder_channels": (4, 1, 8, 1, 6)})
    variables = perturbed(model)
    compare(model, variables, graph_of(model, variables).SerializeToString(), named(1, seed=1))


@pytest.mark.parametrize("blocks", [0, 1])
def test_half_precision_keeps_inputs_outputs_head_and_attention(blocks):
    """Random networks enlarge what float16 rounds (1 in 2,000): depth stays within 1 % in the median, 10 % at most."""
    model = build_student(encoder="resnet18", cross_view_blocks=blocks, **SMALL)
    variables = perturbed(model)
    graph = graph_of(model, variables, half=True, confidence=True)
    kinds = onnx.TensorProto
    types = {each.name: each.type.tensor_type.elem_type for each in (*graph.graph.input, *graph.graph.output)}
    assert types.pop("images") == kinds.UINT8 and set(types.values()) == {kinds.FLOAT}
    parts = {kinds.FLOAT: set(), kinds.FLOAT16: set()}
    for each in graph.graph.initializer:
        if each.data_type in parts and np.prod(each.dims) > 4:  # scales of a Resize are float32 everywhere
            parts[each.data_type].add(each.name.split("/")[0])
    assert parts[kinds.FLOAT16] == {"encoder", "decoder"}
    assert parts[kinds.FLOAT] == ({"head", "cross_view"} if blocks else {"head"})
    given = rig((0, 1, 2), 60) if blocks else named(3)
    depth, sure = session(graph.SerializeToString()).run(None, given)
    wanted = np.asarray(outputs_of(model, variables, **given)["pred_depth"][0])
    error = np.abs(depth / wanted - 1)
    assert 0 < np.median(error) < 0.01 and error.max() < 0.1 and np.isfinite(sure).all()


def test_what_does_not_fit_is_said():
    model = build_student(encoder="resnet18", **SMALL)
    with pytest.raises(ConfigError, match="multiples of 32, got 60x96"):
        student_graph(model, {}, (60, 96))
    variables = perturbed(model)
    variables["params"]["decoder"]["up_0"]["kernel"][0, 0, 0, 0] = 1e6
    with pytest.raises(DataError, match="does not fit float16; export float32"):
        graph_of(model, variables, half=True)
