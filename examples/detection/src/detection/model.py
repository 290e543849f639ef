"""A detector without anchors: the cell under a box's centre names its class and the distances to its four sides."""

import lightning as L
import torch
from torch import nn
from torchvision.ops import box_iou, generalized_box_iou_loss, nms, sigmoid_focal_loss

STRIDE = 4


class Detector(L.LightningModule):
    def __init__(self, num_classes: int = 10, width: int = 48, lr: float = 3e-3):
        super().__init__()
        self.save_hyperparameters()
        layers = []
        for inputs, stride in ((1, 2), (width, 2), (width, 1), (width, 1)):
            layers += [nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        self.net = nn.Sequential(*layers, nn.Conv2d(width, num_classes + 4, 3, padding=1))
        nn.init.constant_(self.net[-1].bias[:num_classes], -4.0)  # nearly all cells are empty
        self.found, self.boxes = [], 0

    def forward(self, images):
        """Class logits [B, num_classes, h, w] and boxes [B, h, w, 4] of each cell."""
        logits, sides = self.net(images).split([self.hparams.num_classes, 4], 1)
        sides = 8 * sides.clamp(max=3).exp().permute(0, 2, 3, 1)
        centres = STRIDE * (torch.arange(sides.shape[1], device=sides.device) + 0.5)
        centres = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), -1)
        return logits, torch.cat([centres - sides[..., :2], centres + sides[..., 2:]], -1)

    def training_step(self, batch, batch_idx):
        logits, boxes = self(batch[0])
        labels, wanted = (torch.cat([target[key] for target in batch[1]]) for key in ("labels", "boxes"))
        sample = torch.cat([torch.full_like(target["labels"], i) for i, target in enumerate(batch[1])])
        x, y = ((wanted[:, :2] + wanted[:, 2:]) / 2 / STRIDE).long().unbind(1)
        heat = torch.zeros_like(logits)
        heat[sample, labels, y, x] = 1
        classes = sigmoid_focal_loss(logits, heat, alpha=0.5, reduction="sum") / len(labels)
        places = generalized_box_iou_loss(boxes[sample, y, x], wanted, reduction="mean")
        self.log_dict({"train_classes": classes, "train_boxes": places}, batch_size=len(logits))
        return classes + places

    def predict_step(self, batch, batch_idx):
        """For each image its boxes [N, 4], scores [N] and labels [N], best first."""
        logits, boxes = self(batch[0])
        found = []
        for scores, places in zip(logits.sigmoid().flatten(2), boxes.flatten(1, 2), strict=True):
            scores, labels = scores.max(0)
            kept = nms(places, scores, 0.5)[:20]
            found.append({"boxes": places[kept], "scores": scores[kept], "labels": labels[kept]})
        return found

    def validation_step(self, batch, batch_idx):
        """A box is right that has the class and half of the area of one which no better box has taken."""
        for found, target in zip(self.predict_step(batch, batch_idx), batch[1], strict=True):
            overlap = box_iou(found["boxes"], target["boxes"])
            overlap[found["labels"][:, None] != target["labels"]] = 0
            for score, row in zip(found["scores"], overlap, strict=True):
                self.found.append((float(score), bool(row.max() >= 0.5)))
                overlap[:, row.argmax()] *= row.max() < 0.5
            self.boxes += len(target["labels"])

    def on_validation_epoch_end(self, stage="val"):
        """The area under precision over recall, of the boxes of all classes together."""
        right = torch.tensor([right for _, right in sorted(self.found, reverse=True)], dtype=torch.float32)
        precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
        self.log(f"{stage}_average_precision", (precision * right).sum() / self.boxes, prog_bar=True)
        self.found, self.boxes = [], 0

    test_step = validation_step

    def on_test_epoch_end(self):
        self.on_validation_epoch_end("test")

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]
