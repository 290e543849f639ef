"""`boltlab eval`: all metrics of a run's checkpoint on a split, also of another data set."""

import re
from functools import partial
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf

from boltlab import runs
from boltlab.config.compose import compose
from boltlab.config.edit import edit
from boltlab.config.overrides import as_override, keys, split_overrides
from boltlab.ground import signals
from boltlab.ground.errors import ConfigError, Mistake, UserError
from boltlab.processes.launch import launch
from boltlab.training.outcome import numbers, print_metrics, tell_loggers
from boltlab.training.trainer import make_trainer

CHANGEABLE = ("data", "augment", "trainer", "precision")


def main(overrides: list[str]) -> int:
    """Evaluates in a folder of its own under `<log_dir>/eval` and prints the metrics."""
    overrides = [part for text in overrides for part in of_run(text)]
    own, for_run = split_overrides("eval", overrides)
    options = compose("eval", own).config
    refuse_trained(for_run)
    source = runs.find(options.run, options.log_dir)
    trained = runs.load_config(source, replaced=["callbacks", "logger", *keys(for_run)])
    # The callbacks and loggers of an evaluation are its own, and how many processes it takes; the rest is the run's.
    trained.update({"callbacks": options.callbacks, "logger": options.logger, "log_dir": options.log_dir})
    trained.trainer.update({"devices": 1, "num_nodes": 1, "strategy": "auto", "enable_progress_bar": True})
    trained.test = False  # it asks for a checkpoint callback, which an evaluation has no use for
    config = edit(trained, [re.sub("^precision=", "trainer.precision=", text) for text in for_run], settled=True)
    summary = runs.read_summary(source)
    which = kind_of(source, options.checkpoint)
    folder = runs.new_folder(options.log_dir, "eval", f"{summary.get('name', 'run')}_{options.split}")
    known: dict[str, Any] = {key: summary.get(key) for key in ("name", "data", "model")}
    known |= {"evaluated": str(source), "split": options.split, "checkpoint": which}
    config = runs.prepare(folder, config, overrides, **known)
    with runs.recorded(folder):
        launch(measure, folder, config)
    title = f"{options.split} split, {which} checkpoint of {runs.shown(source)}"
    print_metrics(title, runs.read_summary(folder)["test"])
    print(f"evaluation folder  {runs.shown(folder)}")
    return 0


def of_run(text: str) -> list[str]:
    """`ckpt_path=<run>/checkpoints/best.ckpt`, as other templates have it, as `run=` and `checkpoint=`."""
    key, _, value = text.partition("=")
    path = Path(value.strip("'\""))
    if key != "ckpt_path":
        return [text]
    if path.parent.name != "checkpoints" or not (which := _which(path)):
        message = "is no best or last checkpoint in a run folder: run=FOLDER, and checkpoint=best or last"
        raise ConfigError([Mistake(text, message)])
    return [f"run={as_override(str(path.parents[1]))}", f"checkpoint={which}"]


def _which(path: Path) -> str | None:
    if path.name in ("best.ckpt", "last.ckpt"):
        return path.stem
    from boltlab.runs import checkpoints

    best = checkpoints.best(path.parents[1])
    return "best" if best is not None and best.resolve() == path.resolve() else None


def kind_of(run: Path, asked: str | None) -> str:
    """Which checkpoint of a run is meant, where none is asked for.

    Raises:
        CheckpointError: the run has no such checkpoint.
    """
    from boltlab.runs import checkpoints

    path = checkpoints.find(run, asked)
    return asked or ("best" if path == checkpoints.best(run) else "last")


def refuse_trained(overrides: list[str], changeable: tuple[str, ...] = CHANGEABLE) -> None:
    """Refuses overrides of what the training has settled, or that nothing would read any more.

    Raises:
        ConfigError: with all of them.
    """
    mistakes = []
    for text in overrides:
        key = text.lstrip("+~").partition("=")[0]
        if key.split(".")[0] in changeable:
            continue
        settled = f"belongs to the trained run; to change it here: {', '.join(changeable)}"
        hints = {
            "data_dir": "is part of data: data.data_dir=…",
            "trainer": "there is none here: device=… and devices=…",
        }
        mistakes.append(Mistake(text, hints.get(key.split(".")[0], settled)))
    if mistakes:
        raise ConfigError(mistakes)


def measure(folder_name: str, config: DictConfig) -> None:
    """What every process of an evaluation does: its part of the split; the metrics are those of all of them."""
    from lightning.pytorch import seed_everything

    from boltlab.checkpoints import file as checkpoint_file
    from boltlab.runs import checkpoints
    from boltlab.training import other_data
    from boltlab.training.load import restore

    folder = Path(folder_name)
    with signals.caught():
        asked = runs.read_summary(folder)
        content = checkpoint_file.read(checkpoints.find(Path(asked["evaluated"]), asked["checkpoint"]))
        model = restore(content)
        same_kind(content["config"].get("data") or {}, OmegaConf.to_container(config.data))
        given, split = keys(asked["start"]["overrides"]), asked["split"]
        data, said = other_data.build_data(config, content, Path(asked["evaluated"]), given)
        trainer = make_trainer(config)
        if said and trainer.is_global_zero:
            data.on_load = partial(other_data.tell, data, said)
        seed_everything(config.seed, verbose=False)  # of a module whose steps draw, such as a VAE's
        stage = evaluate(trainer, model, data, split)
        metrics = numbers(trainer.callback_metrics).items()
        if trainer.is_global_zero:
            test = {re.sub(f"^{stage}(?=[_/])", split, key): value for key, value in metrics}
            runs.end(folder, status="finished", test=test)
            tell_loggers(trainer, **{split: test})
        for logger in trainer.loggers:
            getattr(logger, "finish", lambda: None)()


def evaluate(trainer: Any, model: Any, data: Any, split: Literal["train", "val", "test"]) -> str:
    """Evaluates as Lightning does: `trainer.test`, `trainer.validate` for `split=val`, and for `split=train` the latter
    on the samples of the train loader in stored order. Data modules of the engine serve a split to the test loop.

    Returns:
        The word that the names of the metrics begin with.

    Raises:
        UserError: module or data module lack what that calls.
    """
    from boltlab.data.base import DataModule
    from boltlab.training import plain

    verb = f"eval split={split}"
    if isinstance(data, DataModule) and (split != "val" or getattr(model, "tests_any_split", False)):
        data.test_split = split
        plain.need(verb, model, data, "test_step", "test_dataloader")
        trainer.test(model, datamodule=data, verbose=False)
        return "test"
    step, loader = _CALLED[split]
    plain.need(verb, model, data, step, loader)
    if split == "test":
        trainer.test(model, datamodule=data, verbose=False)
        return "test"
    if split == "train":
        owner = data if plain.has(data, loader) else model

        def in_order() -> Any:
            data.setup("fit")
            return plain.in_order(owner.train_dataloader())

        data.val_dataloader = in_order
    trainer.validate(model, datamodule=data, verbose=False)
    return "val"


_CALLED = {
    "train": ("validation_step", "train_dataloader"),
    "val": ("validation_step", "val_dataloader"),
    "test": ("test_step", "test_dataloader"),
}


def same_kind(trained: Any, evaluated: Any) -> None:
    """Refuses data that the model cannot be compared with.

    Raises:
        UserError: other shape, other classes, or the same classes in another order: labels would be shifted.
    """
    kinds = {"input_shape": "inputs of shape", "num_classes": "a number of classes of", "task": "a task of"}
    for key, what in kinds.items():
        ours, theirs = trained.get(key), evaluated.get(key)
        if ours is not None and theirs is not None and ours != theirs:
            raise UserError(
                f"the run was trained on {what} {ours}, this data has {theirs}; set data.{key} or take other data"
            )
    ours, theirs = trained.get("class_names"), evaluated.get("class_names")
    if ours and theirs and list(ours) != list(theirs):
        pairs = [f"{i}: {a!r} and {b!r}" for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
        raise UserError(
            f"the classes of the run and of this data differ ({'; '.join(pairs[:4])}), so labels would be shifted. "
            f"If they mean the same: 'data.class_names=[{','.join(map(str, ours[:3]))},…]'"
        )
