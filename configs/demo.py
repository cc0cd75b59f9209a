"""`make demo`: a small student at reduced resolution, minutes on two CPU cores, no augmentation.

On the real keyframe it trains and evaluates on the same six images: it shows the whole path, not generalisation.
"""

import ml_collections

from configs import nuscenes


def get_config() -> ml_collections.ConfigDict:
    c = nuscenes.get_config()
    c.name = "demo"
    c.data.train_records = "records/demo_keyframe_mini_train"  # make demo sets both
    c.data.eval_records = "records/demo_keyframe_mini_train"
    c.data.prepare_train = c.data.prepare_eval = "make demo"
    c.data.image_size = (192, 320)
    c.data.batch_size = 1
    c.augment.flip = 0.0
    c.augment.scale = (1.0, 1.0)
    c.augment.jitter_probability = 0.0
    c.model.decoder_channels = (16, 32, 64, 96, 128)
    c.optim.lr = 1e-3
    c.optim.warmup_steps = 20
    c.train.steps = 400
    c.train.log_every = 20
    c.train.picture_every = 200
    c.train.eval_every = 200
    c.train.checkpoint_every = 200
    return c
