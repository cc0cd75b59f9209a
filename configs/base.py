"""Every config key, once, with its unit and meaning. The other configs only override.

Change any of them on the command line: `python -m fsmde_jax.main --config configs/nuscenes.py --config.optim.lr=3e-4`.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    c = ml_collections.ConfigDict()
    c.name = "base"  # run name; the default --workdir is runs/<name>
    c.task = "student"  # what is trained: student | teacher (a relative Depth Anything model; docs/teacher.md)
    c.seed = 0  # initialisation, shuffling and augmentation

    c.data = ml_collections.ConfigDict()
    c.data.train_records = ""  # records folder(s) written by data_prep; several: comma-separated
    c.data.eval_records = ""  # records folder for evaluation
    c.data.prepare_train = ""  # the data_prep command that makes train_records; shown when they are missing
    c.data.prepare_eval = ""  # likewise for eval_records
    c.data.image_size = (352, 640)  # network input, height and width, pixels; multiples of 32
    c.data.cameras = ()  # names of the cameras to use, in this order; () = all of the records, ring order
    c.data.batch_size = 2  # rigs per step over all devices
    c.data.num_threads = 2  # reading and decoding threads of each process
    c.data.prefetch = 2  # batches prepared ahead on the device
    c.data.train_samples = 0  # train on this many of train_records, spread evenly; 0 = all
    # Labels for this many of them only, spread evenly; 0 = all. A teacher sees the others, too (every second rig is
    # one); without a teacher they are left out.
    c.data.labelled_samples = 0
    c.data.label_fraction = 1.0  # share of the LiDAR points that become labels, the same in every epoch; above 0
    c.data.use_extra_sweeps = True  # train on accumulated points where the records hold them
    c.data.dense_depth = False  # train on the exact depth of rendered records, every pixel, not on LiDAR points

    c.augment = ml_collections.ConfigDict()  # training only; one seed per sample, pixels and calibration together
    c.augment.flip = 0.5  # probability of mirroring the whole rig
    c.augment.scale = (1.0, 1.15)  # zoom range before a random crop back to image_size; 1 = no crop
    c.augment.brightness = 0.2  # half-widths of the colour jitter; 0 = off
    c.augment.contrast = 0.2
    c.augment.saturation = 0.2
    c.augment.hue = 0.05  # fraction of the colour circle
    c.augment.jitter_probability = 0.5  # of a sample
    c.augment.jitter_per_camera = False  # False: the six cameras share one jitter
    c.augment.camera_dropout = 0.0  # probability that a camera is missing from a sample; one always stays

    c.model = ml_collections.ConfigDict()
    c.model.encoder = "resnet18"  # resnet18|34|50, efficientnet_lite0|1|2
    c.model.decoder_channels = (16, 32, 64, 128, 256)  # at strides 2, 4, 8, 16, 32
    c.model.bins = "log"  # log|linear (adaptive widths), uniform|sid (fixed), attractor; docs/method.md
    c.model.probabilities = "softmax"  # softmax|log_binomial
    # depth = exp(sum p log c), or sum p c as in AdaBins: log|depth
    c.model.expectation = "log"
    c.model.num_bins = 64
    c.model.min_depth = 0.1  # metres: every camera must be able to reach [min_depth, max_depth]
    c.model.max_depth = 80.0
    c.model.focal_canonical = 500.0  # f_0, pixels at network width 640
    # Smallest and largest fx that the bins must serve, zoom included, pixels at network width 640.
    c.model.focal_range = (300.0, 700.0)
    c.model.cross_view_blocks = 0  # attention blocks over adjacent views at stride 32; 0 = off
    c.model.dtype = "float32"  # compute dtype: float32|bfloat16; parameters, head and losses stay float32

    c.teacher = ml_collections.ConfigDict()
    # Who teaches a student where a weight of `distill` is not 0; with task = "teacher", what its own training starts
    # from ("" = random parameters). "tiny" (ships with the package), a folder of fsmde_jax.convert, a .pth or
    # .safetensors file of a relative model of version 2; for students also a student: "lite0" (ships), a run, its file.
    c.teacher.weights = ""
    c.teacher.variant = "tiny"  # tiny|small|base|large|giant, of the teacher that is trained (task = "teacher")
    # Of its input, pixels, rounded to a multiple of 14 (a student's: 32); 0 = what its card says, or 630.
    c.teacher.longer_side = 0
    c.teacher.dtype = "bfloat16"  # compute dtype: float32|bfloat16
    c.teacher.remat = False  # compute blocks again for the gradient: less memory on accelerators, slower
    c.teacher.cache = ""  # folder of fsmde_jax.teacher_cache for train_records, instead of running it in the step

    c.distill = ml_collections.ConfigDict()  # what the teacher teaches; docs/method.md. A weight of 0 leaves a term out
    c.distill.w_ckd = 0.0  # of cross-interaction distillation, w_prob L_prob + w_cross L_cross
    c.distill.w_prob = 1.0  # bin probabilities, every pixel
    c.distill.w_cross = 1.0  # teacher's probabilities x student's centers against the labels; 0 = bins KD
    c.distill.bins = "aligned"  # aligned | soft_assign | learned | two_hot (metric teachers): its distribution
    # auto | known | unknown, of aligned: whether the teacher's map is inverse depth up to a scale (known), or up to
    # scale and shift (unknown); auto: unknown for a relative teacher, known for a metric one and a student.
    c.distill.shift = "auto"
    c.distill.tau = 1.0  # temperature of L_prob
    c.distill.tau_bin = 0.0  # of soft_assign, in units of its range, 0 = 1 / num_bins; of aligned, in bins, 0 = 1
    c.distill.w_vr = 0.0  # of view-relational distillation
    c.distill.relation = "tokens"  # tokens | gram | bins
    c.distill.tau_r = 0.1  # temperature of relations
    c.distill.tokens = (6, 10)  # token grid of a view, rows x columns
    c.distill.tap = 3  # which of the teacher's four taps gives the tokens; 3 = the last
    c.distill.center = "rig"  # rig | view | none: over what the mean is removed from the tokens
    c.distill.intra = False  # relations within a view, too
    # response|fitnets|at|sp|rkd|cwd|dist|cirkd: another method; it is added, so set w_ckd and w_vr to 0 to compare
    c.distill.baseline = ""
    c.distill.w_baseline = 1.0

    c.loss = ml_collections.ConfigDict()
    c.loss.silog_lambda = 0.85
    c.loss.chamfer_weight = 0.1  # beta of docs/method.md section 3
    c.loss.gradient_weight = 2.0  # of gradient matching, where a teacher is trained

    c.optim = ml_collections.ConfigDict()
    c.optim.lr = 3e-4  # peak of warm-up + cosine
    c.optim.encoder_lr_scale = 1.0  # factor on the encoder's rate; below 1 with pretrained weights
    c.optim.warmup_steps = 500
    c.optim.final_lr_scale = 0.05  # rate at the last step / peak
    c.optim.weight_decay = 1e-2  # AdamW; not on biases and normalisation
    c.optim.clip_norm = 1.0  # global gradient norm; 0 = no clipping
    # Of an exponential moving average of the parameters, per step, e.g. 0.999; it is what is evaluated, kept as the
    # best and exported. 0 = none.
    c.optim.average_decay = 0.0

    c.train = ml_collections.ConfigDict()
    c.train.encoder_weights = ""  # .safetensors or .pth with ImageNet weights; "" = random initialisation
    c.train.steps = 50_000
    c.train.batch_parts = 1  # compute a batch's network in so many parts: less memory (docs/scaling.md)
    c.train.fsdp = 1  # divide large parameters and their optimiser state over so many devices; 1 = whole on each
    c.train.max_skipped_steps = (
        10  # steps whose loss or gradient is not finite are left out; a run with more of them ends
    )
    c.train.log_every = 50  # steps; losses are logged as means over them
    c.train.picture_every = 1000  # steps between depth pictures in TensorBoard; 0 = none
    c.train.eval_every = 2500  # steps between evaluations; 0 = only at the end
    c.train.eval_samples = 200  # samples of an evaluation during training; 0 = all
    c.train.checkpoint_every = 1000  # steps
    c.train.keep_checkpoints = 2  # newest; the best is kept besides

    c.eval = ml_collections.ConfigDict()
    c.eval.protocol = "surround"  # surround (P1) | vfdepth (P2) | affine (P0, relative predictions); docs/protocol.md
    c.eval.ground_truth = "lidar"  # lidar | dense (rendered records; surround, affine)
    c.eval.min_depth = 0.1  # metres, ground truth outside is ignored (strictly)
    c.eval.max_depth = 80.0
    c.eval.batch_size = 1  # rigs per forward
    c.eval.flip_tta = False  # average with the mirrored rig's prediction; printed with the result
    c.eval.best_metric = "metric/abs_rel"  # lowest is best: which checkpoint is kept
    c.eval.trivial = False  # --mode evaluate: compare with predictors without a network, fitted on train_records
    c.eval.checkpoint = "best"  # which checkpoint --mode evaluate restores: best | latest
    c.eval.num_pictures = 4  # panoramas written per evaluation
    c.eval.confidence = False  # how well the bin distribution knows its error (surround, student); docs/protocol.md
    c.eval.drop_cameras = ()  # names of cameras hidden from the network; the others are measured
    return c
