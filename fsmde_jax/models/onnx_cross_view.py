"""The mixing of views (`models.cross_view`) as nodes of an ONNX graph: all views of a call are one rig.

Who is adjacent and where a token looks are computed in the graph from the calibration. Intrinsics are taken to be
[[fx, s, cx], [0, fy, cy], [0, 0, 1]], as everywhere in the project (`geometry.check_intrinsics`).
"""

import math

import numpy as np

from fsmde_jax import geometry
from fsmde_jax.models import cross_view
from fsmde_jax.models.onnx_nodes import Graph, Params, Size

_HIDDEN = -1e30  # score of a token that is not looked at


def _entry(g: Graph, matrix: str, row: int, column: int) -> str:
    """[M, 1, 1] of matrices [M, r, c]."""
    return g.slice(g.slice(matrix, 1, row, row + 1), 2, column, column + 1)


def visible(g: Graph, intrinsics: str, cam_to_ego: str, width: int) -> str:
    """[M, M] bool: `geometry.adjacency` or oneself.

    There is no atan2 here, so angles are compared by their chords: between unit vectors a and b, |a - b| = 2 sin(angle
    / 2), which grows up to half a turn.
    """
    x, y = (_entry(g, cam_to_ego, row, 2) for row in (0, 1))
    # An optical axis straight up or down has yaw 0, as atan2(0, 0).
    vertical = g.node("Equal", g.node("Add", g.node("Abs", x), g.node("Abs", y)), g.constant(np.float32(0)))
    axis = g.node("Concat", g.node("Where", vertical, g.constant(np.float32(1)), x), y, axis=1)  # [M, 2, 1]
    axis = g.node("Div", axis, g.node("ReduceL2", axis, axes=[1], keepdims=1))
    across = g.node("Sub", axis, g.node("Transpose", axis, perm=[2, 1, 0]))  # [M, 2, M]
    chord = g.node("ReduceL2", across, axes=[1], keepdims=0)
    fx, cx = _entry(g, intrinsics, 0, 0), _entry(g, intrinsics, 0, 2)
    left = g.node("Atan", g.node("Div", g.plus(cx, 0.5), fx))
    right = g.node("Atan", g.node("Div", g.node("Sub", g.constant(np.float32(width - 0.5)), cx), fx))
    fov = g.squeeze(g.node("Add", left, right), 2)  # [M, 1]
    both = g.node("Add", fov, g.node("Transpose", fov, perm=[1, 0]))  # [M, M]: twice the largest angle
    half = g.plus(g.times(both, 0.25), -0.5 * geometry.LEAST_OVERLAP)
    return g.node("Less", chord, g.times(g.node("Sin", half), 2.0))


def rays(g: Graph, intrinsics: str, cam_to_ego: str, cells: Size, stride: int) -> str:
    """`cross_view.ray_directions` [M, h * w, 3]."""
    v, u = ((np.arange(count) + 0.5) * stride - 0.5 for count in cells)
    grid_v, grid_u = (each.reshape(1, -1, 1) for each in np.meshgrid(v, u, indexing="ij"))
    fx, skew, cx = (_entry(g, intrinsics, 0, column) for column in range(3))
    fy, cy = _entry(g, intrinsics, 1, 1), _entry(g, intrinsics, 1, 2)
    y = g.node("Div", g.node("Sub", g.constant(grid_v), cy), fy)  # [M, h w, 1]
    x = g.node("Sub", g.node("Sub", g.constant(grid_u), cx), g.node("Mul", skew, y))
    x = g.node("Div", x, fx)
    rotation = g.node("Transpose", g.slice(cam_to_ego, 1, 0, 3), perm=[0, 2, 1])  # rows: the camera's axes
    right, down, forward = (g.slice(g.slice(rotation, 1, i, i + 1), 2, 0, 3) for i in range(3))  # [M, 1, 3]
    found = g.node("Add", g.node("Add", g.node("Mul", x, right), g.node("Mul", y, down)), forward)
    return g.node("Div", found, g.node("ReduceL2", found, axes=[2], keepdims=1))


def _norm(g: Graph, x: str, params: Params) -> str:
    scale, bias = (g.constant(np.asarray(params[name])) for name in ("scale", "bias"))
    return g.node("LayerNormalization", x, scale, bias, axis=-1, epsilon=1e-6)


def _block(g: Graph, tokens: str, waves: str, hidden: str, params: Params) -> str:
    """Tokens [T, C] -> [T, C]; waves [T, F] of their rays; hidden [T, T], added to the scores."""
    heads = cross_view.CrossViewBlock.heads
    width = np.shape(params["query"]["kernel"])[1]

    def split(x: str, perm: list[int]) -> str:
        return g.node("Transpose", g.reshape(x, -1, heads, width // heads), perm=perm)

    place = g.dense(waves, params["place"])
    y = _norm(g, tokens, params["norm1"])
    query = split(g.node("Add", g.dense(y, params["query"]), place), [1, 0, 2])  # [heads, T, d]
    key = split(g.node("Add", g.dense(y, params["key"]), place), [1, 2, 0])  # [heads, d, T]
    value = split(g.dense(y, params["value"]), [1, 0, 2])
    scores = g.node("MatMul", g.times(query, 1 / math.sqrt(width // heads)), key)
    y = g.node("MatMul", g.node("Softmax", g.node("Add", scores, hidden), axis=-1), value)
    y = g.reshape(g.node("Transpose", y, perm=[1, 0, 2]), -1, width)
    tokens = g.node("Add", tokens, g.dense(y, params["out"]))
    y = g.dense(_norm(g, tokens, params["norm2"]), params["mlp_hidden"])
    y = g.node("Mul", g.times(y, 0.5), g.plus(g.node("Erf", g.times(y, math.sqrt(0.5))), 1.0))  # GELU
    return g.node("Add", tokens, g.dense(y, params["mlp_out"]))


def mix(g: Graph, x: str, calibration: tuple[str, str], params: Params, size: Size, stride: int) -> str:
    """Features [M, C, h, w] of the M views of one rig, mixed.

    Args:
      calibration: intrinsics [M, 3, 3] in pixels of `size`, and cam_to_ego [M, 4, 4].
      params: of `cross_view.CrossView`; size: H and W of the images.
    """
    cells = size[0] // stride, size[1] // stride
    count = cells[0] * cells[1]
    seen = visible(g, *calibration, size[1])
    hidden = g.node("Where", seen, g.constant(np.float32(0)), g.constant(np.float32(_HIDDEN)))
    hidden = g.plus(g.unsqueeze(hidden, 1, 3), np.zeros((1, count, 1, count)))  # [M, h w, M, h w]
    hidden = g.node("Flatten", hidden, axis=2)
    looking = rays(g, *calibration, cells, stride)
    waves = [g.node(kind, g.times(looking, f)) for f in cross_view.FREQUENCIES for kind in ("Sin", "Cos")]
    waves_of_tokens = g.node("Flatten", g.node("Concat", *waves, axis=2), axis=2)
    tokens = g.pixels(x)
    for i in range(len(params)):
        tokens = _block(g, tokens, waves_of_tokens, hidden, params[f"block_{i}"])
    channels = np.shape(params["block_0"]["out"]["kernel"])[1]
    return g.node("Transpose", g.reshape(tokens, -1, *cells, channels), perm=[0, 3, 1, 2])
