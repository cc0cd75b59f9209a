"""A trained student for use elsewhere: its inference parameters alone, with a card that says what it expects.

  python -m fsmde_jax.export --checkpoint runs/nuscenes --out nuscenes.onnx    # onnxruntime, TensorRT
  python -m fsmde_jax.export --checkpoint lite0 --out lite0.onnx --image_size 128x224
  python -m fsmde_jax.export --checkpoint runs/nuscenes --format stablehlo --out exported/nuscenes.stablehlo
  python -m fsmde_jax.export --checkpoint lite0 --format orbax --out exported/lite0

onnx: `images` uint8 [views, H, W, 3], RGB, and `intrinsics` float32 [views, 3, 3], pixels at H x W (resize a picture
and its intrinsics together: the focal length fx sets the metric scale) -> `depth` float32 [views, H, W], metres. The
number of views is free: one camera, some, all. Students that mix views (model.cross_view_blocks > 0) have a third
input, `cam_to_ego` float32 [views, 4, 4] (camera x right, y down, z forward; ego x forward, y left, z up, metres), and
all views of one call are then one rig. --confidence adds a second output, `confidence` float32 [views, H, W]: the
probability, by the student's own bins, that the true depth is within a factor of 1.25 of `depth`; it is no default, as
it takes time. BatchNorm is folded. Its card lies beside it as .json; what the file is, its precision, its depth range
and the focal lengths that it serves are in its metadata, too. Needs onnx (pip install -e ".[export]").

--precision float16: encoder and decoder in float16; inputs, outputs, attention between views and the metric head stay
float32. Half the file. Meant for GPUs (not run on one here): on x86 processors onnxruntime converts to and fro.

--precision int8: encoder and decoder quantised statically, the rest float32; under a third of the file, for processors.
The ranges of the activations are measured on --calibration, a records folder of pictures like those that it will see
(rendered ones for lite0). Needs onnxruntime, too. What it costs in accuracy: python -m benchmarks.export_accuracy.

  python -m data_prep.world --rig nuscenes --scenes 40 --frames 1 --image_size 96x160 --out data/calibration
  python -m data_prep.nuscenes --dataroot data/calibration --version v1.0-trainval --split train \\
      --image_size native --out records/calibration
  python -m fsmde_jax.export --checkpoint lite0 --precision int8 --calibration records/calibration --out lite0_int8.onnx

stablehlo: a program of jax.export for CPU, CUDA and TPU, which needs JAX but no model code, for any number of rigs and
cameras: (images [B, N, H, W, 3], intrinsics [B, N, 3, 3], cam_to_ego [B, N, 4, 4]) -> {"depth", "confidence"}
[B, N, H, W]; its card lies beside it as .json.

orbax: a folder with the parameters (model/) and card.json, for this package's models. With --fold_batchnorm each
BatchNorm's scale is in the kernel before it and only its shift is left: the same function with fewer numbers, for other
tools (JAX is no faster with it); it cannot be trained on.

A card says image size, normalisation, what the cameras have to be, depth range, what evaluations of these parameters
found, and whose terms they may be under. Teacher, projectors and optimiser are in none of the files; numbers are
float32 whatever the student was trained in (but see --precision).
"""

import argparse
import importlib.util
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fsmde_jax import checkpoint, compatible, depth_model, identity, quantize
from fsmde_jax.errors import ConfigError, exit_with_message
from fsmde_jax.models.depth_bins import FOCAL_WIDTH
from fsmde_jax.models.onnx_graph import student_graph
from fsmde_jax.models.registry import build_student
from fsmde_jax.models.student import IMAGE_MEAN, IMAGE_STD, STRIDE, fold_batch_norm, normalise_images
from fsmde_jax.names import check_name, parse_size
from fsmde_jax.students import evaluations, read_student, write_with_card

PLATFORMS = ("cpu", "cuda", "tpu")  # of a StableHLO program
PRECISIONS = ("float32", "float16", "int8")
_CAMERAS = "any number of cameras; pinhole intrinsics in pixels at image_size, pixel centres at integers"
_POSES = "; cam_to_ego [4, 4], camera x right, y down, z forward, ego x forward, y left, z up, metres"
_DTYPES = {1: "float32", 2: "uint8"}  # numbers of onnx.TensorProto


def _check_out(out: Path, suffix: str) -> None:
    if suffix and out.suffix != suffix:
        raise ConfigError(f"--out {out}: expected a name that ends in {suffix}")
    try:
        if out.exists():
            raise ConfigError(f"--out {out}: exists already; choose another name or delete it")
        if suffix and (card := out.with_suffix(".json")).exists():
            raise ConfigError(f"--out {out}: its card would be {card}, which exists already; choose another name")
    except OSError as error:
        raise ConfigError(f"--out {out}: cannot be used ({error.strerror})") from error


def _open(where: str, image_size: str) -> tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """(model, {"params", "batch_stats"}, meta, the card's first part) of a student, read once: a run may train on."""
    wanted = parse_size(image_size, multiple=STRIDE) if image_size else None
    tree, meta, _ = read_student(where)
    config = meta["identity"]["config"]
    if config.get("task", "student") != "student":
        raise ConfigError(f"--checkpoint {where}: trains a teacher; expected a student")
    model = build_student(**{**compatible.model_of(config), "dtype": "float32"})
    trained = tuple(config["data"]["image_size"])
    size = wanted or trained
    return model, tree, meta, {
        "source": f"{meta['source']} (step {meta['step']})",
        "image_size": list(size),
        "trained_image_size": list(trained),
        "trained_dtype": str(config["model"].get("dtype", "float32")),
        "depth_range_m": [model.min_depth, model.max_depth],
        "focal_range_px": [focal * size[1] / FOCAL_WIDTH for focal in model.focal_range],
    }  # fmt: skip


def _full_card(
    where: str, meta: dict[str, Any], card: dict[str, Any], *, rig: str = _CAMERAS + _POSES,
    normalised: str = "inside the file: give it uint8",
) -> dict[str, Any]:  # fmt: skip
    """The card with what a reader elsewhere needs besides: network, images, rig, evaluations, terms.

    `rig` says what cameras have to be, `normalised` who brings images to `mean` and `std`; the rest is as of `_open`.
    """
    path = Path(where)
    found = meta.get("evaluations")
    if found is None:
        found = evaluations(path, meta["step"], meta["identity"]) if path.is_dir() else []
    config = meta["identity"]["config"]
    return {
        **card,
        "model": {**compatible.model_of(config), "dtype": "float32"},  # what the file computes in
        "images": {"order": "RGB", "mean": list(IMAGE_MEAN), "std": list(IMAGE_STD), "of": "values / 255",
                   "normalised": normalised},
        "rig": rig,
        "trained_on": meta["identity"].get("data", {}),
        "trained_by": meta["identity"].get("commit", "unknown"),
        "evaluations": found,
        "evaluations_of": "the student itself, before it was exported",
        "licence": identity.licence_notes(meta["identity"]),
    }  # fmt: skip


def _values(values: Iterable[Any]) -> list[dict[str, Any]]:
    """Name, dtype and shape of an ONNX graph's inputs or outputs; a side that is free has a name."""
    found = []
    for value in values:
        kind = value.type.tensor_type
        shape = [side.dim_param or side.dim_value for side in kind.shape.dim]
        found.append({"name": value.name, "dtype": _DTYPES[kind.elem_type], "shape": shape})
    return found


def export_onnx(
    where: str, out: str | Path, image_size: str = "", *, precision: str = "float32", calibration: str = "",
    calibration_samples: int = 32, confidence: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Writes a student as ONNX, and its card beside it (as `export_stablehlo`).

    Args:
      where: a run, a student's .safetensors file, or "lite0".
      out: new .onnx file.
      image_size: HEIGHTxWIDTH; "" = what it was trained on.
      precision: float32 | float16 | int8, of encoder and decoder; inputs and outputs are the same for all.
      calibration: a records folder, for int8 only; calibration_samples: how many of its rigs are taken.
      confidence: a second output (`depth_model.Prediction`).

    Returns:
      The card. Its first entries are in the file's metadata, too: source, image_size and trained_image_size,
      trained_dtype, depth_range_m (what every camera within focal_range_px can reach), focal_range_px (fx at this
      width), precision, for int8 also calibrated_on. `inputs` and `outputs` are those of the file.

    Raises:
      ConfigError: the name, the size, a file (or card) that is there already, or flags that do not fit; onnx (for int8
        also onnxruntime) is not installed. DataError, TrainingError: student or records cannot be read, or the file not
        be written.
    """
    out = Path(out)
    _check_out(out, ".onnx")
    check_name("--precision", precision, PRECISIONS)
    if calibration and precision != "int8":
        raise ConfigError(f"--calibration {calibration}: of --precision int8 only; leave it out")
    if importlib.util.find_spec("onnx") is None:
        raise ConfigError('not installed: onnx; pip install -e ".[export]"')
    records = quantize.open_calibration(calibration, calibration_samples) if precision == "int8" else None
    model, tree, meta, card = _open(where, image_size)
    height, width = card["image_size"]
    graph = student_graph(model, tree, (height, width), half=precision == "float16", confidence=confidence)
    if precision == "float16":
        quantize.check_half(student_graph(model, tree, (height, width)), where)
    card["precision"] = precision
    if records is not None:
        graph = quantize.quantized(graph, records, calibration_samples)
        taken = min(calibration_samples, len(records))
        card["calibrated_on"] = f"{taken} of {len(records)} records with fingerprint {records.fingerprint}"
    for key, value in card.items():
        graph.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    rig = _CAMERAS + f"{_POSES}; all views of one call are one rig" * bool(model.cross_view_blocks)
    card = {
        **_full_card(where, meta, card, rig=rig), "inputs": _values(graph.graph.input),
        "outputs": _values(graph.graph.output),
    }  # fmt: skip
    write_with_card(out, graph.SerializeToString(), card)
    return card


def export_stablehlo(where: str, out: str | Path, image_size: str = "") -> dict[str, Any]:
    """Writes a student as a program of `jax.export` for CPU, CUDA and TPU, and its card beside it.

    The parameters are constants of the program; B rigs and N cameras stay free. Arguments, returns and errors as
    `export_onnx`, with .stablehlo; the card is the one that is written.
    """
    out = Path(out)
    _check_out(out, ".stablehlo")
    model, tree, meta, card = _open(where, image_size)
    variables = {name: jax.tree.map(jnp.asarray, tree[name]) for name in ("params", "batch_stats")}

    def run(images: jax.Array, intrinsics: jax.Array, cam_to_ego: jax.Array) -> dict[str, jax.Array]:
        outputs = model.apply(variables, normalise_images(images), intrinsics, cam_to_ego, train=False)
        return depth_model.read(outputs)

    rigs, cameras = jax.export.symbolic_shape("rigs, cameras")
    height, width = card["image_size"]
    shapes = (
        jax.ShapeDtypeStruct((rigs, cameras, height, width, 3), jnp.uint8),
        jax.ShapeDtypeStruct((rigs, cameras, 3, 3), jnp.float32),
        jax.ShapeDtypeStruct((rigs, cameras, 4, 4), jnp.float32),
    )
    exported = jax.export.export(jax.jit(run), platforms=PLATFORMS)(*shapes)
    card = {
        **_full_card(where, meta, card), "platforms": list(PLATFORMS), "jax": jax.__version__,
        "call": "jax.export.deserialize(file.read_bytes()).call(images, intrinsics, cam_to_ego) -> {depth, confidence}",
    }  # fmt: skip
    write_with_card(out, bytes(exported.serialize()), card)
    return card


def export_orbax(where: str, out: str | Path, image_size: str = "", *, fold_batchnorm: bool = False) -> dict[str, Any]:
    """Writes a student's parameters as a new folder: an orbax checkpoint `model/` and `card.json`.

    Its card's `model` are the arguments of `registry.build_student`. Arguments, returns and errors as `export_onnx`.
    With `fold_batchnorm` there are no `batch_stats`, and the model's `apply` takes {"params"} alone (`train=False`).
    """
    out = Path(out)
    _check_out(out, "")
    model, tree, meta, card = _open(where, image_size)
    normalised = "by you, before: fsmde_jax.models.student.normalise_images"
    card = _full_card(where, meta, card, normalised=normalised)
    card["batch_norm"] = "folded" if fold_batchnorm else "as trained"
    variables = {name: tree[name] for name in ("params", "batch_stats")}
    if fold_batchnorm:
        folded = fold_batch_norm(model.encoder, variables)["params"]
        variables = {"params": jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), folded)}
    checkpoint.write_tree(out, variables, card)
    return card


FORMATS: dict[str, Callable[..., dict[str, Any]]] = {
    "onnx": export_onnx, "stablehlo": export_stablehlo, "orbax": export_orbax,
}  # fmt: skip
OPTIONS = {  # of one format alone
    "onnx": ("precision", "calibration", "calibration_samples", "confidence"),
    "stablehlo": (),
    "orbax": ("fold_batchnorm",),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m fsmde_jax.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="C", help="a run, a student's .safetensors file, or lite0"
    )
    parser.add_argument("--format", choices=sorted(FORMATS), default="onnx", help="default onnx")
    parser.add_argument("--out", required=True, metavar="P", help="new file .onnx or .stablehlo, or new folder (orbax)")
    parser.add_argument(
        "--image_size", default="", metavar="HxW", help="pixels, multiples of 32 (default: what it was trained on)"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="float32", help="onnx only (default float32)")
    parser.add_argument("--calibration", default="", metavar="DIR", help="records folder, for int8")
    parser.add_argument("--calibration_samples", type=int, default=32, metavar="N", help="rigs of it (default 32)")
    parser.add_argument("--confidence", action="store_true", help="onnx: a second output (the other formats have it)")
    parser.add_argument("--fold_batchnorm", action="store_true", help="orbax only (onnx always is)")
    args = parser.parse_args(argv)
    with exit_with_message():
        for other, names in OPTIONS.items():
            for name in names if other != args.format else ():
                if getattr(args, name) != parser.get_default(name):
                    raise ConfigError(f"--{name}: of --format {other} only, not {args.format}; leave it out")
        options = {name: getattr(args, name) for name in OPTIONS[args.format]}
        card = FORMATS[args.format](args.checkpoint, args.out, args.image_size, **options)
        height, width = card["image_size"]
        low, high = card["focal_range_px"]
        print(f"{args.out}: {card['source']}, any number of views of {height}x{width}, depth in metres")
        print(f"for focal lengths fx from {low:.0f} to {high:.0f} px at that width")
        if card["image_size"] != card["trained_image_size"]:
            print("note: trained at {}x{}; measure how good it is at another size".format(*card["trained_image_size"]))
        if card["trained_dtype"] != "float32":
            print(f"note: trained in {card['trained_dtype']}; the file computes in {args.precision}")


if __name__ == "__main__":
    main()
