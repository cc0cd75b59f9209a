"""Models by name: what the config's strings stand for, with errors that suggest the nearest name."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from fsmde_jax.errors import ConfigError
from fsmde_jax.expectation import EXPECTATIONS
from fsmde_jax.models import depth_bins
from fsmde_jax.models.depth_anything import VARIANTS
from fsmde_jax.models.rig_teacher import RigTeacher
from fsmde_jax.models.student import Student, make_encoder
from fsmde_jax.models.vit import PATCH
from fsmde_jax.names import check_name


@dataclasses.dataclass(frozen=True)
class EncoderInfo:
    """What is known about an encoder before it is built."""

    channels: tuple[int, ...]  # of the taps at strides 2, 4, 8, 16, 32
    parameters: int  # trainable numbers, without classifier


ENCODERS: dict[str, EncoderInfo] = {
    "resnet18": EncoderInfo((64, 64, 128, 256, 512), 11_176_512),
    "resnet34": EncoderInfo((64, 64, 128, 256, 512), 21_284_672),
    "resnet50": EncoderInfo((64, 256, 512, 1024, 2048), 23_508_032),
    "efficientnet_lite0": EncoderInfo((16, 24, 40, 112, 320), 2_958_848),
    "efficientnet_lite1": EncoderInfo((16, 24, 40, 112, 320), 3_723_520),
    "efficientnet_lite2": EncoderInfo((16, 24, 48, 120, 352), 4_357_952),
}

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build_encoder(encoder: str, dtype: Any = jnp.float32) -> nn.Module:
    """The encoder alone (`ENCODERS` lists them).

    Raises:
      ConfigError: unknown name.
    """
    check_name("model.encoder", encoder, ENCODERS)
    return make_encoder(encoder, dtype)


def build_student(**fields: Any) -> Student:
    """A `Student` from plain fields, checked; `dtype` may be a name, sequences become tuples.

    Raises:
      ConfigError: unknown field or name, or a value that cannot work.
    """
    known = {f.name for f in dataclasses.fields(Student)} - {"parent", "name"}
    for key in fields:
        check_name("model", key, sorted(known))
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    if isinstance(fields.get("dtype"), str):
        check_name("model.dtype", fields["dtype"], DTYPES)
        fields["dtype"] = DTYPES[fields["dtype"]]
    student = Student(**fields)
    check_name("model.encoder", student.encoder, ENCODERS)
    check_name("model.bins", student.bins, depth_bins.BINS)
    check_name("model.probabilities", student.probabilities, depth_bins.PROBABILITIES)
    check_name("model.expectation", student.expectation, EXPECTATIONS)
    if student.num_bins < 2:
        raise ConfigError(f"model.num_bins: expected at least 2, got {student.num_bins}")
    if len(student.decoder_channels) != 5 or min(student.decoder_channels) < 1:
        raise ConfigError(f"model.decoder_channels: expected five positive widths, got {student.decoder_channels}")
    if student.cross_view_blocks < 0:
        raise ConfigError(f"model.cross_view_blocks: expected 0 or more, got {student.cross_view_blocks}")
    try:
        depth_bins.canonical_range(student.min_depth, student.max_depth, student.focal_canonical, student.focal_range)
    except ValueError as error:
        raise ConfigError(f"model.min_depth, max_depth, focal_canonical, focal_range: {error}") from error
    return student


def build_teacher(*, variant: str, longer_side: int, dtype: str, remat: bool) -> RigTeacher:
    """A relative Depth Anything model to be trained, from plain fields, checked.

    Raises:
      ConfigError: unknown name, or an input below one patch.
    """
    check_name("teacher.variant", variant, VARIANTS)
    check_name("teacher.dtype", dtype, DTYPES)
    if longer_side < PATCH:
        raise ConfigError(f"teacher.longer_side = {longer_side}: expected at least {PATCH} pixels")
    return RigTeacher(variant, longer_side, DTYPES[dtype], remat)
