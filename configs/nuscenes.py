"""nuScenes: EfficientNet-Lite0 student on single-sweep LiDAR and Depth Anything V2 Small, 352x640, 0.1-80 m.

python -m fsmde_jax.main --config configs/nuscenes.py

The paper's setting: cross-interaction and view-relational distillation from a teacher whose weights you fetch and
convert once (README, "The foundation teacher"):

python -m fsmde_jax.convert --weights depth_anything_v2_vits.pth --out teachers/small

Without them: --config.teacher.weights=tiny takes the small teacher of this package, and
--config.distill.w_ckd=0 --config.distill.w_vr=0 trains on the labels alone.

Give the encoder ImageNet's weights (--config.train.encoder_weights; README, "Train and evaluate"). From random ones the
reference student, --config.model.encoder=resnet18, is more accurate and takes 2.6 times as long (docs/measured.md).
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    c = base.get_config()
    c.name = "nuscenes"
    c.data.train_records = "records/nuscenes_train"
    c.data.eval_records = "records/nuscenes_val"
    prepare = (
        "python -m data_prep.nuscenes --dataroot <nuScenes folder> --version v1.0-trainval"
        " --split {0} --out records/nuscenes_{0}"
    )
    c.data.prepare_train = prepare.format("train")
    c.data.prepare_eval = prepare.format("val")
    c.data.batch_size = 8
    c.model.encoder = "efficientnet_lite0"
    c.teacher.weights = "teachers/small"
    c.distill.w_ckd = 1.0
    c.distill.w_vr = 0.1
    # fx 809 px (CAM_BACK) to about 1,270 px (the others) of 1,600: 324 to 508 at width 640, to 585 with zoom 1.15.
    c.model.focal_range = (310.0, 600.0)
    return c
