"""`boltlab predict` without `input`: what `Trainer.predict` gives on the batches of the data module."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from boltlab.callbacks.throughput import batch_samples
from boltlab.checkpoints import file as checkpoint_file
from boltlab.commands.predictions import as_csv, place, write
from boltlab.config.edit import edit
from boltlab.config.overrides import keys
from boltlab.ground.errors import ConfigError, Mistake
from boltlab.runs import checkpoints
from boltlab.training import plain
from boltlab.training.load import restore
from boltlab.training.other_data import build_data
from boltlab.training.trainer import make_trainer

_OF_IMAGES = {
    "top_k": "belongs to input=: here predict_step says what is given",
    "batch_size": "belongs to input=: here the data module makes the batches, data.batch_size=…",
    "devices": "belongs to input=: one process predicts the batches of a data module",
}


def main(trained: DictConfig, folder: Path, options: DictConfig, given: list[str], for_run: list[str]) -> int:
    """Writes a row for each sample where `predict_step` gives values of samples, else a file of tensors for torch.load.

    Raises:
        UserError: the module has no `predict_step`, or the data module neither loader.
    """
    mistakes = [Mistake(key, why) for key, why in _OF_IMAGES.items() if key in keys(given)]
    kind = Path(options.output).suffix.lstrip(".") if options.output else options.format
    if kind not in ("csv", "json", "pt"):
        mistakes.append(Mistake(f"output={options.output}", "must end in .csv, .json or .pt"))
    if mistakes:
        raise ConfigError(mistakes)
    batches, sizes = predicted(trained, folder, options, for_run)
    table = None if kind == "pt" else per_sample(batches, sizes)
    if table is None:
        output = Path(options.output or "predictions.pt")
        if kind != "pt" and options.output:
            shapes = plain.describe(batches[0]) if batches else "nothing"
            what = f"predict_step gives {shapes} for a batch, no values of samples: output={output.stem}.pt"
            raise ConfigError([Mistake(f"output={options.output}", what)])
        with checkpoint_file.whole(output) as file:
            torch.save(checkpoint_file.plain(joined(batches, sizes)), file)
        print(f"{sum(sizes)} samples  {output}")
    else:
        write([to_json(table) if kind == "json" else to_csv(table)], options.output)
        if options.output:
            print(f"{sum(sizes)} samples  {options.output}")
    return 0


class _Sizes(Callback):
    """The samples of each batch."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *_: Any) -> None:
        self.found.append(batch_samples(batch))


class _AsItIs:
    """Hides a DataLoader from Lightning (2.6), which makes each anew to note indices, and fails where the batch size is
    no keyword: `DataLoader(data, 64)`."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        return iter(self.loader)


def predicted(
    trained: DictConfig, folder: Path, options: DictConfig, for_run: list[str]
) -> tuple[list[Any], list[int]]:
    """What `predict_step` gives for each batch, and the samples of each."""
    content = checkpoint_file.read(checkpoints.find(folder, options.checkpoint))
    trained.update({"callbacks": {}, "logger": {}, "test": False})
    accelerator = place(options.device).type
    trained.trainer.update({"strategy": "auto", "accelerator": accelerator, "enable_progress_bar": False})
    config = edit(trained, for_run, settled=True)
    model = restore(content)
    data, _ = build_data(config, content, folder, keys(for_run))
    plain.need("predict", model, data, "predict_step", "predict_dataloader", "test_dataloader")
    loader = "test_dataloader" if plain.lacks("predict_dataloader", data, model) else "predict_dataloader"
    trainer, sizes = make_trainer(config), _Sizes()
    trainer.callbacks.append(sizes)
    make = getattr(data if plain.has(data, loader) else model, loader)

    def as_it_is() -> Any:
        if loader == "test_dataloader":
            data.setup("test")
        made = make()
        return [_AsItIs(part) for part in made] if isinstance(made, (list, tuple)) else _AsItIs(made)

    data.predict_dataloader = as_it_is
    seed_everything(config.seed, verbose=False)  # of a step that draws
    return trainer.predict(model, datamodule=data) or [], sizes.found


def per_sample(batches: list[Any], sizes: list[int]) -> dict[str, list[Any]] | None:
    """Columns of plain values, where each batch is tensors [batch] or [batch, k], or a dict of such; else None."""
    named = [batch if isinstance(batch, dict) else {"prediction": batch} for batch in batches]
    columns: dict[str, list[Any]] = {}
    for part, size in zip(named, sizes, strict=False):
        for name, tensor in part.items():
            if not isinstance(tensor, Tensor) or tensor.ndim not in (1, 2) or len(tensor) != size:
                return None
            for column, values in _columns(str(name), tensor):
                columns.setdefault(column, []).extend(values)
    lengths = {len(values) for values in columns.values()}
    return columns if len(named) == len(sizes) and lengths == {sum(sizes)} else None


def _columns(name: str, tensor: Tensor) -> list[tuple[str, list[Any]]]:
    if tensor.ndim == 1:
        return [(name, tensor.tolist())]
    return [(f"{name}_{i}", column.tolist()) for i, column in enumerate(tensor.unbind(1))]


def joined(batches: list[Any], sizes: Sequence[int] = ()) -> Any:
    """The batches as one, where they are lists with an entry of each sample, or tensors of samples, or dicts, lists and
    tuples of such tensors; else as they are."""
    if len(sizes) == len(batches) and all(map(_lists_samples, batches, sizes)):
        return [sample for batch in batches for sample in batch]
    flat = [tree_flatten(batch) for batch in batches]
    if not flat or any(spec != flat[0][1] for _, spec in flat):
        return batches
    return tree_unflatten(map(_joined, zip(*(leaves for leaves, _ in flat), strict=True)), flat[0][1])


def _joined(parts: tuple[Any, ...]) -> Any:
    forms = {(part.ndim, part.shape[1:]) if isinstance(part, Tensor) else None for part in parts}
    if len(forms) > 1 or None in forms:
        return list(parts)
    return torch.cat(parts) if parts[0].ndim else torch.stack(parts)


def _lists_samples(batch: Any, size: int) -> bool:
    """Whether a batch is a list of `size` samples, rather than of tensors that each hold a row of every sample."""
    rows = isinstance(batch, list) and all(isinstance(part, Tensor) and len(part.shape) for part in batch)
    return isinstance(batch, list) and len(batch) == size and not (rows and {len(part) for part in batch} == {size})


def to_csv(columns: dict[str, list[Any]]) -> str:
    """A row for each sample, with its place in the loader's order."""
    return as_csv(["index", *columns], ([i, *row] for i, row in enumerate(zip(*columns.values(), strict=True))))


def to_json(columns: dict[str, list[Any]]) -> str:
    """A JSON list of such rows."""
    rows = enumerate(zip(*columns.values(), strict=True))
    return json.dumps([{"index": i, **dict(zip(columns, row, strict=True))} for i, row in rows], indent=1) + "\n"
