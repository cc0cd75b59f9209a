"""The reference for Depth Anything: transformers' model with random weights in which every parameter matters."""

import numpy as np
import pytest

from fsmde_jax import teacher_weights
from fsmde_jax.models.depth_anything import Variant

# Most of a small test's time is compilation; the operations and their order stay the same.
QUICK = {"xla_backend_optimization_level": 0}

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Four blocks and odd widths: small enough to compile in seconds, and no two sizes are equal by accident.
LITTLE = Variant(48, 4, 3, "mlp", (0, 1, 2, 3), (16, 24, 32, 40), 28, 0)
LITTLE_SWIGLU = Variant(48, 5, 3, "swiglu", (0, 1, 2, 4), (16, 24, 32, 40), 28, 0)
# Small's true widths with four of its twelve blocks.
SMALL_WIDTH = Variant(384, 4, 6, "mlp", (0, 1, 2, 3), (48, 96, 192, 384), 64, 0)


def reference(variant, *, max_depth=None, version=2, size=(56, 84), seed=0):
    """A model of the variant's sizes with seeded weights: no zeros and ones, layer scales and biases that are felt.

    The last bias puts a quarter of a random picture of `size` below the relative head's ReLU.
    """
    backbone = transformers.Dinov2Config(
        hidden_size=variant.embed_dim, num_hidden_layers=variant.depth, num_attention_heads=variant.heads,
        image_size=518, patch_size=14, out_indices=[i + 1 for i in variant.tapped(version)],
        reshape_hidden_states=False, use_swiglu_ffn=variant.ffn == "swiglu",
    )  # fmt: skip
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=variant.embed_dim, neck_hidden_sizes=list(variant.widths),
        fusion_hidden_size=variant.fusion, head_hidden_size=32, max_depth=int(max_depth or 1),
        depth_estimation_type="relative" if max_depth is None else "metric",
    )  # fmt: skip
    model = transformers.DepthAnythingForDepthEstimation(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            if value.ndim >= 2 and "embeddings." not in name:
                transposed = name.endswith(("layers.0.resize.weight", "layers.1.resize.weight"))
                value.copy_(noise * (value.shape[0] if transposed else value[0].numel()) ** -0.5)
            elif name.endswith("projection.weight"):
                value.copy_(noise * value[0].numel() ** -0.5)
            elif "lambda" in name or ("norm" in name and name.endswith("weight")):
                value.copy_(0.6 + 0.2 * noise)
            else:
                value.copy_(0.3 * noise)
        model.head.conv3.bias.zero_()
        activation, model.head.activation2 = model.head.activation2, torch.nn.Identity()
        raw = model(as_torch(pictures(1, *size))).predicted_depth / model.head.max_depth
        model.head.activation2 = activation
        model.head.conv3.bias.fill_(-float(raw.quantile(0.25 if max_depth is None else 0.5)))
    return model


def parameters(model, variant):
    """The model's weights as this project's parameters."""
    state = {name: value.detach().numpy() for name, value in model.state_dict().items()}
    return teacher_weights.convert_teacher(state, variant, source="the reference")[0]


def pictures(m, height, width, seed=1):
    return np.random.default_rng(seed).normal(size=(m, height, width, 3)).astype(np.float32)


def as_torch(x):
    """NHWC -> NCHW tensor."""
    return torch.from_numpy(np.asarray(x)).permute(0, 3, 1, 2).contiguous()


def error(ours, expected):
    """Largest difference over the largest expected value."""
    ours, expected = np.asarray(ours, np.float64), np.asarray(expected, np.float64)
    assert ours.shape == expected.shape, (ours.shape, expected.shape)
    assert np.isfinite(ours).all() and np.abs(expected).max() > 0
    return np.abs(ours - expected).max() / np.abs(expected).max()
