"""DDAD: EfficientNet-Lite0 student on single-sweep LiDAR and Depth Anything V2 Small, 384x640, 0.1-200 m.

python -m fsmde_jax.main --config configs/ddad.py

The paper's setting; the teacher, training without one, and the encoder: as configs/nuscenes.py.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    c = base.get_config()
    c.name = "ddad"
    c.data.train_records = "records/ddad_train"
    c.data.eval_records = "records/ddad_val"
    prepare = (
        "python -m data_prep.ddad --json <DDAD folder>/ddad.json --split {0} --masks <masks folder>"
        " --out records/ddad_{0}"
    )
    c.data.prepare_train = prepare.format("train")
    c.data.prepare_eval = prepare.format("val")
    c.data.image_size = (384, 640)
    c.data.batch_size = 8
    c.model.encoder = "efficientnet_lite0"
    c.teacher.weights = "teachers/small"
    c.distill.w_ckd = 1.0
    c.distill.w_vr = 0.1
    c.model.max_depth = 200.0
    c.eval.max_depth = 200.0
    # fx about 1,060 px (sides) to 2,182 px (front) of 1,936: 350 to 721 at width 640, to 830 with zoom 1.15.
    c.model.focal_range = (335.0, 850.0)
    return c
