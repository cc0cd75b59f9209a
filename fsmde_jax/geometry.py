"""Cameras and rigid transforms. Every function takes NumPy or JAX arrays and returns the kind it was given.

Conventions, used everywhere in the project (docs/data_format.md):

* pixel centres are at integers: (0, 0) is the centre of the first pixel;
* a camera looks along +z, x to the right, y down; the ego frame is x forward, y left, z up;
* transforms are named `<src>_to_<dst>` and map column vectors: p_ego = cam_to_ego @ p_cam;
* depth is z-depth in metres.
"""

from typing import Any

import numpy as np

from fsmde_jax.errors import DataError

Array = Any  # numpy.ndarray or jax.Array


def _namespace(array: Array) -> Any:
    """`jax.numpy` for JAX arrays, `numpy` otherwise; JAX is imported only where it is used already."""
    if isinstance(array, (np.ndarray, np.generic, list, tuple, float, int)):
        return np
    import jax.numpy as jnp

    return jnp


# --- intrinsics ------------------------------------------------------------------------------------------------


def resize_intrinsics(intrinsics: Array, scale_y: Array, scale_x: Array) -> Array:
    """Intrinsics after a resize by (scale_y, scale_x) = new size / old size.

    fx' = s fx, cx' = s (cx + .5) - .5 (pixel centres at integers).

    Args:
      intrinsics: [..., 3, 3] pixels.
      scale_y: scalar or [...]; scale_x: likewise.
    """
    xp = _namespace(intrinsics)
    zero, one = xp.zeros_like(intrinsics[..., 0, 0]), xp.ones_like(intrinsics[..., 0, 0])
    sx, sy = one * scale_x, one * scale_y
    matrix = xp.stack(
        [
            xp.stack([sx, zero, 0.5 * (sx - 1.0)], -1),
            xp.stack([zero, sy, 0.5 * (sy - 1.0)], -1),
            xp.stack([zero, zero, one], -1),
        ],
        -2,
    )
    return matrix @ intrinsics


def crop_intrinsics(intrinsics: Array, y0: Array, x0: Array) -> Array:
    """Intrinsics [..., 3, 3] after a crop whose first pixel is (y0, x0): cx' = cx - x0, cy' = cy - y0."""
    xp = _namespace(intrinsics)
    zero = xp.zeros_like(intrinsics[..., 0, 0])
    shift = xp.stack(
        [
            xp.stack([zero, zero, zero + x0], -1),
            xp.stack([zero, zero, zero + y0], -1),
            xp.stack([zero, zero, zero], -1),
        ],
        -2,
    )
    return intrinsics - shift


def flip_intrinsics(intrinsics: Array, width: int) -> Array:
    """Intrinsics [..., 3, 3] of the mirrored image: cx' = W - 1 - cx; a skew changes its sign."""
    xp = _namespace(intrinsics)
    left = np.array([[-1.0, 0.0, width - 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    right = np.diag([-1.0, 1.0, 1.0])
    return xp.asarray(left, intrinsics.dtype) @ intrinsics @ xp.asarray(right, intrinsics.dtype)


def scale_points_uv(uv: Array, scale_y: float, scale_x: float) -> Array:
    """Pixel coordinates [..., 2] = (u, v) after a resize: u' = (u + .5) s - .5."""
    xp = _namespace(uv)
    scale = xp.asarray([scale_x, scale_y], uv.dtype)
    return (uv + 0.5) * scale - 0.5


# --- rigid transforms ------------------------------------------------------------------------------------------

_MIRROR_EGO = np.diag([1.0, -1.0, 1.0, 1.0])  # M_e: y -> -y
_MIRROR_CAM = np.diag([-1.0, 1.0, 1.0, 1.0])  # M_c: x -> -x


def flip_cam_to_ego(cam_to_ego: Array) -> Array:
    """Extrinsics [..., 4, 4] of the mirrored rig: M_e cam_to_ego M_c; stays a proper rotation."""
    xp = _namespace(cam_to_ego)
    m_e, m_c = (xp.asarray(m, cam_to_ego.dtype) for m in (_MIRROR_EGO, _MIRROR_CAM))
    return m_e @ cam_to_ego @ m_c


def flip_ego_to_global(ego_to_global: Array) -> Array:
    """Ego poses [..., 4, 4] of the mirrored rig: ego_to_global M_e (the world itself is not mirrored)."""
    xp = _namespace(ego_to_global)
    return ego_to_global @ xp.asarray(_MIRROR_EGO, ego_to_global.dtype)


def quaternion_to_rotation(wxyz: Array) -> np.ndarray:
    """Rotation [3, 3] float64 of a quaternion (w, x, y, z), normalised first.

    Raises:
      DataError: the quaternion is not finite or has no direction.
    """
    q = _vector(wxyz, 4)
    norm = 0.0 if q is None else float(np.linalg.norm(q))
    if q is None or not np.isfinite(norm) or norm < 1e-8:
        raise DataError(f"a rotation quaternion needs four finite numbers (w, x, y, z), not all zero; got {wxyz}")
    w, x, y, z = q / norm
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def _vector(values: Any, length: int) -> np.ndarray | None:
    """[length] float64, or None if `values` are not that many finite numbers."""
    try:
        vector = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        return None
    return vector if vector.shape == (length,) and np.all(np.isfinite(vector)) else None


def pose_matrix(rotation_wxyz: Array, translation: Array) -> np.ndarray:
    """Rigid transform [4, 4] float64 from a quaternion (w, x, y, z) and a translation [3] in metres.

    Raises:
      DataError: either has the wrong length or numbers that are not finite.
    """
    moved = _vector(translation, 3)
    if moved is None:
        raise DataError(f"a translation needs three finite numbers (x, y, z); got {translation}")
    matrix = np.eye(4)
    matrix[:3, :3] = quaternion_to_rotation(rotation_wxyz)
    matrix[:3, 3] = moved
    return matrix


def invert_rigid(transform: Array) -> Array:
    """Inverse of rigid transforms [..., 4, 4]: (R, t) -> (R^T, -R^T t)."""
    xp = _namespace(transform)
    rotation = xp.swapaxes(transform[..., :3, :3], -1, -2)
    translation = -rotation @ transform[..., :3, 3:]
    top = xp.concatenate([rotation, translation], -1)
    return xp.concatenate([top, transform[..., 3:, :]], -2)


def transform_points(transform: Array, points: Array) -> Array:
    """Points [..., P, 3] moved by [..., 4, 4]."""
    xp = _namespace(points)
    return points @ xp.swapaxes(transform[..., :3, :3], -1, -2) + transform[..., None, :3, 3]


def project(intrinsics: Array, points: Array) -> tuple[Array, Array]:
    """Projects camera-frame points [..., P, 3] to pixels: (uv [..., P, 2], z [..., P]).

    Points with z <= 0 get uv of NaN-free but meaningless value; mask on z.
    """
    xp = _namespace(points)
    z = points[..., 2]
    safe = xp.where(z > 0, z, 1.0)
    uvw = points @ xp.swapaxes(intrinsics, -1, -2)
    return uvw[..., :2] / safe[..., None], z


def unproject(intrinsics: Array, uv: Array, z: Array) -> Array:
    """Camera-frame points [..., P, 3] of pixels uv [..., P, 2] at z-depth z [..., P] metres."""
    xp = _namespace(uv)
    homogeneous = xp.concatenate([uv, xp.ones_like(uv[..., :1])], -1)
    return homogeneous @ xp.swapaxes(xp.linalg.inv(intrinsics), -1, -2) * z[..., None]


def check_rigid(transform: Array, what: str, tolerance: float = 1e-3) -> None:
    """Raises `DataError` naming `what` unless [..., 4, 4] holds proper rigid transforms (R^T R = I, det R = +1)."""
    matrix = np.asarray(transform, np.float64)
    if matrix.shape[-2:] != (4, 4):
        raise DataError(f"{what}: expected a 4x4 transform, got shape {matrix.shape}")
    rotation = matrix[..., :3, :3]
    if not np.all(np.isfinite(matrix)):
        raise DataError(f"{what}: the transform has numbers that are not finite")
    error = np.abs(np.swapaxes(rotation, -1, -2) @ rotation - np.eye(3)).max()
    last = np.abs(matrix[..., 3, :] - np.array([0.0, 0.0, 0.0, 1.0])).max()
    if error > tolerance or last > tolerance or np.any(np.linalg.det(rotation) < 0):
        raise DataError(
            f"{what}: not a rigid transform (|R^T R - I| = {error:.2e}, det R = {np.linalg.det(rotation).min():+.3f});"
            " expected a rotation without scale or mirroring, and last row 0 0 0 1"
        )


def check_intrinsics(intrinsics: Array, what: str) -> None:
    """Raises `DataError` naming `what` unless [..., 3, 3] are pinhole matrices with positive focal lengths."""
    matrix = np.asarray(intrinsics, np.float64)
    if matrix.shape[-2:] != (3, 3) or not np.all(np.isfinite(matrix)):
        raise DataError(f"{what}: expected finite 3x3 intrinsics in pixels, got {matrix.tolist()}")
    focal_ok = np.all(matrix[..., 0, 0] > 0) and np.all(matrix[..., 1, 1] > 0)
    row_ok = np.allclose(matrix[..., 2, :], [0.0, 0.0, 1.0]) and np.allclose(matrix[..., 1, 0], 0.0)
    if not (focal_ok and row_ok):
        raise DataError(
            f"{what}: singular or malformed intrinsics {matrix.tolist()}; expected"
            " [[fx, s, cx], [0, fy, cy], [0, 0, 1]] with fx, fy > 0"
        )


# --- the rig ---------------------------------------------------------------------------------------------------


def optical_yaw(cam_to_ego: Array) -> Array:
    """Azimuth [...] in radians of the optical axis in the ego frame, 0 = forward, positive to the left."""
    xp = _namespace(cam_to_ego)
    return xp.arctan2(cam_to_ego[..., 1, 2], cam_to_ego[..., 0, 2])


def horizontal_fov(intrinsics: Array, width: Array) -> Array:
    """Horizontal field of view [...] in radians between the outer edges of the first and the last column."""
    xp = _namespace(intrinsics)
    fx, cx = intrinsics[..., 0, 0], intrinsics[..., 0, 2]
    return xp.arctan((cx + 0.5) / fx) + xp.arctan((width - 0.5 - cx) / fx)


LEAST_OVERLAP = 1e-3  # radians; views that only touch (four of 90 degrees) are not adjacent, whatever rounding says


def adjacency(cam_to_ego: Array, intrinsics: Array, width: Array, view_mask: Array | None = None) -> Array:
    """Which cameras see part of the same surroundings (docs/method.md, view relations).

    Adjacent iff the yaw between optical axes < (hfov_i + hfov_j) / 2 - `LEAST_OVERLAP`; never with itself; dropped
    views never.

    Args:
      cam_to_ego: [..., N, 4, 4]; intrinsics: [..., N, 3, 3]; width: image width in pixels, scalar or [..., N].
      view_mask: [..., N] bool, False = view dropped.

    Returns:
      [..., N, N] bool, symmetric.
    """
    xp = _namespace(cam_to_ego)
    yaw = optical_yaw(cam_to_ego)
    fov = horizontal_fov(intrinsics, width)
    difference = yaw[..., :, None] - yaw[..., None, :]
    angle = xp.abs(xp.arctan2(xp.sin(difference), xp.cos(difference)))
    result = angle < 0.5 * (fov[..., :, None] + fov[..., None, :]) - LEAST_OVERLAP
    result = result & ~xp.eye(yaw.shape[-1], dtype=bool)
    if view_mask is not None:
        result = result & view_mask[..., :, None] & view_mask[..., None, :]
    return result


def ring_order(cam_to_ego: np.ndarray) -> list[int]:
    """Camera indices of one rig [N, 4, 4] anticlockwise (seen from above), from the one that looks most forward."""
    yaw = np.asarray(optical_yaw(np.asarray(cam_to_ego, np.float64)))
    first = int(np.argmin(np.abs(yaw)))
    relative = np.mod(yaw - yaw[first], 2 * np.pi)
    relative[first] = 0.0
    return [int(i) for i in np.argsort(relative, kind="stable")]


def mirror_permutation(cam_to_ego: np.ndarray) -> list[int]:
    """Left/right table of one rig [N, 4, 4]: entry i is the camera whose place camera i takes when the rig is mirrored.

    The match with the smallest total yaw difference; on a symmetric rig an involution (front-left <-> front-right).
    """
    from scipy.optimize import linear_sum_assignment

    yaw = np.asarray(optical_yaw(np.asarray(cam_to_ego, np.float64)))
    difference = -yaw[:, None] - yaw[None, :]
    cost = np.abs(np.arctan2(np.sin(difference), np.cos(difference)))
    rows, columns = linear_sum_assignment(cost)
    return [int(columns[np.flatnonzero(rows == i)[0]]) for i in range(len(yaw))]
