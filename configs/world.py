"""The rendered world at reduced resolution: what `make demo` trains, minutes on two CPU cores.

python -m data_prep.world --help             renders street scenes in the nuScenes format; no download
python -m fsmde_jax.main --config configs/world.py

Trained on the sparse LiDAR points of the rendered train scenes, as on a real dataset, and on what `lite0`, the student
in this package, says of every pixel: it has seen other streets. Evaluated on scenes that neither has seen, beside
predictors without a network. `--config.eval.ground_truth=dense` measures on the exact depth.
`--config.distill.w_ckd=0 --config.distill.w_vr=0` trains on the labels alone, `--config.teacher.weights=tiny` with a
teacher of relative depth.
"""

import ml_collections

from configs import nuscenes


def get_config() -> ml_collections.ConfigDict:
    c = nuscenes.get_config()
    c.name = "world"
    c.data.train_records = "records/world_train"
    c.data.eval_records = "records/world_val"
    prepare = (
        "python -m data_prep.world --rig nuscenes --scenes 400 --val_scenes 40 --frames 1 --image_size 96x160"
        " --out data/world\n"
        "  python -m data_prep.nuscenes --dataroot data/world --version v1.0-trainval --split {0}"
        " --image_size native --out records/world_{0}"
    )
    c.data.prepare_train = prepare.format("train")
    c.data.prepare_eval = prepare.format("val")
    c.data.image_size = (96, 160)
    c.data.batch_size = 1
    c.model.encoder = "resnet18"  # the better one from random weights
    c.model.decoder_channels = (16, 32, 64, 96, 128)
    c.teacher.weights = "lite0"
    c.teacher.dtype = "float32"  # bfloat16 is faster on accelerators only
    c.optim.lr = 7e-4
    c.optim.warmup_steps = 30
    c.train.steps = 1600
    c.train.log_every = 50
    c.train.picture_every = 400
    c.train.eval_every = 400
    c.train.eval_samples = 20
    c.train.checkpoint_every = 400
    c.eval.trivial = True
    return c
