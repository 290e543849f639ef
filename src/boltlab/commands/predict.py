"""`boltlab predict`: class and probabilities of image files, or what a module's own `predict_step` gives."""

import glob
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import chain, islice
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
    bad: Counter[str] = Counter()
    rows = _noted(_rows(edit(trained, for_run, settled=True), folder, files, options), bad)
    write(to_json(rows) if kind == "json" else to_csv(rows), options.output)
    if options.output:
        print(f"{len(files)} files{f', {bad.total()} not read' if bad else ''}  {options.output}")
    return 1 if bad.total() == len(files) else 0


def _noted(rows: Iterable[dict[str, Any]], bad: Counter[str]) -> Iterator[dict[str, Any]]:
    """The rows, while those of unreadable files are told and counted."""
    for row in rows:
        if row["error"]:
            print(f"not read  {row['error']}", file=sys.stderr)
            bad["files"] += 1
        yield row


def _rows(config: Any, folder: Path, files: list[str], options: Any) -> Iterator[dict[str, Any]]:
    """A row a file, made by as many processes as were asked for, or were started from outside."""
    asked = {key: options[key] for key in ("checkpoint", "batch_size", "device", "devices", "top_k")}
    outside = started_by.outside()
    if outside is not None:
        asked["devices"] = outside.size
    if asked["devices"] > 1:
        return together(config, folder, files, asked, None if outside is None else options.log_dir)
    return predict(config, folder, files, **asked)


def _takes_images(config: Any) -> bool:
    return len(config.data.get("input_shape") or ()) == 3 and bool(config.data.get("class_names"))


def find_files(inputs: list[str]) -> list[str]:
    """The image files that files, folders (searched to the bottom) and globs name, sorted, each once.

    In folders, what is hidden (".name") is left out, as in training. A link that leads nowhere is a file here: reading
    it says what it is.

    Raises:
        UserError: an input names nothing.
    """
    found: set[str] = set()
    for text in inputs:
        path = os.path.expanduser(text)
        if os.path.isdir(path):
            here = list(_below(path))
        elif os.path.lexists(path):
            here = [path]
        else:
            here = [name for name in glob.glob(path, recursive=True) if not os.path.isdir(name)]
        if not here:
            raise UserError(f"input={text} names no image: give a file, a folder or a glob in quotes")
        found.update(str(Path(name)) for name in here)
    return sorted(found, key=lambda name: name.replace(os.sep, "\0"))  # folder by folder


def _below(folder: str) -> Iterator[str]:
    from boltlab.data.image_folder import EXTENSIONS

    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        shown = (name for name in names if not name.startswith("."))
        yield from (os.path.join(parent, name) for name in shown if name.lower().endswith(EXTENSIONS))


def together(
    config: Any, folder: Path, files: list[str], asked: dict[str, Any], where: str | None
) -> Iterator[dict[str, Any]]:
    """The rows of `predict` in `asked["devices"]` processes, which take the batches that one would take, in turn.

    where: a folder that all of them see, for what they have to tell; None on one machine.
    """
    config.trainer.devices = asked["devices"]
    with tempfile.TemporaryDirectory(prefix="boltlab-predict-", dir=where) as name:
        shared = Path(name).resolve()
        config = runs.write_config(shared, config)
        named = {"folder": str(folder), "files": files}
        (shared / "asked.json").write_text(json.dumps(named | asked))
        launch(predict_part, shared, config)
        with ExitStack() as opened:
            parts = [opened.enter_context(_part(shared, rank).open()) for rank in range(asked["devices"])]
            for batch in range(-(-len(files) // asked["batch_size"])):
                yield from map(json.loads, islice(parts[batch % len(parts)], asked["batch_size"]))


def predict_part(folder_name: str, config: Any) -> None:
    """What every process of a prediction does."""
    shared, rank = Path(folder_name), int(os.environ["RANK"])
    with signals.caught():
        asked = json.loads((shared / "asked.json").read_text())
        asked |= {"folder": Path(asked["folder"]), "rank": rank}
        with _part(shared, rank).open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in predict(config, **asked))


def _part(shared: Path, rank: int) -> Path:
    return shared / f"rows-{rank}.jsonl"


def predict(
    config: Any,
    folder: Path,
    files: list[str],
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

    def load(path: str) -> Any:
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
                    yield {"file": path, "class": None, "probability": None, "top_k": [], "error": str(image)}
                    continue
                values, indices = next(probabilities).topk(min(top_k, len(names)))
                best = [
                    {"class": names[i], "probability": round(v, 6)}
                    for v, i in zip(values.tolist(), indices.tolist(), strict=True)
                ]
                yield {"file": path, **best[0], "top_k": best, "error": None}


def to_csv(rows: Iterator[dict[str, Any]]) -> Iterator[str]:
    """CSV with a header, a line at a time; the second to k-th class stand in columns of their own."""
    first: list[dict[str, Any]] = []  # up to the one that shows how many classes there are
    for row in rows:
        first.append(row)
        if row["top_k"]:
            break
    others = len(first[-1]["top_k"][1:]) if first else 0
    more = [f"{name}_{rank + 2}" for rank in range(others) for name in ("class", "probability")]
    yield as_csv(["file", "class", "probability", *more, "error"], [])
    for row in chain(first, rows):
        best = [value for one in row["top_k"][1:] for value in (one["class"], one["probability"])]
        cells = best or [None] * len(more)
        yield as_csv([row["file"], row["class"], row["probability"], *cells, row["error"]], [])


def to_json(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A JSON list of the rows, a row at a time."""
    before = "[\n"
    for row in rows:
        # A byte of a name that is no UTF-8 becomes an escape, which JSON reads back to the same name.
        text = json.dumps([row], indent=1, ensure_ascii=False).encode(errors="backslashreplace").decode()
        yield before + text[2:-2]
        before = ",\n"
    yield "\n]\n"
