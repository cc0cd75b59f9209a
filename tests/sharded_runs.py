"""The same distillation steps on meshes of eight virtual devices; run by test_sharding.py in a process of its own.

python -m tests.sharded_runs records_folder out.npz toy|resnet18 name [name ...], names of `MESHES`.
"""

import sys
from pathlib import Path

import jax
import numpy as np

from configs import base
from fsmde_jax import build, build_teacher, sharding
from fsmde_jax.data import pipeline
from fsmde_jax.data.records import open_records
from fsmde_jax.models import student
from fsmde_jax.run_checkpoints import Checkpoints
from tests import toy_encoder
from tests.test_distillation import SIZE, TOY

STEPS, BATCH = 3, 16
# name -> (devices, fsdp, parts)
MESHES = {
    "one": (1, 1, 1), "data": (8, 1, 1), "fsdp": (8, 8, 1), "mixed": (8, 4, 1), "two": (2, 1, 1),
    "one_parts": (1, 1, 2), "mixed_parts": (8, 2, 2),
}  # fmt: skip


def make_config(records):
    c = base.get_config()
    c.data.train_records = c.data.eval_records = records
    c.data.image_size, c.data.batch_size = SIZE, BATCH
    c.model.decoder_channels, c.model.num_bins, c.model.focal_range = (4, 4, 8, 8, 8), 8, (100.0, 900.0)
    c.teacher.weights, c.teacher.longer_side, c.teacher.dtype = "toy", 56, "float32"
    c.distill.tokens, c.distill.w_ckd, c.distill.w_vr, c.distill.baseline = (2, 4), 1.0, 0.1, "fitnets"
    c.optim.average_decay, c.augment.camera_dropout = 0.9, 0.2
    return c


def main(records: str, out: str, encoder: str, *names: str) -> None:
    if encoder == "toy":
        student.make_encoder = toy_encoder.make_encoder
    build_teacher.open_teacher = lambda name: TOY
    jax.config.update("jax_disable_most_optimizations", True)
    sharding.MIN_SHARDED = 64
    found = {}
    for name in names:
        devices, fsdp, parts = MESHES[name]
        config = make_config(records)
        config.train.batch_parts = parts
        run(config, sharding.make_mesh(fsdp, jax.devices()[:devices]), name, Path(out).parent, found)
    np.savez(out, **found)


def run(config, mesh, name, folder, found):
    opened = open_records(config.data.train_records)
    distilled = build_teacher.distilled(config, opened)
    stream = pipeline.train_dataset(
        opened, image_size=SIZE, batch_size=BATCH, seed=0, augment=build.augment_options(config), num_threads=0,
        clean_images=True,
    )  # fmt: skip
    batches = iter(pipeline.to_device(stream, sharding.batch_sharding(mesh)))
    with jax.set_mesh(mesh):
        _, fresh_state, step = build.training(config, mesh, distilled, 3)
        state = fresh_state()
        teacher = jax.device_put(distilled.frozen, sharding.by_size(distilled.frozen, mesh))
        checkpoints = Checkpoints(folder / "checkpoints_of_mixed", 1)
        if name == "two":  # goes on from what the mixed mesh has saved after its last step but one
            state, batches, _ = checkpoints.restore(state, batches)
            found["two/restored_at"] = int(state.step)
        for number in range(int(state.step), STEPS):
            if name == "mixed" and number == STEPS - 1:
                checkpoints.save(state, batches, {})
                checkpoints.wait()
            batch = {key: value for key, value in next(batches).items() if key != "record_index"}
            if name == "mixed" and number == 0:
                text = step.lower(state, batch, 1e-3, teacher).compile().as_text()
                found["mixed/gathers"] = "all-gather" in text
            state, metrics = step(state, batch, 1e-3, teacher)
            for key, value in metrics.items():
                found[f"{name}/{key}/{number}"] = np.asarray(value)
        checkpoints._latest.close(), checkpoints._best.close()
    here = [leaf.addressable_shards[0].data.size for leaf in jax.tree.leaves(state)]
    found[f"{name}/share"] = sum(here) / sum(leaf.size for leaf in jax.tree.leaves(state))
    for path, leaf in jax.tree_util.tree_leaves_with_path(sharding.whole_here(state, mesh)):
        found[f"{name}/state{jax.tree_util.keystr(path)}"] = np.asarray(leaf)


if __name__ == "__main__":
    main(*sys.argv[1:])
