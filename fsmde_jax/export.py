"""A trained student as an ONNX file: images of any number of views and their intrinsics in, metric depth out.

  python -m fsmde_jax.export --checkpoint runs/nuscenes --out nuscenes.onnx
  python -m fsmde_jax.export --checkpoint lite0 --out lite0.onnx --image_size 128x224

Inputs `images` uint8 [views, H, W, 3], RGB, and `intrinsics` float32 [views, 3, 3], pixels at H x W (resize a picture
and its intrinsics together: the focal length fx sets the metric scale). Output `depth` float32 [views, H, W], metres.
Normalisation is inside, teacher and optimiser are not; the numbers are float32 whatever the student was trained in.
What it is, its depth range and the focal lengths that it serves are in the file's metadata, too. Needs onnx
(pip install onnx). Without a graph: model.cross_view_blocks, bins=attractor, probabilities=log_binomial.
"""

import argparse
import importlib.util
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fsmde_jax import compatible
from fsmde_jax.data.tfrecord import write_atomically
from fsmde_jax.errors import ConfigError, DataError, exit_with_message
from fsmde_jax.models.depth_bins import FOCAL_WIDTH
from fsmde_jax.models.onnx_graph import student_graph
from fsmde_jax.models.registry import build_student
from fsmde_jax.models.student import STRIDE
from fsmde_jax.students import read_student


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not found or any(int(side) % STRIDE for side in found.groups()):
        raise ConfigError(f"--image_size {text}: expected HEIGHTxWIDTH, multiples of {STRIDE}, e.g. 352x640")
    return int(found[1]), int(found[2])


def export_onnx(where: str, out: str | Path, image_size: str = "") -> dict[str, Any]:
    """Writes a student as ONNX.

    Args:
      where: a run, a student's .safetensors file, or "lite0".
      out: new .onnx file.
      image_size: HEIGHTxWIDTH; "" = what it was trained on.

    Returns:
      What is in the file's metadata: source, image_size and trained_image_size, trained_dtype, depth_range_m (what
      every camera within focal_range_px can reach), focal_range_px (fx at this width).

    Raises:
      ConfigError: the name, the size, a file that is there already, or a part of the model that has no graph; onnx is
        not installed. DataError, TrainingError: the student cannot be read, or the file not be written.
    """
    out = Path(out)
    if out.suffix != ".onnx":
        raise ConfigError(f"--out {out}: expected a name that ends in .onnx")
    try:
        if out.exists():
            raise ConfigError(f"--out {out}: exists already; choose another name or delete it")
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be used ({error.strerror})") from error
    if importlib.util.find_spec("onnx") is None:
        raise ConfigError("not installed: onnx; pip install onnx")
    wanted = _size(image_size) if image_size else None
    tree, meta, _ = read_student(where)
    config = meta["identity"]["config"]
    if config.get("task", "student") != "student":
        raise ConfigError(f"--checkpoint {where}: trains a teacher; expected a student")
    model = build_student(**compatible.model_of(config))
    trained = tuple(config["data"]["image_size"])
    size = wanted or trained
    graph = student_graph(model, tree["params"], tree["batch_stats"], size)
    card = {
        "source": f"{meta['source']} (step {meta['step']})",
        "image_size": list(size),
        "trained_image_size": list(trained),
        "trained_dtype": str(config["model"].get("dtype", "float32")),
        "depth_range_m": [model.min_depth, model.max_depth],
        "focal_range_px": [focal * size[1] / FOCAL_WIDTH for focal in model.focal_range],
    }
    for key, value in card.items():
        graph.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, graph.SerializeToString())
    except OSError as error:
        raise DataError(f"{out}: cannot write ({error.strerror}); free space or choose another place") from error
    return card


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fsmde_jax.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="C", help="a run, a student's .safetensors file, or lite0"
    )
    parser.add_argument("--out", required=True, metavar="FILE.onnx", help="new file")
    parser.add_argument(
        "--image_size", default="", metavar="HxW", help="pixels, multiples of 32 (default: what it was trained on)"
    )
    args = parser.parse_args(argv)
    with exit_with_message():
        card = export_onnx(args.checkpoint, args.out, args.image_size)
        height, width = card["image_size"]
        low, high = card["focal_range_px"]
        print(f"{args.out}: {card['source']}, any number of views of {height}x{width}, depth in metres")
        print(f"for focal lengths fx from {low:.0f} to {high:.0f} px at that width")
        if card["image_size"] != card["trained_image_size"]:
            print("note: trained at {}x{}; measure how good it is at another size".format(*card["trained_image_size"]))
        if card["trained_dtype"] != "float32":
            print(f"note: trained in {card['trained_dtype']}; the file computes in float32")


if __name__ == "__main__":
    main()
