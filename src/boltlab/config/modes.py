"""Which way a monitored metric gets better."""

import inspect
import re
from collections.abc import Mapping
from typing import Any, Literal

from boltlab.ground.errors import Mistake

# Last words of metric names → whether larger is better; what has another last word is not guessed.
_LARGER_IS_BETTER = dict.fromkeys(("acc", "accuracy", "f1", "auroc", "precision", "recall", "iou", "r2"), True)
_LARGER_IS_BETTER |= dict.fromkeys(("loss", "mse", "mae", "rmse", "error", "perplexity"), False)


def direction(metric: str, known: Mapping[str, bool | None]) -> Literal["min", "max"] | None:
    """What is better of a metric: as `known` has it, whose values are torchmetrics' `higher_is_better`, or as the last
    word of its name says; None where neither does."""
    larger = known.get(metric)
    if larger is None:  # without what Lightning appends
        word = re.split(r"[\W_]+", re.sub(r"(_step|_epoch)?(/dataloader_idx_\d+)?$", "", metric.lower()))[-1]
        larger = _LARGER_IS_BETTER.get(word)
    return None if larger is None else "max" if larger else "min"


def settle(key: str, mode: str, metric: str, known: Mapping[str, bool | None]) -> tuple[str, list[Mistake]]:
    """The mode of a metric, min or max, where `mode` is one of these or auto; and what is wrong with it."""
    better = direction(metric, known)
    if mode != "auto" and better in (None, mode):
        return mode, []
    if mode == "auto" and better is not None:
        return better, []
    message = f"nothing says whether {metric} is better when it is larger or smaller: {key}=max or {key}=min"
    if better is not None:
        what = "smaller" if better == "min" else "larger"
        message = f"{metric} is better when it is {what}: {key}={better}, or leave {key}=auto"
    return mode, [Mistake(f"{key}={mode}", message)]


def mode_key(target: Any) -> str | None:
    """The argument that says whether the metric in the argument `monitor` is to be min or max."""
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # some builtins have none
        return None
    key = "monitor_mode" if "monitor_mode" in parameters else "mode"
    # Where its default is something else, so is what it means.
    known = "monitor" in parameters and key in parameters
    return key if known and parameters[key].default in ("min", "max", inspect.Parameter.empty) else None
