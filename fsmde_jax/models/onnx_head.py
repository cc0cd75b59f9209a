"""The metric head (`models.depth_bins`) as nodes of an ONNX graph, float32: bins, probabilities, depth, confidence."""

import math
from collections.abc import Sequence

import numpy as np

from fsmde_jax.models.depth_bins import ALPHA, FOCAL_WIDTH, TEMPERATURES, DepthBins, canonical_range, log_choose
from fsmde_jax.models.onnx_nodes import Graph, Params, Size
from fsmde_jax.models.student import Student

WITHIN = 1.25  # factor of `confidence`


def _positions(g: Graph, deepest: str, model: Student, params: Params) -> str:
    """Centers [M, K] as positions in (0, 1) of the range, ascending; [1, K] where the picture has no say."""
    k = model.num_bins
    if model.bins in ("uniform", "sid"):
        return g.constant((np.arange(k)[None] + 0.5) / k)
    x = g.node("Relu", g.dense(g.node("ReduceMean", deepest, axes=[2, 3], keepdims=0), params["widths_hidden"]))
    x = g.plus(g.node("Softplus", g.dense(x, params["widths_out"])), 1e-3)
    x = g.node("Div", x, g.sum(x, 1))
    return g.node("Sub", g.node("CumSum", x, g.constant(np.int64(1))), g.times(x, 0.5))


def _attracted(g: Graph, position: str, levels: Sequence[str], params: Params) -> str:
    """Positions [M, K] -> [M, K, h, w], moved by the attractors of each level (coarse to fine) in turn."""
    position = g.unsqueeze(position, 2, 3)
    for i, level in enumerate(levels):
        x = level
        for name in (f"attractor_{i}_hidden", f"attractor_{i}_out"):
            x = g.node("Relu", x) if x != level else x
            x = g.convolution(x, np.asarray(params[name]["kernel"])[None, None], params[name]["bias"])
        attractors = g.unsqueeze(g.node("Sigmoid", x), 2)  # [M, A, 1, h, w]
        position = g.scaled(position, 2, "linear") if i > 0 else position
        away = g.node("Sub", attractors, g.unsqueeze(position, 1))  # [M, A, K, h, w]
        step = g.node("Div", away, g.plus(g.times(g.node("Mul", away, away), ALPHA), 1.0))
        position = g.node("Add", position, g.node("ReduceMean", step, axes=[1], keepdims=0))
    return position


def _centers(g: Graph, levels: Sequence[str], intrinsics: str, model: Student, params: Params, size: Size) -> str:
    """Metric bin centers [M, 1, K], nearest first, or [M, h w, K] for `attractor`, from the decoder's levels."""
    lo, hi = canonical_range(model.min_depth, model.max_depth, model.focal_canonical, model.focal_range)
    linear = model.bins in ("linear", "uniform")
    if not linear:
        lo, hi = math.log(lo), math.log(hi)
    place = _positions(g, levels[-1], model, params)
    if model.bins == "attractor":
        coarse_to_fine = levels[len(DepthBins.attractors) - 1 :: -1]
        place = g.node("Transpose", _attracted(g, place, coarse_to_fine, params), perm=[0, 2, 3, 1])
        place = g.reshape(place, -1, size[0] // 2 * (size[1] // 2), model.num_bins)
    else:
        place = g.unsqueeze(place, 1)
    depth = g.plus(g.times(place, hi - lo), lo)
    depth = depth if linear else g.node("Exp", depth)
    focal = g.node("Slice", intrinsics, *(g.constant(np.array(v)) for v in ([0, 0], [1, 1], [1, 2])))  # fx [M, 1, 1]
    return g.node("Mul", depth, g.times(focal, FOCAL_WIDTH / (model.focal_canonical * size[1])))


def _probabilities(g: Graph, finest: str, model: Student, params: Params, size: Size) -> str:
    """[M, h w, K] from the decoder's level at stride 2."""
    x = g.pixels(finest)
    if model.probabilities == "softmax":
        logits = g.dense(x, params["logits"])
    else:
        x = g.dense(g.node("Relu", g.dense(x, params["binomial_hidden"])), params["binomial_out"])  # [M h w, 2]
        low, high = TEMPERATURES
        temperature = g.plus(g.times(g.node("Sigmoid", g.slice(x, 1, 1, 2)), high - low), low)
        logits = g.times(g.slice(x, 1, 0, 1), np.arange(model.num_bins)[None])
        logits = g.node("Div", g.plus(logits, log_choose(model.num_bins)[None]), temperature)
    return g.reshape(g.node("Softmax", logits, axis=-1), -1, size[0] // 2 * (size[1] // 2), model.num_bins)


def _within(g: Graph, depth: str, p: str, log_centers: str, size: Size) -> str:
    """`confidence.within` [M, h w, 1] of depth [M, 1, H, W] metres, p [M, h w, K], log centers as `_centers`.

    p_k lies evenly in log depth between its bin's edges; so it counts by the length that the bin shares with
    log depth -+ log 1.25.
    """
    k = np.iinfo(np.int32).max
    middle = g.times(g.node("Add", g.slice(log_centers, 2, 1, k), g.slice(log_centers, 2, 0, -1)), 0.5)
    first, last = g.slice(log_centers, 2, 0, 1), g.slice(log_centers, 2, -1, k)
    first = g.node("Sub", g.times(first, 2.0), g.slice(middle, 2, 0, 1))
    last = g.node("Sub", g.times(last, 2.0), g.slice(middle, 2, -1, k))
    low = g.node("Concat", first, middle, axis=2)
    high = g.node("Max", g.node("Concat", middle, last, axis=2), g.plus(low, 1e-5))  # equal centers make a step
    coarse = g.node("AveragePool", depth, kernel_shape=[2, 2], strides=[2, 2])
    at = g.reshape(g.node("Log", coarse), -1, size[0] // 2 * (size[1] // 2), 1)
    nearest = g.node("Max", g.plus(at, -math.log(WITHIN)), low)
    farthest = g.node("Min", g.plus(at, math.log(WITHIN)), high)
    shared = g.node("Relu", g.node("Sub", farthest, nearest))
    return g.sum(g.node("Mul", g.node("Div", shared, g.node("Sub", high, low)), p), 2)


def head(
    g: Graph, levels: Sequence[str], intrinsics: str, model: Student, params: Params, size: Size, *, confidence: bool
) -> None:
    """Puts out `depth` [M, H, W] metres and, if asked for, `confidence` (`depth_model.Prediction`).

    Args:
      levels: of the decoder at strides 2, 4, 8, 16, 32, float32; intrinsics: [M, 3, 3] pixels of `size`.
      params: of the head; size: H and W of the images.
    """
    height, width = size[0] // 2, size[1] // 2
    centers = _centers(g, levels, intrinsics, model, params, size)
    p = _probabilities(g, levels[0], model, params, size)
    log = model.expectation == "log"
    values = log_centers = g.node("Log", centers) if log or confidence else centers
    values = values if log else centers
    if model.bins == "attractor":
        depth = g.sum(g.node("Mul", p, values), 2)
    else:
        depth = g.node("MatMul", p, g.reshape(values, -1, model.num_bins, 1))
    depth = g.node("Exp", depth) if log else depth
    depth = g.scaled(g.reshape(depth, -1, 1, height, width), 2, "linear")
    g.squeeze(depth, 1, name="depth")
    if confidence:
        sure = g.reshape(_within(g, depth, p, log_centers, size), -1, 1, height, width)
        g.squeeze(g.scaled(sure, 2, "linear"), 1, name="confidence")
