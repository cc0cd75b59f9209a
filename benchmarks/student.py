"""A student as it predicts a rig, and where its time goes: parts of `benchmarks.latency`."""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.teacher import gflops, relative, time_sides

VIEWS = 6
Size = tuple[int, int]  # height, width in pixels


def student(encoder: str, dtype: str, size: Size, rigs: int = 1) -> tuple[Any, Any, tuple[Any, ...]]:
    """The student of configs/base.py with this encoder: the module, the jitted `predict` and its arguments."""
    import jax.numpy as jnp
    import optax

    from configs import base
    from fsmde_jax import build, sharding, state

    config = base.get_config()
    config.model.encoder, config.model.dtype = encoder, dtype
    model = build.build_model(config)
    born = state.init_state(model, optax.identity(), 0, VIEWS, size, sharding.make_mesh())
    height, width = size
    focal = config.model.focal_canonical * width / 640
    intrinsics = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float32)
    batch = {
        "images": jnp.asarray(np.random.default_rng(0).integers(0, 256, (rigs, VIEWS, *size, 3), np.uint8)),
        "intrinsics": jnp.tile(intrinsics, (rigs, VIEWS, 1, 1)),
        "cam_to_ego": jnp.tile(jnp.eye(4), (rigs, VIEWS, 1, 1)),
        "view_mask": jnp.ones((rigs, VIEWS), bool),
    }
    return model, state.make_predict(model, build.read_fn(config)), (born.params, born.batch_stats, batch)


def exported_call(model: Any, arguments: tuple[Any, ...], size: Size, threads: int) -> Callable[[], np.ndarray]:
    """onnxruntime on the export of what `student` gives: a call that gives depth [1, 6, H, W] of the same images."""
    import onnxruntime

    from fsmde_jax.models.onnx_graph import student_graph

    params, batch_stats, batch = arguments
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # else it takes time from the next side
    graph = student_graph(model, {"params": params, "batch_stats": batch_stats}, size)
    session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    given = {name: np.asarray(batch[name][0]) for name in ("images", "intrinsics")}
    return lambda: session.run(None, given)[0][None]


def pieces(
    model: Any, size: Size, arguments: tuple[Any, ...]
) -> tuple[dict[str, tuple[Any, tuple[Any, ...], float]], Any]:
    """The student cut in four: name -> compiled program, its arguments and GFLOPs; the depth [6, H, W] they give."""
    import jax
    import jax.numpy as jnp

    from fsmde_jax.expectation import expected_depth
    from fsmde_jax.models import depth_bins
    from fsmde_jax.models import student as models
    from fsmde_jax.models.decoder import Decoder

    params, batch_stats, batch = arguments
    span = depth_bins.canonical_range(model.min_depth, model.max_depth, model.focal_canonical, model.focal_range)
    modules: dict[str, Any] = {
        models.ENCODER_SCOPE: models.make_encoder(model.encoder, model.dtype),
        "decoder": Decoder(model.decoder_channels, model.dtype),
        "depth_bins": depth_bins.DepthBins(model.bins, model.probabilities, model.num_bins, span),
    }

    def encode(variables: Any, images: Any) -> Any:
        x = models.normalise_images(images).reshape(-1, *images.shape[2:])
        return modules[models.ENCODER_SCOPE].apply(variables, x, train=False)

    def decode(variables: Any, taps: Any) -> Any:
        levels = modules["decoder"].apply(variables, taps, train=False)
        return levels[0], levels[-1]

    def expect(variables: Any, levels: Any, intrinsics: Any) -> Any:
        ratio = depth_bins.focal_ratio(intrinsics, size[1], model.focal_canonical).reshape(-1)
        descriptor = jnp.mean(levels[1].astype(jnp.float32), (1, 2))
        out = modules["depth_bins"].apply(variables, levels[0], descriptor, ratio)
        return expected_depth(jax.nn.softmax(out["bin_logits"], -1), out["bin_centers"], model.expectation)

    def enlarge(depth: Any) -> Any:
        return depth_bins.resize_depth(depth, *size)

    def variables(scope: str) -> dict[str, Any]:
        return {"params": params[scope], "batch_stats": batch_stats.get(scope, {})}

    found = {}

    def cut(name: str, function: Callable[..., Any], *given: Any) -> Any:
        run = jax.jit(function)
        compiled = run.lower(*given).compile()
        found[name] = compiled, given, gflops(run, *given)
        return compiled(*given)

    taps = cut("encoder", encode, variables(models.ENCODER_SCOPE), batch["images"])
    levels = cut("decoder", decode, variables("decoder"), taps)
    depth = cut("head: logits, expectation", expect, variables("depth_bins"), levels, batch["intrinsics"])
    return found, cut("resize", enlarge, depth)


def profile(encoder: str, dtype: str, size: Size, repeats: int) -> dict[str, Any]:
    """Time of each piece of a student, jitted by itself, and of the whole; all of them in turn."""
    import jax

    model, run, arguments = student(encoder, dtype, size)
    cuts, depth = pieces(model, size, arguments)
    cuts["whole"] = run.lower(*arguments).compile(), arguments, gflops(run, *arguments)

    def call_of(compiled: Any, given: tuple[Any, ...]) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(compiled(*given))

    calls = {name: call_of(*cut[:2]) for name, cut in cuts.items()}
    seconds = time_sides(calls, repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    total = sum(value for name, value in medians.items() if name != "whole")
    rows = [
        {"piece": name, "seconds": times, "median": medians[name], "share": medians[name] / total,
         "gflops": cuts[name][2]}
        for name, times in seconds.items()
    ]  # fmt: skip
    error = relative(np.asarray(depth), np.asarray(calls["whole"]())[0])
    return {"side": f"{encoder}, {dtype}", "pieces": rows, "relative_error": error}


def profile_table(found: dict[str, Any]) -> str:
    """A profile in Markdown."""
    lines = [f"{found['side']}\n", "| piece | median s | share of the pieces | GFLOPs | GFLOP/s |", "|---" * 5 + "|"]
    for row in found["pieces"]:
        rate = row["gflops"] / row["median"]
        lines.append(
            f"| {row['piece']} | {row['median']:.4f} | {100 * row['share']:.1f} % | {row['gflops']:.2f} | {rate:.1f} |"
        )
    return "\n".join(lines) + "\n"
