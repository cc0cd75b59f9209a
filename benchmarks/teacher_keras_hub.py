"""Depth Anything Small here against KerasHub's backbone on JAX: time of a forward pass, in turn in one process.

KerasHub declares TensorFlow as a dependency on Linux, but its backbone runs without it. In an environment of its own:

  pip install -r requirements.txt && pip install --no-deps keras keras-hub kagglesdk h5py namex optree
  pip install rich regex kagglehub sentencepiece tokenizers
  python -m benchmarks.teacher_keras_hub

Both have random weights (their time does not depend on them), float32, the same cores and settings of malloc
(`benchmarks.teacher`), and are jitted; compilation is not counted.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks.teacher import port, random_parameters, same_conditions

SIZES = ((1, 518, 518), (6, 518, 518))  # KerasHub takes square images only


def ours(size: tuple[int, int, int]) -> Callable[[Any], Any]:
    """This project's Small."""
    run, params = port("small", "float32"), random_parameters("small")
    return lambda images: run(params, images)


def theirs(size: tuple[int, int, int]) -> Callable[[Any], Any]:
    """KerasHub's."""
    import jax
    from keras_hub.models import DepthAnythingBackbone, DINOV2Backbone

    shape = (*size[1:], 3)
    encoder = DINOV2Backbone(
        patch_size=14, num_layers=12, hidden_dim=384, num_heads=6, intermediate_dim=1536, image_shape=shape,
        position_embedding_shape=(518, 518, 3), apply_layernorm=True,
    )  # fmt: skip
    model = DepthAnythingBackbone(
        image_encoder=encoder, reassemble_factors=[4, 2, 1, 0.5], neck_hidden_dims=[48, 96, 192, 384],
        fusion_hidden_dim=64, head_hidden_dim=32, head_in_index=-1,
        feature_keys=["stage3", "stage6", "stage9", "stage12"],
    )  # fmt: skip
    trainable = [v.value for v in model.trainable_variables]
    other = [v.value for v in model.non_trainable_variables]
    run = jax.jit(lambda a, b, images: model.stateless_call(a, b, images, training=False)[0])
    return lambda images: run(trainable, other, images)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.teacher_keras_hub", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="runs of each (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="cores of both (default 2)")
    args = parser.parse_args()
    same_conditions(args.threads)
    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    import keras_hub
    import numpy as np

    print(f"jax {jax.__version__}, keras_hub {keras_hub.__version__}, {jax.devices()[0].device_kind}")
    for size in SIZES:
        images = jax.device_put(np.random.default_rng(0).normal(size=(*size, 3)).astype(np.float32))
        sides = {"here": ours(size), "KerasHub": theirs(size)}
        for run in sides.values():
            jax.block_until_ready(run(images))
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(args.repeats):
            for name, run in sides.items():
                started = time.perf_counter()
                jax.block_until_ready(run(images))
                times[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(values) for name, values in times.items()}
        shown = ", ".join(f"{name} {value:.3f} s" for name, value in medians.items())
        print(f"{'x'.join(map(str, size))}: {shown}; ratio {medians['here'] / medians['KerasHub']:.2f}")


if __name__ == "__main__":
    main()
