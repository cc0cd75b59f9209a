"""A teacher without downloads: Depth Anything `tiny`, trained on rendered streets on a CPU.

python -m fsmde_jax.main --config configs/teacher_world.py

Scale-and-shift-invariant loss with gradient matching on the exact inverse depth of scenes, each seen by another rig
(`--vary_rig`). To adapt a teacher to a domain of your own, name your records, start from a trained one
(`--config.teacher.weights=tiny`; with weights of Depth Anything also `--config.teacher.variant`), and lower the rate of
its encoder (`--config.optim.lr=5e-5 --config.optim.encoder_lr_scale=0.1`). Records without dense depth train on their
LiDAR points (`--config.data.dense_depth=false --config.loss.gradient_weight=0 --config.eval.ground_truth=lidar`).
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    c = base.get_config()
    c.name = "teacher_world"
    c.task = "teacher"
    c.data.train_records = "records/teacher_world_train"
    c.data.eval_records = "records/teacher_world_val"
    prepare = (
        "python -m data_prep.world --rig surround --vary_rig --scenes 3000 --val_scenes 60 --frames 1"
        " --image_size 98x168 --out data/teacher_world\n"
        "  python -m data_prep.ddad --json data/teacher_world/ddad.json --split {0} --image_size native"
        " --out records/teacher_world_{0}"
    )
    c.data.prepare_train = prepare.format("train")
    c.data.prepare_eval = prepare.format("val")
    c.data.image_size = (98, 168)
    c.data.batch_size = 1
    c.data.dense_depth = True
    c.augment.scale = (1.0, 1.5)
    c.augment.jitter_per_camera = True
    c.teacher.variant = "tiny"
    c.teacher.longer_side = 168
    c.teacher.dtype = "float32"  # bfloat16 is faster on accelerators only
    c.loss.gradient_weight = 0.5
    c.optim.lr = 4e-4
    c.optim.warmup_steps = 500
    c.optim.final_lr_scale = 0.01
    c.optim.weight_decay = 0.05
    c.train.steps = 6000
    c.train.log_every = 100
    c.train.picture_every = 1500
    c.train.eval_every = 1500
    c.train.eval_samples = 20
    c.train.checkpoint_every = 500
    c.eval.protocol = "affine"
    c.eval.ground_truth = "dense"
    c.eval.best_metric = "affine/abs_rel"
    c.eval.trivial = True
    return c
