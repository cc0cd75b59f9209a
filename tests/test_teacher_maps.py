"""Entries of a teacher cache: rounding, sizes, and where a crop samples the map."""

import numpy as np
import pytest

from fsmde_jax.data import teacher_maps, transforms
from fsmde_jax.data.augment import Draw
from fsmde_jax.errors import DataError
from tests import sample_factory

SIZE, HEAD = (32, 64), (16, 32)


@pytest.mark.parametrize("choice", [Draw(scale=1.3, offset=(0.2, 0.9)), Draw(flip=True, scale=1.6, offset=(0.99, 0.0))])
def test_the_map_is_sampled_where_the_pixels_of_the_crop_lie(choice):
    """A map that is linear in the image's pixels: its value at a pixel of the crop follows from the intrinsics."""
    sample = sample_factory.make_rig(4, cameras=3, native_size=(48, 96)).sample
    sample.ego_masks = [b""] * 3
    y, x = (np.arange(n) * 3.0 + 1.0 for n in HEAD)  # centres of the map's cells in pixels of the 48x96 images
    plane = (2.0 * y[:, None] + 3.0 * x[None]).astype(np.float32)
    arrays = {k: v[0] for k, v in transforms.empty_batch(1, 3, SIZE).items() if k != "record_index"}
    arrays["teacher_rel_inv_depth"] = np.empty((3, *HEAD), np.float32)
    transforms.load_rig(sample, arrays, choice=choice, cached={"teacher_rel_inv_depth": np.stack([plane] * 3)})
    v, u = np.meshgrid(*(np.arange(n) * 2 + 0.5 for n in HEAD), indexing="ij")  # in pixels of the network's images
    for i in range(3):
        ray = np.stack([u, v, np.ones_like(u)], -1) @ np.linalg.inv(arrays["intrinsics"][i].astype(np.float64)).T
        if choice.flip:
            ray[..., 0] *= -1
        pixel = ray @ sample.intrinsics[i].astype(np.float64).T
        expected = 2.0 * np.clip(pixel[..., 1], 1, 46) + 3.0 * np.clip(pixel[..., 0], 1, 94)
        np.testing.assert_allclose(arrays["teacher_rel_inv_depth"][i], expected, atol=2e-3)


def test_uint16_is_exact_to_half_a_step_of_the_view():
    rng = np.random.default_rng(0)
    r = rng.uniform(-3, 5, (2, 4, 6)).astype(np.float32) * np.array([1.0, 1e4], np.float32)[:, None, None]
    flat = np.full((1, 4, 6), 0.7, np.float32)
    manifest = teacher_maps.CacheManifest(1, "", {}, [14, 14], "", 1, ["A", "B", "C"], [8, 12], [4, 6], [2, 2, 3], [])
    tokens = rng.normal(size=(3, 2, 2, 3)).astype(np.float32)
    data = teacher_maps.encode_rig("s", np.concatenate([r, flat]), tokens)
    name, back, kept = teacher_maps.decode_rig(data, manifest, "here")
    assert name == "s" and (back[2] == np.float32(0.7)).all()
    np.testing.assert_array_equal(kept, tokens.astype(np.float16))
    for i in range(2):
        assert np.abs(back[i] - r[i]).max() < 0.502 * (r[i].max() - r[i].min()) / 65535
    for bad in (np.where(r == r.max(), np.nan, r), np.where(r == r.max(), np.inf, r)):
        with pytest.raises(DataError, match="'s': the teacher's relative inverse depth is not finite"):
            teacher_maps.encode_rig("s", bad, None)
    with pytest.raises(DataError, match="does not fit float16"):
        teacher_maps.encode_rig("s", r, 1e6 * tokens)
