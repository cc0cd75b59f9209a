"""The published numbers of the published weights, where a user has them: a folder named by FSMDE_WEIGHTS.

Expected there: any of the weight files below, and the picture 000000039769 (.png or .jpg) of COCO val2017. The 3x3
corners are those of the conversion script in Hugging Face transformers ("verify_logits"), made with its processor and
with the official interpolation of position embeddings.
"""

import os
from pathlib import Path

import jax
import numpy as np
import pytest
import transformers
from PIL import Image

from fsmde_jax.teacher import open_teacher

PICTURE = "000000039769"
GOLDEN = {  # file: (version, max_depth, the output's upper left corner)
    "depth_anything_v2_vits": (2, None, [[2.6751, 2.6211, 2.6571], [2.5820, 2.6138, 2.6271], [2.6160, 2.6141, 2.6306]]),
    "depth_anything_v2_vitb": (2, None, [[4.3576, 4.3723, 4.3908], [4.3231, 4.3146, 4.3611], [4.3016, 4.3170, 4.3121]]),
    "depth_anything_vits14": (1, None, [[8.8204, 8.6468, 8.6195], [8.3313, 8.6027, 8.7526], [8.6526, 8.6866, 8.7453]]),
}


def _first(folder: Path, stem: str, suffixes: tuple[str, ...]) -> Path | None:
    return next((path for suffix in suffixes if (path := folder / f"{stem}{suffix}").is_file()), None)


@pytest.mark.parametrize("name", GOLDEN)
def test_published_numbers(name):
    if not os.environ.get("FSMDE_WEIGHTS"):
        pytest.skip("FSMDE_WEIGHTS is not set: no published weights to test with")
    folder = Path(os.environ["FSMDE_WEIGHTS"])
    weights, picture = _first(folder, name, (".pth", ".safetensors")), _first(folder, PICTURE, (".png", ".jpg"))
    if weights is None or picture is None:
        pytest.skip(f"{folder} lacks {name}.pth or the picture {PICTURE}.png")
    version, max_depth, corner = GOLDEN[name]
    teacher = open_teacher(weights, version=version, max_depth=max_depth)
    processor = transformers.DPTImageProcessor(
        size={"height": 518, "width": 518}, ensure_multiple_of=14, keep_aspect_ratio=True, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    pixels = processor(Image.open(picture).convert("RGB"), return_tensors="np")["pixel_values"]
    assert pixels.shape == (1, 3, 518, 686)
    outputs = jax.jit(teacher.module().apply)({"params": teacher.params}, pixels.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(np.asarray(outputs["rel_inv_depth"])[0, :3, :3], corner, rtol=3e-3)
