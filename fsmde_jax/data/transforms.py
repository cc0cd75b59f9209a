"""From a record to network arrays: decoding, resizing, labels and masks, in NumPy and OpenCV.

`load_rig` does the whole way for one rig. Whatever changes pixels changes intrinsics, extrinsics and label positions
in the same call. Random choices are drawn before (`augment.draw`): the result is a function of (sample, draw).

Geometry of a zoom: a box of whole decoded pixels is resized to the network size in one step, and the intrinsics follow
that very box, so labels stay exact whatever the rounding of the box. Pixel centres are at integers.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from fsmde_jax import geometry
from fsmde_jax.data import dense
from fsmde_jax.data.augment import Draw, cameras_left, flip_rig, jitter
from fsmde_jax.data.schema import RigSample
from fsmde_jax.errors import DataError

cv2.setNumThreads(0)  # the pipeline's threads each load a whole rig; OpenCV's own pool would only fight with them

_DECODE = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_REDUCED = {1: 0, 2: 16, 4: 32}  # OpenCV's flag bits of IMREAD_REDUCED_*_2 and _4


def decode_step(data: bytes, size: tuple[int, int], scale: float, out_size: tuple[int, int]) -> int:
    """1, 2 or 4: by how much a JPEG can shrink while it is decoded (libjpeg's scaled DCT, a box filter).

    Only as far as the rest still shrinks or keeps its size, and only where the blocks fill the image exactly. A
    1600x900 picture for 640x352 is read in half the time, at .7 grey levels mean difference from area weights alone.
    """
    if data[:2] != b"\xff\xd8":
        return 1
    fits = [k for k in (2, 4) if all(s % k == 0 and s / scale >= k * o for s, o in zip(size, out_size, strict=True))]
    return max(fits, default=1)


def decode_image(data: bytes, size: tuple[int, int], where: str, step: int = 1) -> np.ndarray:
    """Decodes a JPEG or PNG to [h / step, w / step, 3] uint8 RGB (`decode_step`); `size` = (h, w) of the whole image.

    Raises:
      DataError: naming `where`: not an image, cut short, or not of the size that the record says.
    """
    truncated = _is_truncated_jpeg(data)
    flags = _DECODE | _REDUCED[step]
    image = None if truncated or not data else cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if image is None:
        reason = "is truncated" if truncated else "cannot be decoded"
        advice = "check the source image and convert this split again"
        raise DataError(f"{where}: the image ({len(data)} bytes) {reason}; {advice}")
    found = (image.shape[0] * step, image.shape[1] * step)
    if found != tuple(size):
        raise DataError(f"{where}: the image is {found[0]}x{found[1]}, but the record says {size[0]}x{size[1]}")
    return image


def _is_truncated_jpeg(data: bytes) -> bool:
    """A JPEG without an end marker behind its last scan: libjpeg would fill the rest with grey and only warn."""
    if data[:2] != b"\xff\xd8":
        return False
    end = data.rfind(b"\xff\xd9")
    return end < 0 or data.find(b"\xff\xda", end) >= 0  # an end marker before a scan belongs to a thumbnail


@functools.lru_cache(maxsize=64)
def decode_ego_mask(data: bytes, native_size: tuple[int, int], decoded_size: tuple[int, int]) -> np.ndarray:
    """Ego-body mask [h, w] uint8 at the decoded size: 255 where every native pixel below is visible (area minimum).

    Cached by content: a drive's masks are the same bytes in every record. The array is read-only.

    Raises:
      DataError: not an image, or not of the native size.
    """
    mask = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    if mask is None or mask.shape != native_size:
        found = "cannot be decoded" if mask is None else f"is {mask.shape[0]}x{mask.shape[1]}"
        raise DataError(f"the ego mask {found}; expected a PNG of the native size {native_size[0]}x{native_size[1]}")
    if native_size != decoded_size:
        height, width = decoded_size
        mask = cv2.resize(mask, (width, height), interpolation=_filter(native_size, decoded_size))
    mask = np.where(mask == 255, np.uint8(255), np.uint8(0))
    mask.setflags(write=False)
    return mask


def _filter(old: tuple[int, int], new: tuple[int, int]) -> int:
    """Area weights when shrinking (bilinear would alias), bilinear otherwise."""
    shrinks = new[0] <= old[0] and new[1] <= old[1]
    return cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR


Box = tuple[int, int, int, int]  # y0, x0, height, width in decoded pixels


def crop_box(size: tuple[int, int], scale: float, offset: tuple[float, float]) -> Box:
    """The box of whole pixels that a zoom by `scale` shows: the image's size / scale, placed by `offset` in [0, 1)."""
    height, width = (max(1, round(s / scale)) for s in size)
    y0, x0 = (int((s - n + 1) * f) for s, n, f in zip(size, (height, width), offset, strict=True))
    return y0, x0, height, width


def resize_box(image: np.ndarray, box: Box, out: np.ndarray) -> None:
    """Resizes the box of an image [h, w(, 3)] uint8 into `out` [H, W(, 3)] (area weights when shrinking)."""
    y0, x0, height, width = box
    region = image[y0 : y0 + height, x0 : x0 + width]
    if region.shape == out.shape:
        np.copyto(out, region)
        return
    size = out.shape[:2]
    result = cv2.resize(region, (size[1], size[0]), dst=out, interpolation=_filter((height, width), size))
    if result is not out:  # OpenCV allocates when it cannot write into `out` (e.g. not contiguous)
        np.copyto(out, result)


def sample_box(values: np.ndarray, size: tuple[int, int], box: Box, out: np.ndarray) -> None:
    """Bilinear samples of a map over a whole image, where the pixels of an image of its box lie.

    Args:
      values: [h, w] float32 that covers an image of `size` (height, width); its border is continued outwards.
      size: of the image that `box` is a box of.
      out: [H, W] float32, covers `box`; written in place. The whole image at the map's own size is a copy.
    """
    if box == (0, 0, *size) and values.shape == out.shape:
        np.copyto(out, values)
        return
    result = values
    for axis in (0, 1):
        place = (box[axis] + (np.arange(out.shape[axis]) + 0.5) * (box[2 + axis] / out.shape[axis])) / size[axis]
        place = np.clip(place * values.shape[axis] - 0.5, 0, values.shape[axis] - 1)
        low = np.floor(place).astype(np.intp)
        weight = (place - low).astype(np.float32).reshape((-1, 1) if axis == 0 else (1, -1))
        above = np.minimum(low + 1, values.shape[axis] - 1)
        result = result.take(low, axis) * (1 - weight) + result.take(above, axis) * weight
    np.copyto(out, result)


def box_intrinsics(intrinsics: np.ndarray, boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Intrinsics [..., 3, 3] after cropping to `boxes` [..., 4] (as `Box`) and resizing to `size`, float64."""
    boxes = np.asarray(boxes, np.float64)
    cropped = geometry.crop_intrinsics(np.asarray(intrinsics, np.float64), boxes[..., 0], boxes[..., 1])
    return geometry.resize_intrinsics(cropped, size[0] / boxes[..., 2], size[1] / boxes[..., 3])


def rasterize(points: Sequence[np.ndarray], scale: np.ndarray, shift: np.ndarray, out: np.ndarray) -> None:
    """Writes sparse depth labels: u' = scale u + shift, nearest pixel, nearest point wins, points outside are dropped.

    Args:
      points: per camera [P_i, 3] float32: u, v in native pixels and z-depth in metres.
      scale: [N, 2] (x, y) network pixels per native pixel; shift: [N, 2] (x, y).
      out: [N, H, W] float32, contiguous, zero where there is no label; changed in place.
    """
    height, width = out.shape[1:]
    for uvz, factor, offset, plane in zip(points, scale, shift, out, strict=True):
        # floor(x + .5) and not rint: rint sends ties to even, so that two neighbours would share one pixel
        x = np.floor(uvz[:, 0] * factor[0] + (offset[0] + 0.5))
        y = np.floor(uvz[:, 1] * factor[1] + (offset[1] + 0.5))
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        index = (y * width + x)[inside].astype(np.intp)
        flat = plane.reshape(-1)
        flat[index] = np.inf
        np.minimum.at(flat, index, uvz[inside, 2])


def empty_batch(
    batch: int, cameras: int, image_size: tuple[int, int], *, dense_depth: bool = False, clean_images: bool = False
) -> dict[str, np.ndarray]:
    """Arrays of a batch (the names and dtypes that the models take); labels are zero, the rest is not initialised."""
    height, width = image_size
    exact: dict[str, np.ndarray] = {}
    if dense_depth:
        exact["dense_depth"] = np.zeros((batch, cameras, height, width), np.float32)
    if clean_images:
        exact["clean_images"] = np.empty((batch, cameras, height, width, 3), np.uint8)
    return {
        "images": np.empty((batch, cameras, height, width, 3), np.uint8),
        "intrinsics": np.empty((batch, cameras, 3, 3), np.float32),
        "cam_to_ego": np.empty((batch, cameras, 4, 4), np.float32),
        "ego_to_global": np.empty((batch, cameras, 4, 4), np.float32),
        "depth": np.zeros((batch, cameras, height, width), np.float32),
        "ego_mask": np.empty((batch, cameras, height, width), np.bool_),
        "view_mask": np.empty((batch, cameras), np.bool_),
        "record_index": np.empty((batch,), np.int64),
        **exact,
    }


def thin_labels(sample: RigSample, fraction: float, seed: int) -> RigSample:
    """The sample with a share of its points, chosen at random, for training on fewer labels than were recorded.

    A point's lot depends on (seed, camera, its place in the sweep) alone, so every epoch has the same labels, and those
    of a smaller share are among those of a larger one.

    Args:
      sample: a rig sample.
      fraction: share in [0, 1]; 1 returns the sample itself.
      seed: number of the record.
    """
    if fraction == 1:
        return sample

    def thinned(points: list[np.ndarray], kind: int) -> list[np.ndarray]:
        lots = [np.random.default_rng([seed, kind, i]).random(len(p)) for i, p in enumerate(points)]
        return [p[lot < fraction] for p, lot in zip(points, lots, strict=True)]

    return dataclasses.replace(sample, points=thinned(sample.points, 0), extra_points=thinned(sample.extra_points, 1))


def load_rig(
    sample: RigSample,
    out: dict[str, np.ndarray],
    *,
    choice: Draw | None = None,
    use_extra: bool = False,
    cached: Mapping[str, np.ndarray] | None = None,
    where: str = "record",
) -> None:
    """Decodes one sample into the arrays of one batch row, augmented as `choice` says.

    Args:
      sample: images still encoded; a camera with empty image bytes is absent (`view_mask` False, black, no labels).
      out: `images` [N, H, W, 3] uint8, `intrinsics`, `cam_to_ego`, `ego_to_global`, `depth` [N, H, W] float32 (zeros
        on entry), `ego_mask` [N, H, W] bool, `view_mask` [N] bool; where `dense_depth` [N, H, W] float32 (zeros on
        entry) is among them, it is filled, too: the stored pixel that holds the centre of each pixel; so is
        `clean_images` [N, H, W, 3] uint8: `images` before colour jitter.
      choice: None = the whole image, no augmentation. Cameras that it drops are as if they were absent.
      use_extra: labels also from `sample.extra_points`.
      cached: a teacher's `teacher_rel_inv_depth` [N, h, w] float32 of the whole images, cropped and mirrored with them
        into `out`; `teacher_tokens` [N, gh, gw, C], mirrored only, where `out` holds them.
      where: file and record, named in errors.

    Raises:
      DataError: an image or a mask cannot be decoded or has another size than the record says.
    """
    choice = choice or Draw()
    count, height, width = out["depth"].shape
    boxes, decoded_sizes = np.empty((count, 4)), np.empty((count, 2))
    present = out["view_mask"]
    present[:] = cameras_left(np.array([bool(data) for data in sample.images]), choice.dropped)
    for i in range(count):
        stored, native = _pair(sample.image_size[i]), _pair(sample.native_size[i])
        here = f"{where}, camera {sample.camera_names[i]}"
        data = sample.images[i]
        step = decode_step(data, stored, choice.scale, (height, width))
        decoded = (stored[0] // step, stored[1] // step)
        box = crop_box(decoded, choice.scale, choice.offset)
        if present[i]:
            resize_box(decode_image(data, stored, here, step), box, out["images"][i])
        else:
            out["images"][i] = 0
        _load_mask(sample.ego_masks[i], native, decoded, box, bool(present[i]), out["ego_mask"][i], here)
        boxes[i], decoded_sizes[i] = box, decoded
        if present[i] and sample.dense_depth[i] and "dense_depth" in out:
            rows, cols = dense.box_pixels(stored, decoded, box, (height, width))
            out["dense_depth"][i] = dense.decode(sample.dense_depth[i], stored, here, rows, cols)
        if cached is not None:
            sample_box(cached["teacher_rel_inv_depth"][i], decoded, box, out["teacher_rel_inv_depth"][i])
    shrink = decoded_sizes / sample.image_size
    at_decoded = geometry.resize_intrinsics(sample.intrinsics.astype(np.float64), shrink[:, 0], shrink[:, 1])
    out["intrinsics"][:] = box_intrinsics(at_decoded, boxes, (height, width))
    zoom = np.array([width, height]) / boxes[:, 3:1:-1]  # network pixels per decoded pixel, x and y
    scale = zoom * (decoded_sizes / sample.native_size)[:, ::-1]
    shift = 0.5 * scale - zoom * boxes[:, 1::-1] - 0.5  # (u + .5) s - .5, then - x0, then (u + .5) s - .5
    out["cam_to_ego"][:] = sample.cam_to_ego
    out["ego_to_global"][:] = sample.ego_to_global
    points = sample.points
    if use_extra:
        points = [np.concatenate(pair) for pair in zip(sample.points, sample.extra_points, strict=True)]
    points = [p if seen else p[:0] for p, seen in zip(points, present, strict=True)]
    rasterize(points, scale, shift, out["depth"])
    if cached is not None and "teacher_tokens" in out:
        out["teacher_tokens"][:] = cached["teacher_tokens"]
    if choice.flip:
        flip_rig(out)
    if "clean_images" in out:
        out["clean_images"][:] = out["images"]
    if choice.colour is not None:
        jitter(out["images"], choice.colour, present)


def _pair(size: np.ndarray) -> tuple[int, int]:
    return int(size[0]), int(size[1])


def _load_mask(
    data: bytes, native: tuple[int, int], decoded: tuple[int, int], box: Box, present: bool, out: np.ndarray, where: str
) -> None:
    """Writes the ego mask [H, W] bool: True where every decoded pixel that contributes is visible."""
    if not data or not present:
        out.fill(present)
        return
    try:
        mask = decode_ego_mask(data, native, decoded)
    except DataError as error:
        raise DataError(f"{where}: {error}; convert this split again") from error
    resized = np.empty(out.shape, np.uint8)
    resize_box(mask, box, resized)
    np.equal(resized, 255, out=out)
