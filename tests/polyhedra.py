"""Convex parts of the rendered world as point sets, for tests."""

import itertools

import numpy as np


def corners(planes: np.ndarray, tolerance: float = 2e-3) -> np.ndarray:
    """Vertices [K, 3] of a convex part: the meeting points of three planes that no other plane cuts off."""
    planes = np.asarray(planes, np.float64)
    planes = planes[np.linalg.norm(planes[:, :3], axis=1) > 0.5]
    triples = np.array(list(itertools.combinations(range(len(planes)), 3)))
    normals, offsets = planes[triples, :3], planes[triples, 3]
    usable = np.abs(np.linalg.det(normals)) > 1e-4
    points = np.linalg.solve(normals[usable], offsets[usable][..., None])[..., 0]
    return points[(points @ planes[:, :3].T <= planes[:, 3] + tolerance).all(1)]
