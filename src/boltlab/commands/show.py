"""`boltlab show`: what the model gets to see, as a picture, and the class counts of every split."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from boltlab.config.build import build
from boltlab.config.compose import compose
from boltlab.config.overrides import keys
from boltlab.ground.errors import UserError


def main(overrides: list[str]) -> int:
    """Writes a labelled grid of images (PNG) and prints how many samples of each class every split has."""
    if "data" not in keys(overrides):  # that of a training
        overrides = [f"data={compose('train', [], check=False).choices['data'] or 'null'}", *overrides]
    config = compose("show", overrides).config
    from rich.console import Console
    from rich.table import Table

    from boltlab.data.base import DataModule
    from boltlab.data.grid import count_classes, draw_grid

    data: Any = build(config, "data")
    ours = isinstance(data, DataModule)
    if not ours:
        return _show_batch(config, data)
    if len(data.input_shape) != 3:
        raise UserError(f"boltlab show draws images; samples of this data have the shape {list(data.input_shape)}")
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    draw_grid(data, split=config.split, count=config.count, path=output)
    counts = count_classes(data)
    table = Table("class", *counts)
    for index, name in enumerate(data.class_names):
        table.add_row(str(name), *(str(int(split[index])) for split in counts.values()))
    table.add_section()
    table.add_row("all", *(str(int(split.sum())) for split in counts.values()))
    Console().print(table)
    print(f"picture  {output}")
    return 0


def _show_batch(config: DictConfig, data: Any) -> int:
    """Of a plain data module: the first images of the split's loader, each under its class where a batch says it."""
    import torch

    from boltlab.data.grid import draw_images
    from boltlab.training import plain

    loader = f"{config.split}_dataloader"
    if lack := plain.lacks(loader, data):
        raise UserError(f"boltlab show draws batches of {loader}: {lack}")
    torch.manual_seed(config.seed)
    data.prepare_data()
    data.setup("test" if config.split == "test" else "fit")
    batches = getattr(data, loader)()
    images, labels = _first(batches, config.count, type(data).__name__)
    if not images:
        raise UserError(f"{loader} gives no batch")
    names = getattr(data, "class_names", None) or {}
    titles: list[tuple[str, ...]]
    titles = [("" if y is None else str(names[y] if y in range(len(names)) else y),) for y in labels[: config.count]]
    draw_images(_pixels(torch.cat(images)[: config.count]), titles, config.output)
    size = len(batches.dataset) if hasattr(getattr(batches, "dataset", None), "__len__") else "?"
    print(f"{config.split} split: {size} samples\npicture  {config.output}")
    return 0


def _first(batches: Any, count: int, data: str) -> tuple[list[Any], list[int | None]]:
    """The first images, a tensor a batch, until there are `count`; and the class of each, None where none is given."""
    import torch

    from boltlab.training.plain import describe

    images: list[Any] = []
    labels: list[int | None] = []
    for batch in batches:
        parts: list[Any] = [*batch, None, None] if isinstance(batch, (list, tuple)) else [batch, None]
        x, y = parts[:2]
        if not (isinstance(x, torch.Tensor) and x.ndim == 4 and x.shape[1] in (1, 3)):
            raise UserError(
                "boltlab show draws images: the first part of a batch must be a tensor [B, 1 or 3, H, W];"
                f" {data} gives {describe(batch)}"
            )
        images.append(x)
        known = isinstance(y, torch.Tensor) and y.ndim == 1 and not y.is_floating_point()
        labels += y.tolist() if known and y is not None else [None] * len(x)
        if len(labels) >= count:
            break
    return images, labels


def _pixels(images: Any) -> Any:
    """uint8 [N, H, W, C] of images [N, C, H, W]: bytes and 0..1 as they are, other values between their extremes."""
    import torch

    if images.dtype != torch.uint8:
        images = images.float()
        low, high = min(0.0, images.min().item()), max(1.0, images.max().item())
        images = ((images - low) / (high - low) * 255).round().to(torch.uint8)
    return images.permute(0, 2, 3, 1).numpy()
