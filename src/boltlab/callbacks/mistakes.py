"""What a net gets wrong at test, its worst mistakes first, and whether its probabilities can be believed."""

import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import SequentialSampler
from torchmetrics.utilities.distributed import gather_all_tensors

from boltlab.callbacks.at_test import AtTest, class_names, classes, most, sharing, tell
from boltlab.data.samplers import EvalSampler
from boltlab.ground.errors import DataError
from boltlab.ground.files import write_json

BATCHES_TOGETHER = 64
# Of the table that loggers get, the worst mistake first; of `mistakes.json` too, but for the picture.
COLUMNS = ["picture", "index", "file", "true", "predicted", "probability", "probability_of_true", "loss"]
MAX_SIDE = 224  # pixels of a kept picture
# Confidences are summed as whole numbers of this unit: sums of them do not depend on their order.
UNIT = 2.0**-32


class Mistakes(AtTest):
    """Writes at the end of test (and of ``trainer.validate``), from what ``test_step`` returns:
    ``{"output": logits [B, num_classes], "target": int64 [B]}``.

    - ``mistakes.json``: the ``count`` wrong predictions of the highest cross entropy, that is of the smallest
      probability of the true class: place in the split, file, classes, probabilities;
    - ``mistakes.png``: these images as evaluation sees them, each under its class and what it was taken for; and
      ``mistakes/01.png``, … each alone;
    - ``calibration.json``: ``bins`` of equal width of the probability of the predicted class, each with its samples,
      mean probability and accuracy, and the expected calibration error (Guo et al. 2017, arXiv:1706.04599): the mean
      difference of the two, weighted by the samples. A probability on an edge belongs to the bin above, 1 to the last.

    Counts are exact over any number of processes. Nothing waits for the device before the end. Does nothing where
    ``test_step`` returns something else. The sheet goes to the loggers that take images, a row
    for each mistake, with its picture as a ``Path``, to those that take tables.
    """

    def __init__(self, dir: str | Path, count: Annotated[int, Ge(1)] = 24, bins: Annotated[int, Ge(1)] = 15) -> None:
        self.dir = Path(dir)
        self.count = count
        self.bins = bins
        self._classes = 0  # of the batches seen

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._classes, device = 0, pl_module.device
        self._waiting: list[tuple[Tensor, ...]] = []
        self._seen = 0
        self._edges = torch.linspace(0, 1, self.bins + 1, device=device, dtype=torch.float32)[1:-1]
        self._numbers = torch.arange(self.bins, device=device)
        self._counts = torch.zeros(self.bins, 3, dtype=torch.int64, device=device)  # samples, right, confidence
        self._losses = torch.zeros(0, dtype=torch.float32, device=device)
        self._worst = torch.zeros(0, 3, dtype=torch.int64, device=device)  # place on this process, true, predicted
        self._shares = torch.zeros(0, 2, dtype=torch.float32, device=device)  # of the predicted and of the true class

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        if (found := classes(trainer, outputs)) is not None:
            output, target = found
            self._classes = output.shape[1]
            pairs = torch.stack([target, output.argmax(dim=1)], dim=1)
            self._waiting.append((pairs, output.float().log_softmax(dim=1).gather(1, pairs)))
            if len(self._waiting) >= BATCHES_TOGETHER:
                self._count()

    def _count(self) -> None:
        """Counts the batches that wait."""
        if not self._waiting:
            return
        pairs, logs = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting = []
        right = pairs[:, 0] == pairs[:, 1]
        shares = logs.exp().nan_to_num(0.0)
        confidence = shares[:, 1].contiguous()
        # Masks and sums: bincount waits for the device, and atomic additions are in no order.
        chosen = torch.bucketize(confidence, self._edges, right=True).unsqueeze(0) == self._numbers.unsqueeze(1)
        parts = torch.stack([torch.ones_like(pairs[:, 0]), right.long(), (confidence / UNIT).long()], dim=1)
        self._counts += (chosen.unsqueeze(2) * parts).sum(1)

        losses = torch.where(right, -math.inf, (-logs[:, 0]).nan_to_num(math.inf))
        places = torch.arange(self._seen, self._seen + len(losses), device=losses.device)
        self._seen += len(losses)
        losses = torch.cat([self._losses, losses])
        # Stable, so that of equal losses the earlier sample stays, in any division into batches.
        order = losses.argsort(descending=True, stable=True)[: self.count]
        self._losses = losses[order]
        self._worst = torch.cat([self._worst, torch.cat([places.unsqueeze(1), pairs], dim=1)])[order]
        self._shares = torch.cat([self._shares, shares.flip(1)])[order]

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._classes = most(trainer, self._classes)
        if not self._classes:
            return
        self._count()
        loaders = trainer.val_dataloaders if trainer.state.fn == "validate" else trainer.test_dataloaders
        worst = self._worst.clone()
        worst[:, 0] = _places(worst[:, 0], loaders, trainer.world_size)
        group = sharing(pl_module)
        counts = _joined(self._counts.unsqueeze(0), group).sum(0)
        losses, worst, shares = (_joined(part, group) for part in (self._losses, worst, self._shares))
        if trainer.is_global_zero:
            self._write(trainer, counts, [*zip(losses.tolist(), worst.tolist(), shares.tolist(), strict=True)])

    def _write(self, trainer: Trainer, counts: Tensor, found: list[Any]) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        split = "val" if trainer.state.fn == "validate" else getattr(data, "test_split", "test")
        self.dir.mkdir(parents=True, exist_ok=True)
        write_json(self.dir / "calibration.json", {"split": split, **calibration(counts)})
        for old in ("mistakes.json", "mistakes.png"):
            (self.dir / old).unlink(missing_ok=True)
        shutil.rmtree(self.dir / "mistakes", ignore_errors=True)
        names = class_names(trainer, self._classes)
        wrong = sorted((item for item in found if item[0] > -math.inf), key=lambda item: (-item[0], item[1][0]))
        worst = [
            {
                "index": place if place >= 0 else None,
                "file": None,
                "true": names[true],
                "predicted": names[predicted],
                "probability": probability,
                "probability_of_true": probability_of_true,
                "loss": loss if math.isfinite(loss) else None,
            }
            for loss, (place, true, predicted), (probability, probability_of_true) in wrong[: self.count]
        ]
        sheet = self._picture(data, split, worst)
        samples, right, _ = counts.sum(0).tolist()
        content = {"split": split, "samples": samples, "mistakes": samples - right, "worst": worst}
        write_json(self.dir / "mistakes.json", content)
        if sheet is not None:
            tell(trainer, "log_image", "mistakes", [str(sheet)])
        if worst:
            shown = [item | {"picture": self.dir / item["picture"] if "picture" in item else None} for item in worst]
            rows = [[_text(item[name]) for name in COLUMNS] for item in shown]
            tell(trainer, "log_table", "worst_mistakes", COLUMNS, rows)

    def _picture(self, data: Any, split: Any, worst: list[dict[str, Any]]) -> Path | None:
        """Adds files and pictures to the mistakes, and draws them on a sheet, where the data have any."""
        places = [item["index"] for item in worst]
        if None in places or not hasattr(data, "batches"):
            return None
        files = getattr(data.dataset(split), "files", None)
        if files is not None and len(files) == len(data.batches(split, augment=False)):  # none left out by a cache
            for item in worst:
                item["file"] = str(files[item["index"]])
        if not worst or len(getattr(data, "input_shape", ())) != 3 or not hasattr(data, "denormalize"):
            return None
        from PIL import Image

        from boltlab.data.grid import draw_images, pixels_of

        try:
            pixels, _ = pixels_of(data, split, places)
        except DataError as e:  # it could be read a moment ago
            warnings.warn(f"no pictures of the mistakes: {e}", stacklevel=2)
            return None
        (self.dir / "mistakes").mkdir()
        for number, (item, image) in enumerate(zip(worst, pixels, strict=True), 1):
            item["picture"] = f"mistakes/{number:02}.png"
            picture = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
            picture.thumbnail((MAX_SIDE, MAX_SIDE))
            picture.save(self.dir / item["picture"])
        titles: Any = [(item["true"], f"{item['probability']:.0%} {item['predicted']}") for item in worst]
        return draw_images(pixels, titles, self.dir / "mistakes.png")


def _text(value: Any) -> Any:
    """Trackers take text, and the name of a file may be no UTF-8."""
    return os.fsencode(value).decode(errors="backslashreplace") if isinstance(value, str) else value


def _places(places: Tensor, loaders: Any, processes: int) -> Tensor:
    """From the number of a sample on this process to its index in the split; -1 where that cannot be known."""
    loader = loaders[0] if isinstance(loaders, list) and len(loaders) == 1 else loaders
    sampler = getattr(loader, "sampler", None)
    if not getattr(loader, "bad_files", None):  # else some were left out
        if isinstance(sampler, EvalSampler):
            return sampler.rank + places * sampler.world_size
        if isinstance(sampler, SequentialSampler) and processes == 1:
            return places
    return torch.full_like(places, -1)


def _joined(values: Tensor, group: Any) -> Tensor:
    """The rows of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    return torch.cat(gather_all_tensors(values, group))


def calibration(counts: Tensor) -> dict[str, Any]:
    """``counts``: int64 [bins, 3]: samples, right ones, and the sum of the confidences in ``UNIT``."""
    total, bins = counts[:, 0].sum().item(), []
    error = 0.0
    for number, (samples, right, units) in enumerate(counts.tolist()):
        confidence, accuracy = (units * UNIT / samples, right / samples) if samples else (None, None)
        edges = {"from": number / len(counts), "to": (number + 1) / len(counts)}
        bins.append({**edges, "samples": samples, "confidence": confidence, "accuracy": accuracy})
        error += abs(units * UNIT - right)
    return {"samples": total, "expected_calibration_error": error / total if total else None, "bins": bins}
