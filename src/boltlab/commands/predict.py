"""`boltlab predict`: class and probabilities of image files, or what a module's own `predict_step` gives."""

import glob
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from boltlab import runs
from boltlab.commands.eval import refuse_trained
from boltlab.commands.predictions import as_csv, place, write
from boltlab.config.build import build
from boltlab.config.compose import compose
from boltlab.config.edit import edit
from boltlab.config.overrides import keys, split_overrides
from boltlab.ground import signals, started_by
from boltlab.ground.errors import ConfigError, Mistake, UserError
from boltlab.processes.launch import launch


def main(overrides: list[str]) -> int:
    """Writes one row a file; unreadable files are listed with their reason. Fails only where no file could be read.

    Without `input`, what the module's `predict_step` gives on its data: see `predict_loader`.
    """
    own, for_run = split_overrides("predict", overrides)
    options = compose("predict", own).config
    refuse_trained(for_run, ("data", "augment"))  # there is no Trainer
    kind = Path(options.output).suffix.lstrip(".") if options.output else options.format
    folder = runs.find(options.run, options.log_dir)
    trained = runs.load_config(folder, replaced=["callbacks", "logger", *keys(for_run)])
    trained.trainer.update({"devices": 1, "num_nodes": 1})
    if options.input is None and not _takes_images(trained):
        from boltlab.commands.predict_loader import main as predict_loader

        return predict_loader(trained, folder, options, own, for_run)
    if options.input is None:
        raise ConfigError([Mistake("input", "is missing: give an image file, a folder or a glob in quotes, input=…")])
    if kind not in ("csv", "json"):
        raise ConfigError([Mistake(f"output={options.output}", "must end in .csv or .json")])
    files = find_files(list(options.input) if not isinstance(options.input, str) else [options.input])
    rows = _rows(edit(trained, for_run, settled=True), folder, files, options)
    write(to_json(rows) if kind == "json" else to_csv(rows), options.output, f"{len(rows)} files")
    bad = [row for row in rows if row["error"]]
    for row in bad:
        print(f"not read  {row['error']}", file=sys.stderr)
    return 1 if len(bad) == len(rows) else 0


def _rows(config: Any, folder: Path, files: list[Path], options: Any) -> list[dict[str, Any]]:
    """A row a file, made by as many processes as were asked for, or were started from outside."""
    asked = {key: options[key] for key in ("checkpoint", "batch_size", "device", "devices", "top_k")}
    outside = started_by.outside()
    if outside is not None:
        asked["devices"] = outside.size
    if asked["devices"] > 1:
        return list(together(config, folder, files, asked, None if outside is None else options.log_dir))
    return list(predict(config, folder, files, **asked))


def _takes_images(config: Any) -> bool:
    return len(config.data.get("input_shape") or ()) == 3 and bool(config.data.get("class_names"))


def find_files(inputs: list[str]) -> list[Path]:
    """The image files that files, folders (searched to the bottom) and globs name, sorted, each once.

    Raises:
        UserError: an input names nothing.
    """
    from boltlab.data.image_folder import EXTENSIONS

    found: list[Path] = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            here = [p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file()]
        elif path.exists():
            here = [path]
        else:
            here = [Path(name) for name in glob.glob(text, recursive=True) if Path(name).is_file()]
        if not here:
            raise UserError(f"input={text} names no image: give a file, a folder or a glob in quotes")
        found += here
    return sorted(set(found))


def together(
    config: Any, folder: Path, files: list[Path], asked: dict[str, Any], where: str | None
) -> Iterator[dict[str, Any]]:
    """The rows of `predict` in `asked["devices"]` processes, which take the batches that one would take, in turn.

    where: a folder that all of them see, for what they have to tell; None on one machine.
    """
    config.trainer.devices = asked["devices"]
    with tempfile.TemporaryDirectory(prefix="boltlab-predict-", dir=where) as name:
        shared = Path(name).resolve()
        config = runs.write_config(shared, config)
        named = {"folder": str(folder), "files": list(map(str, files))}
        (shared / "asked.json").write_text(json.dumps(named | asked))
        launch(predict_part, shared, config)
        parts = [iter(json.loads(_part(shared, rank).read_text())) for rank in range(asked["devices"])]
    for batch in range(-(-len(files) // asked["batch_size"])):
        yield from islice(parts[batch % len(parts)], asked["batch_size"])


def predict_part(folder_name: str, config: Any) -> None:
    """What every process of a prediction does."""
    shared, rank = Path(folder_name), int(os.environ["RANK"])
    with signals.caught():
        asked = json.loads((shared / "asked.json").read_text())
        asked |= {"folder": Path(asked["folder"]), "files": list(map(Path, asked["files"])), "rank": rank}
        rows = list(predict(config, **asked))
        _part(shared, rank).write_text(json.dumps(rows))


def _part(shared: Path, rank: int) -> Path:
    return shared / f"rows-{rank}.json"


def predict(
    config: Any,
    folder: Path,
    files: list[Path],
    checkpoint: str | None,
    batch_size: int,
    device: str,
    top_k: int,
    devices: int = 1,
    rank: int = 0,
) -> Iterator[dict[str, Any]]:
    """One row a file, in the order of `files`: file, class, probability, top_k and error.

    Of the batches that process number `rank` takes of `devices`: a file is in the same one however many there are, for
    what a net gives rounds differently in batches of other sizes.
    """
    import torch

    from boltlab.checkpoints import file as checkpoint_file
    from boltlab.ground.errors import DataError
    from boltlab.runs import checkpoints
    from boltlab.training.load import fitted, restore

    if not _takes_images(config):
        raise UserError(
            "input= takes images for a classifier of images, which this run is not: without input=, predict_step is"
            " called on the batches of predict_dataloader or test_dataloader"
        )
    where = place(device, devices, rank)
    content = checkpoint_file.read(checkpoints.find(folder, checkpoint))
    model = restore(content)
    try:
        model = model.to(where)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"device={device}: {str(e).splitlines()[0]}") from e
    data = build(config, "data")
    names = list(fitted(content)["class_names"] or config.data.class_names)

    def load(path: Path) -> Any:
        try:
            return data.eval_pixels(path)
        except DataError as e:
            return e

    with ThreadPoolExecutor(4) as pool, torch.inference_mode():
        for start in range(0, len(files), batch_size)[rank::devices]:
            part = files[start : start + batch_size]
            images = list(pool.map(load, part))
            good = [image for image in images if not isinstance(image, DataError)]
            probabilities: Iterator[Any] = iter(())
            if good:
                batch = data.normalize(torch.stack(good).to(where))
                probabilities = iter(model.predict_step((batch,), 0).float().cpu())
            for path, image in zip(part, images, strict=True):
                if isinstance(image, DataError):
                    yield {"file": str(path), "class": None, "probability": None, "top_k": [], "error": str(image)}
                    continue
                values, indices = next(probabilities).topk(min(top_k, len(names)))
                best = [
                    {"class": names[i], "probability": round(v, 6)}
                    for v, i in zip(values.tolist(), indices.tolist(), strict=True)
                ]
                yield {"file": str(path), **best[0], "top_k": best, "error": None}


def to_csv(rows: list[dict[str, Any]]) -> str:
    """CSV with a header; the second to k-th class stand in columns of their own."""
    width = max([len(row["top_k"]) for row in rows], default=0)
    more = [f"{name}_{rank}" for rank in range(2, width + 1) for name in ("class", "probability")]
    lines = []
    for row in rows:
        others = [value for one in row["top_k"][1:] for value in (one["class"], one["probability"])]
        others += [None] * (len(more) - len(others))
        lines.append([row["file"], row["class"], row["probability"], *others, row["error"]])
    return as_csv(["file", "class", "probability", *more, "error"], lines)


def to_json(rows: list[dict[str, Any]]) -> str:
    """A JSON list of the rows."""
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
