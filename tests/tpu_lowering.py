"""Lowers the distillation step of configs/nuscenes.py for TPU, from shapes alone; run by test_tpu.py.

python -m tests.tpu_lowering records_folder [--config.<key>=<value> ...]  prints facts about the program as JSON
"""

import json
import re
import sys

import jax
import jax.numpy as jnp

from configs import nuscenes
from fsmde_jax import build, build_teacher, sharding, teacher_weights
from fsmde_jax.data import transforms
from fsmde_jax.data.records import open_records
from fsmde_jax.teacher import Card, Teacher


def placed(shapes, shardings):
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where), shapes, shardings)


def main(records, *overrides):
    config = nuscenes.get_config()
    config.model.dtype = "bfloat16"
    config.update_from_flattened_dict({key: json.loads(value) for key, value in (o.split("=") for o in overrides)})
    opened = open_records(records)
    frozen = teacher_weights.template("small")
    build_teacher.open_teacher = lambda name: Teacher(frozen, Card("small"))
    build_teacher.weight_hash = lambda teacher: ""
    jax.default_backend = lambda: "tpu"  # what a TPU's host would say: the teacher is built by it
    distilled = build_teacher.distilled(config, opened)
    mesh = sharding.make_mesh(config.train.fsdp)
    cameras = len(opened.cameras)
    with jax.set_mesh(mesh):
        _, fresh_state, step = build.training(config, mesh, distilled, cameras)
        state = jax.eval_shape(fresh_state)
        state = placed(state, sharding.by_size(state, mesh))
        batch = transforms.empty_batch(
            config.data.batch_size, cameras, tuple(config.data.image_size), dense_depth=False, clean_images=True
        )
        batch = {name: array for name, array in batch.items() if name != "record_index"}
        batch = placed(batch, jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch))
        teacher = placed(frozen, sharding.by_size(frozen, mesh))
        rate = jax.ShapeDtypeStruct((), jnp.float32)
        exported = jax.export.export(step, platforms=["tpu"])(state, batch, rate, teacher)
    text = exported.mlir_module()
    facts = {
        "platforms": exported.platforms, "devices": exported.nr_devices, "inputs": len(exported.in_avals),
        "outputs": len(exported.out_avals), "calls": sorted(set(re.findall(r"custom_call @([\w.]+)", text))),
        "convolutions": text.count("stablehlo.convolution"), "loops": text.count("stablehlo.while"),
        "depthwise": len(re.findall(r"feature_group_count = (?!1\b)", text)), "bfloat16": "bf16" in text,
        "bytes": len(text),
    }  # fmt: skip
    print(json.dumps(facts))


if __name__ == "__main__":
    main(*sys.argv[1:])
