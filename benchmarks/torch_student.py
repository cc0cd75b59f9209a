"""The ResNet-18 student and its distillation step in PyTorch: the other side of `benchmarks.train_step`.

Modules are called as the parameters of `fsmde_jax.models.student`, so weights carry over by their paths
(`load_parameters`), and a test compares the two.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, outputs, 3, stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = _conv(outputs, outputs, 3), nn.BatchNorm2d(outputs)
        self.short = stride != 1 or inputs != outputs
        if self.short:
            self.downsample_0, self.downsample_1 = _conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + (self.downsample_1(self.downsample_0(x)) if self.short else x))


class Encoder(nn.Module):
    """ResNet-18: features at strides 2 to 32."""

    channels = (64, 64, 128, 256, 512)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = _conv(3, 64, 7, 2), nn.BatchNorm2d(64)
        self.names, inputs = [], 64
        for stage, width in enumerate(self.channels[1:], 1):
            for i in range(2):
                name = f"layer{stage}_{i}"
                self.add_module(name, Block(inputs, width, 2 if stage > 1 and i == 0 else 1))
                self.names.append(name)
                inputs = width

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        taps = [F.relu(self.bn1(self.conv1(x)))]
        x = F.max_pool2d(taps[0], 3, 2, 1)
        for i, name in enumerate(self.names):
            x = self.get_submodule(name)(x)
            if i % 2:
                taps.append(x)
        return taps


class ConvNorm(nn.Module):
    """Convolution and BatchNorm."""

    def __init__(self, inputs: int, outputs: int, kernel: int):
        super().__init__()
        self.conv, self.norm = _conv(inputs, outputs, kernel), nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


class Decoder(nn.Module):
    """Coarse to fine with additive skips."""

    def __init__(self, taps: tuple[int, ...], channels: tuple[int, ...]):
        super().__init__()
        self.levels = len(channels)
        for i, width in enumerate(channels):
            self.add_module(f"lateral_{i}", ConvNorm(taps[i], width, 1))
            self.add_module(f"fuse_{i}", ConvNorm(width, width, 3))
            if i + 1 < self.levels:
                self.add_module(f"up_{i}", _conv(channels[i + 1], width, 1))

    def forward(self, taps: list[torch.Tensor]) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        for i in reversed(range(self.levels)):
            x = self.get_submodule(f"lateral_{i}")(taps[i])
            if found:
                x = x + F.interpolate(self.get_submodule(f"up_{i}")(found[-1]), scale_factor=2)
            found.append(F.relu(self.get_submodule(f"fuse_{i}")(F.relu(x))))
        return found[::-1]


class Head(nn.Module):
    """Bin probabilities per pixel and centers per view, evenly wide in log depth at first."""

    def __init__(self, features: int, deepest: int, bins: int, depth_range: tuple[float, float]):
        super().__init__()
        self.low, self.high = (math.log(depth) for depth in depth_range)
        self.widths_hidden, self.widths_out = nn.Linear(deepest, 128), nn.Linear(128, bins)
        self.logits = nn.Conv2d(features, bins, 1)

    def forward(self, x: torch.Tensor, deepest: torch.Tensor, ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        width = F.softplus(self.widths_out(F.relu(self.widths_hidden(deepest.mean((2, 3)))))) + 1e-3
        width = width / width.sum(-1, keepdim=True)
        centers = torch.exp(self.low + (self.high - self.low) * (width.cumsum(-1) - 0.5 * width)) * ratio[:, None]
        return self.logits(x), centers


class Student(nn.Module):
    """Images [M, 3, H, W] and focal ratios [M] -> bin logits [M, K, H/2, W/2], centers [M, K], depth [M, H, W]."""

    def __init__(self, channels: tuple[int, ...], bins: int, depth_range: tuple[float, float]):
        super().__init__()
        self.backbone = Encoder()
        self.decoder = Decoder(Encoder.channels, channels)
        self.depth_bins = Head(channels[0], channels[-1], bins, depth_range)

    def forward(self, x: torch.Tensor, ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        levels = self.decoder(self.backbone(x))
        logits, centers = self.depth_bins(levels[0], levels[-1], ratio)
        log_depth = (logits.softmax(1) * centers.log()[:, :, None, None]).sum(1, keepdim=True)
        depth = F.interpolate(log_depth.exp(), size=x.shape[2:], mode="bilinear", align_corners=False)
        return logits, centers, depth[:, 0]


def load_parameters(student: Student, params: Any) -> None:
    """Copies the parameters of the Flax student into `student`; names and shapes have to agree."""
    own, taken = dict(student.named_parameters()), set()

    def walk(tree: Any, path: str) -> None:
        for key, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{path}{key}.")
                continue
            name = path + {"kernel": "weight", "scale": "weight"}.get(key, key)
            array = np.asarray(value)
            if key == "kernel":
                array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
            target = own[name]
            with torch.no_grad():
                target.copy_(torch.from_numpy(np.array(array, order="C")).reshape(target.shape))
            taken.add(name)

    walk(params, "")
    if missing := set(own) - taken:
        raise ValueError(f"not given: {', '.join(sorted(missing)[:5])}")


def silog(depth: torch.Tensor, label: torch.Tensor, rigs: int, lam: float) -> torch.Tensor:
    """SILog per rig, mean over rigs; label 0 = none."""
    valid = label > 0
    error = torch.where(valid, depth.log() - torch.where(valid, label, 1.0).log(), 0.0).reshape(rigs, -1)
    count = valid.reshape(rigs, -1).sum(1).clamp(min=1)
    mean, square = error.sum(1) / count, error.square().sum(1) / count
    return (square - lam * mean.square()).clamp(min=1e-12).sqrt().mean()


def soft_assign(r: torch.Tensor, size: torch.Size, bins: int) -> torch.Tensor:
    """Teacher's map [M, h, w], larger = nearer -> log probabilities [M, K, *size], nearest bin first."""
    r = F.interpolate(r[:, None], size=tuple(size), mode="bilinear", align_corners=False)
    ordered = r.flatten(1).sort(1).values
    low, high = (ordered[:, int(q * (ordered.shape[1] - 1)), None, None, None] for q in (0.02, 0.98))
    u = ((r - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    anchors = 1 - (torch.arange(bins, device=r.device) + 0.5) / bins
    return (-(u - anchors[:, None, None]).abs() * bins).log_softmax(1)


class Step:
    """One training step: teacher, student, SILog + KL of bin probabilities, clipping, AdamW; seconds by part.

    `autocast`: both networks compute in bfloat16 where torch.autocast has them do so; losses stay float32.
    """

    def __init__(
        self, student: Student, teacher: Any, *, lr: float, compiled: bool = False, channels_last: bool = False,
        autocast: bool = False,
    ):  # fmt: skip
        self.autocast = autocast
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.model: Any = student.to(memory_format=self.layout).train()  # type: ignore[call-overload]
        self.forward: Callable[..., Any] = torch.compile(self.model) if compiled else self.model
        self.teacher: Callable[..., Any] = torch.compile(teacher) if compiled else teacher
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=1e-2)
        self.parts: dict[str, list[float]] = {"teacher": [], "student forward": [], "backward": [], "update": []}

    def __call__(
        self, images: torch.Tensor, small: torch.Tensor, ratio: torch.Tensor, label: torch.Tensor, rigs: int
    ) -> float:
        """images [M, 3, H, W] normalised, small [M, 3, h, w] for the teacher, ratio [M], label [M, H, W] metres."""
        clock = [time.perf_counter()]

        def lap() -> None:
            if images.is_cuda:
                torch.cuda.synchronize()
            clock.append(time.perf_counter())

        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
            relative = self.teacher(small).predicted_depth.float()
        lap()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
            logits, _, depth = self.forward(images.contiguous(memory_format=self.layout), ratio)
        logits, depth = logits.float(), depth.float()
        target = soft_assign(relative, logits.shape[2:], logits.shape[1])
        own = logits.log_softmax(1)
        loss = silog(depth, label, rigs, 0.85) + (target.exp() * (target - own)).sum(1).mean()
        lap()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        lap()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        lap()
        for name, before, after in zip(self.parts, clock, clock[1:], strict=False):
            self.parts[name].append(after - before)
        return float(loss.detach())
