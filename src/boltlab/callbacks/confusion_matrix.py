"""Which classes are taken for which, at test: numbers and a picture."""

import csv
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from boltlab.callbacks.at_test import AtTest, class_names, classes, most, sharing, tell

MAX_NUMBERED_CLASSES = 20  # more cells are too small for a number
MAX_NAMED_CLASSES = 200


class ConfusionMatrix(AtTest):
    """Writes three files at the end of test (and of ``trainer.validate``), from what ``test_step`` returns:
    ``{"output": [B, num_classes], "target": int64 [B]}``.

    - ``confusion_matrix.csv``: a row a true class, a column a predicted class, numbers of samples;
    - ``confusion_matrix.png``: the same as shares of the true class;
    - ``per_class_accuracy.csv``: class, samples, correct, accuracy.

    Counts are summed over processes. Does nothing where ``test_step`` returns something else. Classes have the names
    of ``trainer.datamodule.class_names``, else numbers. The picture goes to the loggers that take images, the counts to
    those with a plot of their own.
    """

    def __init__(self, dir: str | Path, picture: bool = True) -> None:
        self.dir = Path(dir)
        self.picture = picture
        self._counts: MulticlassConfusionMatrix | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._counts = None

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        if (found := classes(trainer, outputs)) is not None:
            output, target = found
            if self._counts is None:
                self._counts = self._new(output.shape[1], pl_module)
            self._counts.update(output.argmax(dim=1), target)

    @staticmethod
    def _new(count: int, pl_module: LightningModule) -> MulticlassConfusionMatrix:
        # Labels are checked when they are read, and a check here would wait for the device at every batch.
        counts = MulticlassConfusionMatrix(count, validate_args=False).to(pl_module.device)
        counts.process_group = sharing(pl_module)
        return counts

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        count = most(trainer, 0 if self._counts is None else self._counts.num_classes)
        if not count:
            return
        counts, names = self._counts or self._new(count, pl_module), class_names(trainer, count)
        # On every process: this is where they are summed. Of one class, it is a number.
        matrix = counts.compute().cpu().reshape(count, count)
        self._counts = None
        if trainer.is_global_zero:
            self.dir.mkdir(parents=True, exist_ok=True)
            write_numbers(matrix, names, self.dir)
            tell(trainer, "log_confusion_matrix", "confusion_matrix_plot", matrix, names)
            if self.picture:
                path = self.dir / "confusion_matrix.png"
                draw(matrix, names, path)
                tell(trainer, "log_image", "confusion_matrix", [str(path)])


def write_numbers(matrix: Tensor, class_names: list[str], folder: Path) -> None:
    """``matrix``: int64 [true class, predicted class]."""
    from boltlab.ground.texts import cell

    class_names = [cell(name) for name in class_names]
    with (folder / "confusion_matrix.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["true \\ predicted", *class_names])
        writer.writerows([name, *row] for name, row in zip(class_names, matrix.tolist(), strict=True))
    with (folder / "per_class_accuracy.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["class", "samples", "correct", "accuracy"])
        for name, total, correct in zip(class_names, matrix.sum(1).tolist(), matrix.diag().tolist(), strict=True):
            writer.writerow([name, total, correct, f"{correct / total:.4f}" if total else ""])


def draw(matrix: Tensor, class_names: list[str], path: Path) -> None:
    """A heat map of the shares of each true class; small ones carry the numbers of samples."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes longer to import than the rest of this module
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    classes = len(class_names)
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    inches = min(24.0, max(4.5, 0.5 * classes if classes <= MAX_NUMBERED_CLASSES else 0.13 * classes))
    figure = Figure(figsize=(inches + 1.5, inches + 1.0), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    norm = PowerNorm(0.5, vmin=0, vmax=1)  # a share of 0.01 is still seen
    image = axes.imshow(shares.numpy(), cmap="Blues", norm=norm, interpolation="nearest")
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    correct, total = int(matrix.diag().sum()), int(matrix.sum())
    axes.set(xlabel="predicted", ylabel="true", title=f"accuracy {correct / max(1, total):.2%} of {total:,}")
    if classes <= MAX_NAMED_CLASSES:
        size = 9 if classes <= MAX_NUMBERED_CLASSES else max(5.5, 9 - classes / 40)
        labels = [name if len(name) <= 20 else name[:19] + "…" for name in class_names]
        # parse_math: a class name may hold a dollar sign.
        axes.set_xticks(range(classes), labels, rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(range(classes), labels, fontsize=size, parse_math=False)
    if classes <= MAX_NUMBERED_CLASSES:
        for row, column in torch.nonzero(matrix).tolist():
            colour = "white" if shares[row, column] > 0.3 else "black"
            axes.text(column, row, str(int(matrix[row, column])), ha="center", va="center", color=colour, fontsize=8)
    with warnings.catch_warnings():
        # matplotlib's own font lacks, for example, Chinese; the CSV has the names whatever the picture shows.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(path)
