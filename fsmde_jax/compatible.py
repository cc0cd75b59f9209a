"""What fits what: a config to the config that a checkpoint was made with, and parameters to a model."""

from typing import Any

import jax

from fsmde_jax.errors import ConfigError, TrainingError

# A change of these keys makes another network or other numbers of the same shape; everything else may change on resume.
_FIXED_KEYS = ("task", "data.image_size", "data.cameras", "seed", "distill")
_FIXED_BY_TASK = {"student": ("model",), "teacher": ("teacher.variant", "teacher.longer_side")}


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """One line per dotted key at which two nested dicts differ, with both values; lists and tuples are the same."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new))
        return [d for key in keys for d in differences(old.get(key), new.get(key), f"{path}.{key}".strip("."))]
    as_list = [list(v) if isinstance(v, (tuple, list)) else v for v in (old, new)]
    return [] if as_list[0] == as_list[1] else [f"{path}: checkpoint has {old!r}, config has {new!r}"]


def _select(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def model_of(config: dict[str, Any]) -> dict[str, Any]:
    """The section `model` of a saved config. Runs from before `expectation` could be chosen took the mean of depth."""
    return {"expectation": "depth", **config.get("model", {})}


def check_config(saved: dict[str, Any], config: dict[str, Any], where: str) -> None:
    """Raises `ConfigError` showing every difference that forbids using checkpoint `where` with `config`."""
    # Runs of older versions do not say these: they trained students, without a teacher.
    alone = {**config.get("distill", {}), "w_ckd": 0.0, "w_vr": 0.0, "baseline": ""}
    saved, config = (
        {"task": "student", **c, "model": model_of(c), "distill": {"shift": "auto", **c.get("distill", alone)}}
        for c in (saved, config)
    )
    taught = any(c["distill"].get(key) for c in (saved, config) for key in ("w_ckd", "w_vr", "baseline"))
    keys = [key for key in _FIXED_KEYS + _FIXED_BY_TASK[config["task"]] if taught or key != "distill"]
    found = [d for key in keys for d in differences(_select(saved, key), _select(config, key), key)]
    before, now = (_select(c, "optim.average_decay") or 0.0 for c in (saved, config))
    if bool(before) != bool(now):  # averages begin with the run
        found += differences(before, now, "optim.average_decay")
    lines = "\n  ".join(found)
    if lines:
        raise ConfigError(
            f"{where} was made with another config:\n  {lines}\n"
            "Undo the change, or choose a new --workdir (with --init_from to start from these parameters)."
        )


def fit_parameters(template: Any, source: Any, where: str) -> Any:
    """`source` placed like `template`, after checking that names and shapes agree.

    Raises:
      TrainingError: listing every missing, extra and misshapen parameter.
    """

    def flat(tree: Any) -> dict[str, Any]:
        return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    wanted, found = flat(template), flat(source)
    problems = [f"missing {name}" for name in sorted(set(wanted) - set(found))]
    problems += [f"not expected {name}" for name in sorted(set(found) - set(wanted))]
    problems += [
        f"{name}: {found[name].shape} instead of {wanted[name].shape}"
        for name in sorted(set(wanted) & set(found))
        if found[name].shape != wanted[name].shape
    ]
    if problems:
        raise TrainingError(f"{where} does not fit this config's model:\n  " + "\n  ".join(problems))
    return jax.tree.map(lambda t, s: jax.device_put(s, t.sharding), template, source)
