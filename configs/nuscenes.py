"""nuScenes, supervised: ResNet-18 student on single-sweep LiDAR, 352x640, 0.1-80 m.

python -m fsmde_jax.main --config configs/nuscenes.py
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
    # fx 809 px (CAM_BACK) to about 1,270 px (the others) of 1,600: 324 to 508 at width 640, to 585 with zoom 1.15.
    c.model.focal_range = (310.0, 600.0)
    return c
