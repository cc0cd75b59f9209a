"""How to evaluate: the options of one evaluation, and what a config says about them."""

import dataclasses

import ml_collections

from fsmde_jax import metrics
from fsmde_jax.errors import ConfigError
from fsmde_jax.names import nearest
from fsmde_jax.protocols import RANGES, TruthKind

PROTOCOLS = ("surround", "vfdepth", "affine")
GROUND_TRUTHS = ("lidar", "dense")


@dataclasses.dataclass(frozen=True)
class EvalOptions:
    """How to evaluate; depths in metres.

    `limit` = 0 takes all samples, otherwise that many, spread evenly. `confidence`: see `fsmde_jax.confidence`.
    `drop_cameras`: names of cameras that the network does not see and that are not measured.
    """

    image_size: tuple[int, int]
    protocol: str = "surround"
    ground_truth: TruthKind = "lidar"
    min_depth: float = 0.1
    max_depth: float = 80.0
    batch_size: int = 1
    flip_tta: bool = False
    limit: int = 0
    num_pictures: int = 0
    num_threads: int = 2
    confidence: bool = False
    drop_cameras: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.protocol not in PROTOCOLS:
            known = ", ".join(PROTOCOLS)
            raise ConfigError(f"eval.protocol = {self.protocol!r}: expected one of {known} (docs/protocol.md)")
        if self.ground_truth not in GROUND_TRUTHS:
            raise ConfigError(f"eval.ground_truth = {self.ground_truth!r}: expected one of {', '.join(GROUND_TRUTHS)}")
        if self.ground_truth == "dense" and self.protocol == "vfdepth":
            raise ConfigError("eval.ground_truth = 'dense' needs eval.protocol surround or affine, not vfdepth")
        if self.confidence and self.protocol != "surround":
            raise ConfigError(f"eval.confidence = True needs eval.protocol surround, not {self.protocol}")
        if self.confidence and self.flip_tta:
            raise ConfigError("eval.confidence = True needs eval.flip_tta = False: two predictions are no distribution")
        if not 0 < self.min_depth < self.max_depth:
            limits = f"eval.min_depth = {self.min_depth}, eval.max_depth = {self.max_depth}"
            raise ConfigError(f"{limits}: expected 0 < min < max")


def options_from(config: ml_collections.ConfigDict, *, limit: int = 0, num_pictures: int = 0) -> EvalOptions:
    """The options that a config's `eval` and `data` describe."""
    e = config.eval
    return EvalOptions(
        image_size=(int(config.data.image_size[0]), int(config.data.image_size[1])), protocol=e.protocol,
        ground_truth=e.ground_truth, min_depth=e.min_depth, max_depth=e.max_depth,
        batch_size=e.batch_size, flip_tta=e.flip_tta, limit=limit, num_pictures=num_pictures,
        num_threads=max(1, config.data.num_threads), confidence=e.confidence, drop_cameras=tuple(e.drop_cameras),
    )  # fmt: skip


def check(config: ml_collections.ConfigDict) -> None:
    """Checks the `eval` keys before any work.

    Raises:
      ConfigError: an unknown protocol, an impossible range, or a protocol that does not fit the task.
    """
    if config.task == "teacher" and config.eval.confidence:
        raise ConfigError("eval.confidence = True: a student's; a teacher has no bin distribution in metres")
    if config.task == "teacher" and options_from(config).protocol != "affine":
        raise ConfigError(f"eval.protocol = {config.eval.protocol!r}: a teacher knows no metres, use affine")


def check_best(config: ml_collections.ConfigDict) -> None:
    """Checks that `eval.best_metric` can choose the best checkpoint of a training run.

    Raises:
      ConfigError: it is no metric of the protocol, or higher is better.
    """
    options = options_from(config)
    parts = ["affine"] if options.protocol == "affine" else ["metric", "median"]
    if options.protocol == "surround":
        parts += ["shared_median", "overlap", *(f"range_{low}_{high}" for low, high in RANGES)]
    known = [f"{part}/{name}" for part in parts for name in metrics.LOWER_IS_BETTER]
    known += ["consistency/overall"] if options.protocol == "surround" else []
    name = config.eval.best_metric
    if name not in known:
        near = nearest(name, known, cutoff=0.0)
        raise ConfigError(
            f"eval.best_metric = {name!r} cannot be minimised under {options.protocol}; use e.g. {near!r}"
        )
