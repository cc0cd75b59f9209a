"""A frozen teacher beside a student in its training step: the signal, what is trained with the student, the loss.

The pure parts are in `teacher_signal` (what the teacher says) and `losses.total` (what the student makes of it); here
they are put together for one config. The teacher's parameters are an argument of the step, never closed over.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from fsmde_jax import teacher_signal
from fsmde_jax.expectation import expected_depth
from fsmde_jax.losses import baselines, teacher_bins, total
from fsmde_jax.losses.total import DistillWeights, Signal
from fsmde_jax.models import depth_bins
from fsmde_jax.models.projector import PROJECTOR_SCOPE, Projector
from fsmde_jax.models.student import normalise_images
from fsmde_jax.models.teacher_head import TEACHER_BINS_SCOPE, TeacherBins
from fsmde_jax.teacher_signal import Labels, TeacherMaps

Array = Any  # jax.Array

BINS = ("soft_assign", "aligned", "learned", "two_hot")
SHIFTS = ("auto", "known", "unknown")  # of the teacher's map; auto = as its kind has it, `Teacher.shift_known`


@dataclasses.dataclass(frozen=True)
class Needs:
    """Which of the teacher's outputs the terms in use look at."""

    logits: bool
    tokens: bool


def needs(weights: DistillWeights) -> Needs:
    """What the terms whose weight is not 0 look at."""
    method = baselines.baseline(weights.baseline) if weights.baseline and weights.w_baseline else None
    kind = method.needs if method else ""
    related = weights.relation if weights.w_vr else ""
    probabilities = bool(weights.w_ckd and (weights.w_prob or weights.w_cross))
    return Needs(
        logits=probabilities or related == "bins" or kind == "logits",
        tokens=related in ("tokens", "gram") or kind == "features",
    )


@dataclasses.dataclass(frozen=True)
class Distillation:
    """The training loss of a student with a teacher: L_sup + what the teacher adds.

    Attributes:
      module: the frozen teacher, `Teacher.module(dtype)`; None = its maps are in the batch (a teacher cache).
      size: (Ht, Wt) of its input.
      tap: which of its taps gives the tokens.
      bins: its distribution over bins, one of `BINS`.
      tau_bin: of `soft_assign` and `aligned` (`teacher_signal.teacher_distribution`).
      weights: of the terms.
      labels: min_depth, max_depth, silog_lambda, chamfer_weight of `total.supervised_loss`.
      depth_range, focal_canonical: of the student's bins, for `aligned` (`depth_bins.log_anchors`).
      shift: whether the teacher's map has an unknown shift as well as an unknown scale, for `aligned`.
      head: the trained bin head of `learned`, otherwise None.
      projector: of a baseline that needs one, otherwise None.
      parts: compute the teacher on a batch in so many parts.
    """

    module: Any
    size: tuple[int, int]
    tap: int
    bins: str
    tau_bin: float
    weights: DistillWeights
    labels: Mapping[str, float]
    depth_range: tuple[float, float]
    focal_canonical: float
    shift: bool = True
    head: TeacherBins | None = None
    projector: Projector | None = None
    parts: int = 1

    def companions(self, key: Array, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Fresh parameters of what is trained beside the student, by scope: none, `projector`, `teacher_bins`.

        Args:
          key: random key.
          outputs: of the student, or their shapes.
        """
        params: dict[str, Any] = {}
        if self.projector is not None:
            features = jnp.zeros((1, 1, 1, 1, outputs["features"].shape[-1]))
            params[PROJECTOR_SCOPE] = self.projector.init(key, features)["params"]
        if self.head is not None:
            features = jnp.zeros((1, 1, 2, 2, self.module.sizes.fusion))
            params[TEACHER_BINS_SCOPE] = self.head.init(
                key, features, jnp.eye(3)[None, None], image_size=(4, 4), head_size=(2, 2)
            )["params"]
        return params

    def __call__(
        self, outputs: Mapping[str, Array], batch: Mapping[str, Array], params: Mapping[str, Any], teacher: Any
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of one batch.

        Args:
          outputs: of the student in training.
          batch: of `pipeline.train_dataset` with `clean_images`, or with a teacher cache.
          params: what is trained; `companions` are among it.
          teacher: the frozen parameters; None with a cache.

        Returns:
          (loss, terms): a float32 scalar, and scalars for the log, unweighted.
        """
        loss, terms = total.supervised_loss(outputs, batch, **self.labels)
        limits = {key: self.labels[key] for key in ("min_depth", "max_depth", "silog_lambda")}
        maps = self._maps(batch, teacher)
        logits = None
        if self.head is not None:
            own, logits = self._learned(outputs, batch, params, maps)
            terms["teacher_silog"] = own["silog"]
            loss = loss + own["loss"]
        signal = self._signal(outputs, batch, maps, logits)
        if self.projector is not None:
            projected = self.projector.apply({"params": params[PROJECTOR_SCOPE]}, outputs["features"])
            outputs = {**outputs, "projected": projected}
        if self.bins == "aligned":  # where the teacher was fitted to the student, L_cross would teach it itself
            batch = {**batch, "depth": jnp.where(self._enough(batch), batch["depth"], 0.0)}
        added, more = total.distillation_loss(outputs, batch, signal, self.weights, **limits)
        loss = loss + added
        return loss, {**terms, **more, "loss": loss}

    def _maps(self, batch: Mapping[str, Array], teacher: Any) -> TeacherMaps:
        if self.module is None:
            return teacher_signal.cached_maps(batch)
        images = normalise_images(batch["clean_images"])
        return teacher_signal.run_teacher(self.module, teacher, images, size=self.size, tap=self.tap, parts=self.parts)

    def _learned(
        self, outputs: Mapping[str, Array], batch: Mapping[str, Array], params: Mapping[str, Any], maps: TeacherMaps
    ) -> tuple[dict[str, Array], Array]:
        """The supervised loss of the teacher's own bin head, and its logits."""
        assert self.head is not None
        head_size = outputs["bin_logits"].shape[2:4]
        own: Any = self.head.apply(
            {"params": params[TEACHER_BINS_SCOPE]}, maps.features, batch["intrinsics"],
            image_size=batch["depth"].shape[2:], head_size=head_size,
        )  # fmt: skip
        loss, terms = total.supervised_loss(own, batch, **self.labels)
        return {**terms, "loss": loss}, own["bin_logits"]

    def _signal(
        self, outputs: Mapping[str, Array], batch: Mapping[str, Array], maps: TeacherMaps, learned: Array | None
    ) -> Signal:
        head_size, count = outputs["bin_logits"].shape[2:4], outputs["bin_logits"].shape[-1]
        visible = teacher_signal.pixel_mask(batch["ego_mask"], batch["view_mask"], head_size)
        says = teacher_bins.varies(teacher_bins.resize_rel_inv_depth(maps.rel_inv_depth, *head_size), visible)
        visible = visible & says[:, :, None, None]
        logits, mask = None if learned is None else jax.lax.stop_gradient(learned), visible
        if self.bins in teacher_signal.KINDS and needs(self.weights).logits:
            logits, _, mask = teacher_signal.teacher_distribution(
                maps, batch["ego_mask"], kind=self.bins, head_size=head_size, num_bins=count, tau_bin=self.tau_bin,
                centers=outputs["bin_centers"] if self.bins == "two_hot" else None,
                labels=self._labels(outputs, batch, count) if self.bins == "aligned" else None,
                view_mask=batch["view_mask"],
            )  # fmt: skip
        return Signal(mask, visible, logits, maps.tokens, maps.rel_inv_depth)

    def _enough(self, batch: Mapping[str, Array]) -> Array:
        """Views [B, N, 1, 1] bool with labels enough to fit a teacher's map to."""
        limits = {key: self.labels[key] for key in ("min_depth", "max_depth")}
        return total.label_mask(batch, **limits).sum((2, 3), keepdims=True) >= teacher_bins.MIN_LABELS

    def _labels(self, outputs: Mapping[str, Array], batch: Mapping[str, Array], count: int) -> Labels:
        """What `aligned` fits: a view's labels, or, where it has too few, what the student says in this step.

        That is its probabilities on the anchors, which the teacher's depth is assigned to, not on its own centers:
        where the teacher agrees with the student, the target is what the student has, wherever its centers are. So
        such a view is taught the shape; its level and, from a teacher of unknown shift, its range are the student's.
        """
        anchors = depth_bins.log_anchors(
            batch["intrinsics"], batch["depth"].shape[-1], count, depth_range=self.depth_range,
            focal_canonical=self.focal_canonical,
        )  # fmt: skip
        limits = {key: self.labels[key] for key in ("min_depth", "max_depth")}
        labels, enough = total.label_mask(batch, **limits), self._enough(batch)
        says = jax.nn.softmax(outputs["bin_logits"].astype(jnp.float32), -1)
        own = expected_depth(says, anchors[:, :, None, None, :], "log")
        own = jax.lax.stop_gradient(depth_bins.resize_depth(own, *batch["depth"].shape[2:]))
        seen = total.label_mask({**batch, "depth": own}, **limits)
        depth, mask = (jnp.where(enough, *pair) for pair in ((batch["depth"], own), (labels, seen)))
        return Labels(depth, mask, anchors, **limits, shift=self.shift)
