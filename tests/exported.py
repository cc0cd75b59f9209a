"""Students with random parameters, and their ONNX graphs in onnxruntime beside them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime

from fsmde_jax import depth_model
from fsmde_jax.models.student import normalise_images
from tests.sample_factory import ring_cam_to_ego

SIZE = (64, 96)
SMALL = {"decoder_channels": (4, 6, 8, 10, 12), "num_bins": 7, "focal_range": (100.0, 900.0)}


def inputs(views, seed=0):
    """Images [views, H, W, 3] and intrinsics [views, 3, 3] of which only fx means anything."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (views, *SIZE, 3), np.uint8)
    intrinsics = np.tile(np.array([[0, 0, 48], [0, 0, 32], [0, 0, 1]], np.float32), (views, 1, 1))
    intrinsics[:, 0, 0] = rng.uniform(40, 100, views)
    intrinsics[:, 1, 1] = 1e3  # not looked at
    return images, intrinsics


def rig(chosen, focal, seed=0):
    """Arguments of a graph with attention between views: these cameras of a ring of six, with a skew each."""
    rng = np.random.default_rng(seed)
    images, intrinsics = inputs(len(chosen), seed)
    intrinsics[:, 0, 0] = focal * rng.uniform(0.9, 1.1, len(chosen))
    intrinsics[:, 1, 1] = focal * rng.uniform(0.9, 1.1, len(chosen))
    intrinsics[:, 0, 1] = rng.uniform(-3, 3, len(chosen))
    intrinsics[:, :2, 2] += rng.uniform(-4, 4, (len(chosen), 2)).astype(np.float32)
    poses = ring_cam_to_ego(6)[list(chosen)].astype(np.float32)
    return {"images": images, "intrinsics": intrinsics, "cam_to_ego": poses}


def outputs_of(model, variables, images, intrinsics, cam_to_ego=None):
    """Of the student itself, for one rig."""
    run = jax.jit(partial(model.apply, train=False))
    poses = np.tile(np.eye(4, dtype=np.float32), (len(images), 1, 1)) if cam_to_ego is None else cam_to_ego
    return run(variables, normalise_images(jnp.asarray(images))[None], jnp.asarray(intrinsics)[None], poses[None])


def perturbed_tree(shapes, seed=1):
    """Variables of these shapes far from their first values: no scale, shift, mean or variance can be left out."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            fan_in = np.prod(leaf.shape[:-1])
            return rng.normal(0, 1.4 / np.sqrt(fan_in), leaf.shape).astype(np.float32)
        low, high = {"scale": (0.6, 1.4), "var": (0.5, 1.5)}.get(name, (-0.3, 0.3))
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def shapes_of(model):
    """Variables of a new student as shapes."""
    images, intrinsics = inputs(1)
    return jax.eval_shape(
        lambda: model.init(
            jax.random.key(0), jnp.zeros((1, *images.shape)), jnp.asarray(intrinsics)[None], jnp.eye(4)[None, None],
            train=False,
        )
    )  # fmt: skip


def perturbed(model, seed=1):
    """Variables of a student (`perturbed_tree`)."""
    images, intrinsics = inputs(1)
    variables = perturbed_tree(shapes_of(model), seed)
    logits = outputs_of(model, variables, images, intrinsics)["bin_logits"]
    # Deep random networks have wide logits, whose softmax would jump from bin to bin by what float32 rounds.
    last = variables["params"]["depth_bins"].get("logits")
    if last is not None:
        last["kernel"] = last["kernel"] / logits.std()
    return variables


def session(source):
    return onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])


def compare(model, variables, source, given, rtol=2e-4):
    """A graph or a file against the student, depth and (where the graph has it) confidence."""
    run = session(source)
    found = dict(zip([out.name for out in run.get_outputs()], run.run(None, given), strict=True))
    expected = {k: np.asarray(v[0]) for k, v in depth_model.read(outputs_of(model, variables, **given)).items()}
    for name, each in found.items():
        assert each.shape == given["images"].shape[:3] and each.dtype == np.float32
        if name == "depth":
            assert expected[name].std() > 0.05 * expected[name].mean()  # a picture, no constant
            np.testing.assert_allclose(each, expected[name], rtol=rtol)
        else:
            np.testing.assert_allclose(each, expected[name], atol=1e-3)
    return found
