"""The metrics of a split, and the names under which they are logged."""

from typing import Any

from boltlab.metrics import MeanLoss
from torchmetrics import Metric, MetricCollection


def joined(metrics: dict[str, Metric], own: dict[str, Metric] | None) -> dict[str, Metric]:
    """The metrics with copies of a config's `own`, for one split."""
    for name in metrics.keys() & (own or {}).keys():
        raise ValueError(f"metrics.{name}: this name is taken, give yours another")
    return metrics | {name: metric.clone() for name, metric in (own or {}).items()}


def collection(split: str, metrics: dict[str, Metric]) -> MetricCollection:
    """The metrics of a split and its mean loss, under the names `val_…` or `test_…`."""
    # Macro F1, precision and recall count the same four numbers: one of them counts, the others share.
    shared = [name for name in metrics if name in ("f1", "precision", "recall")]
    groups = [[name] for name in ("loss", *metrics) if name not in shared] + ([shared] if shared else [])
    return MetricCollection({"loss": MeanLoss(), **metrics}, prefix=f"{split}_", compute_groups=groups)


def logged(metrics: dict[str, Metric], train: str, own: dict[str, Any] | None) -> dict[str, bool | None]:
    """The names of what is logged with these metrics and a config's `own`, and whether larger is better; `train` is
    also of the training."""
    known = {"loss": False, **{name: metric.higher_is_better for name, metric in metrics.items()}}
    # What a config will build is known by its class, `kind`.
    known |= {name: getattr(metric.kind, "higher_is_better", None) for name, metric in (own or {}).items()}
    found = {f"{split}_{name}": larger for split in ("val", "test") for name, larger in known.items()}
    return found | {"train_loss": False, "train_loss_step": False, f"train_{train}": known[train]}
