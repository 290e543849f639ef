"""Classification: cross entropy, accuracy, top-5, macro F1, precision and recall."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from boltlab import UserError
from boltlab.metrics import EpochMeans
from boltlab.optim import Schedule
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score, MulticlassPrecision, MulticlassRecall
from torchvision.transforms.v2 import CutMix, MixUp

from project.models.measured import joined, logged
from project.models.supervised import Loss, Supervised


class Classifier(Supervised):
    """Trains a net [B, …] → [B, num_classes] with cross entropy, or another `loss`, on integer classes [B].

    `metrics`, by name, are measured beside accuracy, F1, precision and recall.
    `optimizer` is called with named parameter groups; norms and biases do not decay unless `decay_norms_and_biases`.
    `class_weights`: one number a class, or "balanced" = samples / (classes · samples of the class), counted on the
    train split. `l1` times the sum of the absolute weights is added to the loss that is trained, not to the one that is
    logged. The logged loss is the same criterion on every split: with class weights and label smoothing.

    `mixup_alpha` (Zhang et al. 2018, arXiv:1710.09412) and `cutmix_alpha` (Yun et al. 2019, arXiv:1905.04899) above 0
    mix each training batch of images with itself, in shares drawn from Beta(alpha, alpha); with both, one of the two is
    drawn for each batch. train_loss is then that of the mixed targets, and train_acc counts the class of the larger
    share: both are worse than without, and say less than those of the validation.
    """

    stacks = True  # for `sweep.engine=vectorized`

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer],
        num_classes: Annotated[int, Ge(1)],
        scheduler: Schedule | None = None,
        label_smoothing: Annotated[float, Ge(0), Le(1)] = 0.0,
        class_weights: Literal["balanced"] | list[float] | None = None,
        mixup_alpha: Annotated[float, Ge(0)] = 0.0,
        cutmix_alpha: Annotated[float, Ge(0)] = 0.0,
        l1: Annotated[float, Ge(0)] = 0.0,
        decay_norms_and_biases: bool = False,
        loss: Loss | None = None,
        metrics: dict[str, Metric] | None = None,
    ) -> None:
        measured = partial(self._metrics, num_classes, metrics)
        super().__init__(net, optimizer, scheduler, l1, decay_norms_and_biases, loss, EpochMeans("acc"), measured)
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        chosen = [(kind, alpha) for kind, alpha in ((MixUp, mixup_alpha), (CutMix, cutmix_alpha)) if alpha > 0]
        self.mixers = [kind(alpha=float(alpha), num_classes=num_classes) for kind, alpha in chosen]
        self.balanced = class_weights == "balanced"
        # "balanced" waits for the data; a checkpoint brings the numbers along, so that eval weighs as training did.
        weights = None if class_weights is None else torch.ones(num_classes)
        if isinstance(class_weights, list):
            if len(class_weights) != num_classes:
                raise ValueError(f"class_weights has {len(class_weights)} numbers for {num_classes} classes")
            weights = torch.tensor(class_weights, dtype=torch.float32)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights)

    @staticmethod
    def _metrics(num_classes: int, own: dict[str, Metric] | None = None) -> dict[str, Metric]:
        # validate_args=False: the checks look into the tensors, which waits for the GPU at every step.
        metrics: dict[str, Metric] = {
            "acc": MulticlassAccuracy(num_classes, average="micro", validate_args=False),
            "f1": MulticlassF1Score(num_classes, average="macro", validate_args=False),
            "precision": MulticlassPrecision(num_classes, average="macro", validate_args=False),
            "recall": MulticlassRecall(num_classes, average="macro", validate_args=False),
        }
        if num_classes > 5:
            metrics["top5"] = MulticlassAccuracy(num_classes, top_k=5, average="micro", validate_args=False)
        return joined(metrics, own)

    @classmethod
    def logged_metrics(cls, arguments: dict[str, Any]) -> dict[str, bool | None]:
        """Every metric name that a run with these arguments logs, and whether it is better when it is larger."""
        num_classes = arguments.get("num_classes")
        few = isinstance(num_classes, int) and num_classes <= 5
        return logged(cls._metrics(2 if few else 6), "acc", arguments.get("metrics"))

    @staticmethod
    def check_arguments(arguments: dict[str, Any]) -> list[tuple[str, str]]:
        """Mistakes that no single argument shows."""
        weights, num_classes = arguments.get("class_weights"), arguments.get("num_classes")
        if isinstance(weights, list) and isinstance(num_classes, int) and len(weights) != num_classes:
            return [("class_weights", f"has {len(weights)} numbers for {num_classes} classes")]
        mixes = [name for name in ("mixup_alpha", "cutmix_alpha") if arguments.get(name)]
        if arguments.get("loss"):
            options = [name for name in (*mixes, "label_smoothing", "class_weights") if arguments.get(name)]
            return [(name, "is an option of cross entropy: give it to model.loss, or leave it out") for name in options]
        return [(name, "mixes classes, and there is one only: 0") for name in mixes if num_classes == 1]

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.num_classes == 1 and self.trainer.is_global_zero:
            print(
                "the data have one class only: every prediction is right",
                flush=True,
            )
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and self.mixers and len(getattr(data, "input_shape", (0, 0, 0))) != 3:
            raise UserError("model.mixup_alpha and cutmix_alpha mix images, this data holds none: 0")
        if stage == "fit" and self.mixers and getattr(data, "batch_size", 0) == self.trainer.world_size:
            raise UserError(
                "model.mixup_alpha and cutmix_alpha mix the samples of a batch: data.batch_size is too small"
            )
        if stage == "fit" and self.balanced and self.class_weights is not None:
            counts = self.trainer.datamodule.class_counts("train").to(self.class_weights)  # type: ignore[attr-defined]
            if (counts == 0).any():
                empty = (counts == 0).nonzero().flatten().tolist()
                raise UserError(f"class_weights=balanced: the train split has no sample of the classes {empty}")
            self.class_weights.copy_(counts.sum() / (self.num_classes * counts))

    def mix(self, batch: Any) -> Any:
        if not self.mixers or len(batch[1]) < 2:
            return batch
        # From torch's CPU generator, as dropout on the CPU: a device need not be waited for.
        mixer = self.mixers[int(torch.randint(len(self.mixers), ())) if len(self.mixers) > 1 else 0]
        return mixer(*batch)

    def criterion(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor | int]:
        if self.loss is not None:
            return self.loss(output, target), len(target)
        weights = None if self.class_weights is None else self.class_weights.to(output.dtype)
        if target.ndim == 2:  # shares of the classes [B, num_classes]
            target = target.to(output.dtype)
            smoothing = self.label_smoothing
            total = F.cross_entropy(output, target, weight=weights, label_smoothing=smoothing, reduction="sum")
            # For shares torch divides by the samples, with class weights too; here as it does for classes.
            weight = len(target) if weights is None else (target @ weights).sum()
            return total / weight, weight
        loss = F.cross_entropy(output, target, weight=weights, label_smoothing=self.label_smoothing)
        # cross_entropy divides by the sum of the samples' weights, so that sum is what the batch's mean stands for.
        return loss, len(target) if weights is None else weights[target].sum()

    def train_value(self, output: Tensor, target: Tensor) -> Tensor:
        """Whether the sample is classified rightly; a mixed one, as what most of it is."""
        if target.ndim == 2:
            target = target.argmax(dim=1)
        return output.argmax(dim=1) == target

    def predict(self, output: Tensor) -> Tensor:
        """Probabilities [B, num_classes]."""
        return output.softmax(dim=-1)
