"""`boltlab train`: fit, then test with the best checkpoint."""

import os
import platform
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from boltlab import credentials, machine, runs, signals, world
from boltlab.check import SEARCHED
from boltlab.commands import launched
from boltlab.config import Composed, build, compose, edit, keys
from boltlab.errors import UserError
from boltlab.exits import exit_code
from boltlab.launchers import process
from boltlab.signals import Stopped
from boltlab.trainer import make_trainer

if TYPE_CHECKING:
    from concurrent.futures import Future


def main(overrides: list[str]) -> int:
    """Trains once, or goes on with a run that was stopped (`resume=…`)."""
    from boltlab import launch

    with signals.caught():
        launch.expect(overrides)
        return _main(overrides)


def _main(overrides: list[str]) -> int:
    git = runs.ask_git()  # answers while `compose` imports torch
    own = [text for text in overrides if text.startswith(_OF_COMMAND)]
    if (begun := _begun(overrides)) is not None:
        if runs.status(runs.read_summary(begun), begun) == "finished":
            print(f"{runs.shown(begun)} was finished before this command was started again", flush=True)
        else:
            go_on(begun, [], git, own=True)
        return 0
    if any(text.startswith("resume=") for text in own):
        options = compose("train", own, check=False).config
        if options.resume is not None:
            name = next(text for text in reversed(own) if text.startswith("resume=")).partition("=")[2].strip("'\"")
            folder, rest = runs.find(name, options.log_dir, option="resume"), _of_run(overrides)
            if any(launched.names_launcher(text) for text in rest):
                _print_end(launched.resume(folder, rest, world.function_name(job)))
                return 0
            go_on(folder, rest, git)
            return 0
    given = [text.partition("=")[2].strip("'\"") for text in overrides if text.startswith("ckpt_path=")]
    overrides = [text for text in overrides if not text.startswith("ckpt_path=")]
    composed = compose("train", overrides)
    say_unused(composed)
    settle_weights(composed)
    if composed.config.launcher is not None:
        _print_end(launched.run(composed, name_of(composed), world.function_name(job)))
        return 0
    begin = _state(Path(given[-1]), composed.config) if given and given[-1] != "null" else None
    run(composed, runs.new_folder(composed.config.log_dir, "train", name_of(composed)), git, begin)
    return 0


def _state(path: Path, config: DictConfig) -> dict[str, Any]:
    """The complete state in a checkpoint, for a new run to begin with: `ckpt_path=…`. What was best begins anew.

    Raises:
        UserError: it is damaged, holds weights only, or belongs to another model, optimizer or schedule.
    """
    from boltlab import checkpoint, resume

    content = checkpoint.read(path)
    if not {"optimizer_states", "loops", "config"} <= content.keys():
        raise UserError(f"ckpt_path={path} holds weights only: init_from={path} begins with them")
    resume.check(content, OmegaConf.merge(config, {"resume_changed": "restart_epoch"}), path)  # type: ignore[arg-type]
    states = content.get("callbacks") or {}
    content["callbacks"] = {key: state for key, state in states.items() if "best_model_path" not in state}
    return {**content, "ckpt_path": str(path.resolve())}


_OF_COMMAND = ("resume=", "log_dir=")  # overrides that are no part of a run


def _begun(overrides: list[str]) -> Path | None:
    """The run that this same command had begun before its launcher (torchrun, Slurm) started it again."""
    leader = world.leading()
    if leader is not None and leader.begun is not None:
        return leader.begun
    if not world.start()[1]:
        return None
    name, ours = world.start()[0], _of_run(overrides)
    log_dir = compose("train", [text for text in overrides if text.startswith("log_dir=")], check=False).config.log_dir
    for folder in runs.folders(log_dir):
        if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
            continue
        begun = runs.read_summary(folder).get("start")
        if isinstance(begun, dict) and begun.get("of") == name and _of_run(begun.get("overrides") or []) == ours:
            return folder
    return None


def _of_run(overrides: list[str]) -> list[str]:
    return [text for text in overrides if not text.startswith((*_OF_COMMAND, "ckpt_path="))]


def say_unused(composed: Composed) -> None:
    """Names what a file says that nothing uses."""
    groups = [key for key in composed.unused if "." not in key]
    loggers = [key for key in composed.unused if "." in key]
    if groups:
        kind = composed.config.model._target_.rpartition(".")[2]
        print(f"not used: {' and '.join(groups)}; {kind} makes its own", flush=True)
    if loggers:
        print(f"not used: {' and '.join(loggers)}; logger=… does not choose it", flush=True)


def settle_weights(composed: Composed) -> None:
    """Finds what `init_from` means, and that it is whole, before anything is started."""
    if composed.config.init_from:
        from boltlab import transfer

        transfer.settle(composed.config)


def name_of(composed: Composed) -> str:
    """The short name of a run: `name=…`, else the experiment, else data and model."""
    chosen = composed.choices
    return str(composed.config.name or chosen.get("experiment") or f"{chosen.get('data')}_{chosen.get('model')}")


def run(
    composed: Composed, folder: Path, git: "Future[runs.Git] | None" = None, begin: dict[str, Any] | None = None
) -> float | None:
    """Makes the run in `folder`, from the state `begin` where it is given; returns the best of the monitored metric."""
    folder.mkdir(parents=True, exist_ok=True)
    with runs.lock(folder):
        runs.prepare(folder, composed.config, composed.overrides, git)
        runs.write_summary(folder, name=name_of(composed), **{k: composed.choices.get(k) for k in ("data", "model")})
        if begin is not None:
            from boltlab import checkpoint

            checkpoint.write(begin, folder / "checkpoints" / "last.ckpt")
            runs.write_summary(folder, ckpt_path=begin["ckpt_path"])
        return _execute(folder, composed.config)


def go_on(folder: Path, overrides: list[str], git: "Future[runs.Git] | None" = None, own: bool = False) -> float | None:
    """Goes on with a run that was stopped, or begins one that was queued, in its folder, with overrides on top of its
    config.

    own: this same command has composed its config, which need not be held against `boltlab.trust`.

    Raises:
        UserError: it is finished, another process is at it, or what changed does not allow it to go on exactly.
    """
    from boltlab import checkpoint, resume

    if "evaluated" in runs.read_summary(folder):
        raise UserError(f"{runs.shown(folder)} is an evaluation, no training: resume={_evaluated(folder)}")
    runs.refuse_links(folder)
    with runs.lock(folder):
        checkpoint.clean_leftovers(folder)
        before, summary = runs.load_config(folder, own, keys(overrides)), runs.read_summary(folder)
        if OmegaConf.select(before, "optimizer.lr") == "auto":  # stopped in its search: the model refers to it again
            before.model.optimizer = "${optimizer}"
        before.resume_changed = None  # it was said of an earlier time
        machine.reopen(before)
        newest, warnings = checkpoint.newest_good(folder)
        for line in warnings:
            print(line, file=sys.stderr)
        if newest is None and "stack" in summary and any((folder / "checkpoints").glob("*.ckpt")):
            cure = f"boltlab train init_from={folder.name} begins a new run with them"
            raise UserError(f"{runs.shown(folder)} was trained in a stack, its checkpoints hold weights only: {cure}")
        begins = newest is None and summary.get("status") == "queued"
        if begins and own and not overrides and _queued_by_parent(summary):  # which has checked it
            config = before
            if open_keys := machine.placeholders(config):
                machine.resolve(config, open_keys, build)
            elif not any(OmegaConf.select(config, key) == "auto" for key in SEARCHED):
                _at_hand[str(folder)] = config
        else:
            config = edit(before, overrides, ("resume", "init_from"))
            config.update({"run_dir": str(folder), "init_from": before.get("init_from")})
        where, changed = "has no checkpoint yet: it begins again", []
        if newest is not None:
            content = checkpoint.read(newest)
            try:
                resume.refuse_finished(content, config, folder)
                changed = resume.check(content, config, folder)
                where = f"goes on from {newest.name}, {resume.place(content)}"
            except (AttributeError, KeyError, TypeError, ValueError) as e:
                raise checkpoint.CheckpointError(f"{newest} is not as boltlab writes it: no {e}") from e
            schedule = config.get("scheduler")
            if resume.longer(content, config) and schedule and "Constant" not in schedule._target_:
                where += "; the learning rate follows the schedule of the new length"
        kept, last = (folder / "config.yaml").read_text(encoding="utf-8"), newest and newest.stat().st_mtime_ns
        if begins:
            runs.record_start(folder, None if str(folder) in _at_hand else config, git)
        else:
            runs.record_resume(folder, config, overrides, newest.name if newest else None, changed, git)
            print(f"{runs.shown(folder)} {where}", flush=True)
        try:
            return _execute(folder, config)
        except Exception:
            if newest is None or newest.stat().st_mtime_ns == last:  # nothing was trained with the new config
                runs.write_whole(folder / "config.yaml", kept)
            raise


def _queued_by_parent(summary: dict[str, Any]) -> bool:
    return (summary.get("host"), summary.get("pid")) == (platform.node(), process.started_by)


def job(folder: Path) -> int:
    """What a launcher's process does: goes on with a run, or begins one that was queued; returns the exit code."""

    def begin() -> int:
        try:
            go_on(folder, [], own=True)
        except Exception as e:
            if runs.read_summary(folder).get("status") == "queued":  # it never began, so it did not say why itself
                said = " ".join(str(e).split())[:500] if isinstance(e, UserError) else runs.reason(e)
                runs.end(folder, status="failed", reason=credentials.masked(said))
            raise
        return 0

    return exit_code("train", begin)


def _evaluated(folder: Path) -> str:
    return Path(str(runs.read_summary(folder)["evaluated"])).name


def _execute(folder: Path, config: DictConfig) -> float | None:
    from boltlab.launch import launch

    if leader := world.leading():
        leader.begin(folder)

    try:
        with runs.recorded(folder):
            if any(OmegaConf.select(config, key) == "auto" for key in SEARCHED):
                from boltlab.commands import tune

                runs.write_summary(folder, found=tune.search(config))
                runs.write_config(folder, config)
            launch(fit, folder, config)
    except (Stopped, KeyboardInterrupt):
        print(f"\nto go on: boltlab train {shlex.quote(f'resume={runs.shown(folder)}')}", file=sys.stderr)
        raise
    summary = runs.read_summary(folder)
    _print_end(folder)
    return summary.get("best", {}).get(config.monitor)


def fit(folder_name: str) -> None:
    """What every process of a run does: train from where the folder's newest checkpoint stands, then test."""
    folder = Path(folder_name)
    with signals.caught(at_once=lambda signum: runs.end(folder, status="interrupted")):
        known = folder_name in _at_hand
        _fit(folder, _at_hand.pop(folder_name) if known else runs.load_config(folder, own=True))


_at_hand: dict[str, DictConfig] = {}  # what this process has just read, by its folder


def _fit(folder: Path, config: DictConfig) -> None:
    import lightning.pytorch as pl
    import torch

    from boltlab import checkpoint, resume, transfer
    from boltlab.fit_watch import FitWatch, best_path, keep_replaced
    from boltlab.plain import lacks

    pl.seed_everything(config.seed, verbose=False)
    started = time.perf_counter()
    data, model = build(config, "data"), build(config, "model")
    newest, _ = checkpoint.newest_good(folder)
    if newest is None and config.get("init_from"):
        transfer.initialize(model, config, folder)
    if newest is not None and hasattr(data, "fitted"):  # before Lightning, which restores it after it was fitted anew
        content = torch.load(newest, map_location="cpu", weights_only=True, mmap=True)
        data.load_state_dict({"fitted": checkpoint.fitted(content)})
        del content
    adapt = None if newest is None else partial(resume.adapt, config=config, data=data)
    trainer = make_trainer(config, adapt)
    watch = FitWatch()
    trainer.callbacks.insert(0, watch)
    if trainer.is_global_zero and config.get("data_fingerprint") != "none":
        data.on_load = partial(resume.record_data, folder, config, data, goes_on=newest is not None)
    if newest is not None:  # before the weights are loaded: float64 ones would be rounded
        model = trainer.precision_plugin.convert_module(model)
    for callback in trainer.checkpoint_callbacks if trainer.is_global_zero and not trainer.fast_dev_run else ():
        checkpoint.check_folder(Path(callback.dirpath or folder), sum(p.nbytes for p in model.parameters()))
    for logger in trainer.loggers:
        logger.log_hyperparams(credentials.plain(config))
    if trainer.is_global_zero:
        print(f"{runs.shown(folder)}\n", flush=True)
    trainer.ckpt_path = newest and str(newest)  # here, and not as an argument of fit, so that `setup` knows it
    try:
        trainer.fit(model, datamodule=data)
    except Stopped:
        if trainer.is_global_zero:
            runs.write_summary(folder, epochs=trainer.current_epoch, steps=trainer.global_step)
        raise
    trainer.ckpt_path = None
    if hasattr(model, "log_restored"):
        model.log_restored()
    final = model.known_metrics() if hasattr(model, "known_metrics") else numbers(trainer.callback_metrics)
    if watch.replaced:
        final |= keep_replaced(trainer, model, data, folder, config.monitor)
    chosen = best_path(trainer, config.monitor)
    if trainer.is_global_zero:
        _write_fitted(folder, config, trainer, final, time.perf_counter() - started)
        known = runs.read_summary(folder)
        tell_loggers(trainer, best=known.get("best", {}), final=known.get("final", {}))
        for logger in trainer.loggers:
            for name, path in (("best", chosen), ("last", folder / "checkpoints" / "last.ckpt")):
                if hasattr(logger, "log_checkpoint") and path is not None and path.is_file():
                    logger.log_checkpoint(path, name)
    tested: dict[str, Any] = {"test": {}}
    lacking = lacks("test_step", model) or lacks("test_dataloader", data, model)
    if config.test and lacking and trainer.is_global_zero:
        print(f"{lacking}: nothing is tested", flush=True)
    if config.test and not lacking and not trainer.fast_dev_run:
        last = folder / "checkpoints" / "last.ckpt"
        path = chosen or (last if last.is_file() else None)  # with neither, the weights are those in memory
        trainer.test(model, datamodule=data, ckpt_path=path and str(path), verbose=False)
        tested = {"test": numbers(trainer.callback_metrics), "tested": "best" if chosen else "last"}
    if trainer.is_global_zero:
        runs.end(folder, status="finished", **tested)
        tell_loggers(trainer, test=tested["test"])
    for logger in trainer.loggers:
        getattr(logger, "finish", lambda: None)()  # a W&B run stays open between fit and test


def _write_fitted(folder: Path, config: DictConfig, trainer: Any, final: dict[str, float], seconds: float) -> None:
    """What is known when the training has ended; a run that only had to be tested keeps what it knew."""
    from boltlab.fit_watch import best_callback

    before = runs.read_summary(folder)
    parameters = sum(p.numel() for p in trainer.lightning_module.parameters() if p.requires_grad)
    values: dict[str, Any] = {"epochs": trainer.current_epoch, "steps": trainer.global_step}
    values |= {"parameters": parameters, "processes": trainer.world_size}
    if (best := best_callback(trainer, config.monitor)) is not None:
        score: Any = best.best_model_score
        values["best"] = {best.monitor: float(score)}
        values["best_checkpoint"] = os.path.relpath(best.best_model_path, folder)
    if final:
        values["final"] = final
    throughput = next((c for c in trainer.callbacks if hasattr(c, "samples_per_second")), None)
    if throughput is not None and throughput.samples_per_second:
        values |= {name: getattr(throughput, name) for name in ("samples_per_second", "data_wait_share")}
    latency = next((c for c in trainer.callbacks if hasattr(c, "latency_ms")), None)
    if latency is not None and latency.latency_ms is not None:
        values["latency_ms"] = latency.latency_ms
    guard = next((c for c in trainer.callbacks if hasattr(c, "skipped_steps")), None)
    if guard is not None:
        values["skipped_steps"] = guard.skipped_steps
    runs.write_summary(folder, fit_seconds=round(before.get("fit_seconds", 0.0) + seconds, 2), **values)


def tell_loggers(trainer: Any, **parts: dict[str, float]) -> None:
    """Gives what a run comes to, as `best/val_acc` or `test/acc`, to the loggers that have a place for it."""
    values = {f"{part}/{key.removeprefix(f'{part}_')}": v for part, found in parts.items() for key, v in found.items()}
    for logger in trainer.loggers:
        if values and hasattr(logger, "log_summary"):
            logger.log_summary(values)


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Metric tensors as plain numbers, per-class and other long ones left out."""
    return {key: float(value) for key, value in sorted(metrics.items()) if value.numel() == 1}


def _print_end(folder: Path) -> None:
    """Says what a run has reached, and where it stands."""
    summary = runs.read_summary(folder)
    if summary.get("test"):
        chosen = ", ".join(f"{key} {value:.4f}" for key, value in summary.get("best", {}).items())
        best, last = f"best checkpoint ({chosen})", "last weights: no best checkpoint was chosen"
        print_metrics(f"test split, {last if summary.get('tested') == 'last' else best}", summary["test"])
    minutes, seconds = divmod(summary.get("seconds", 0.0), 60)
    print(f"run folder  {runs.shown(folder)}  ({minutes:.0f} min {seconds:.0f} s)", flush=True)


def print_metrics(title: str, metrics: dict[str, float]) -> None:
    """Prints metrics as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value")
    for key, value in metrics.items():
        table.add_row(key, f"{value:.4f}")
    print(f"\n{title}")
    Console().print(table)
