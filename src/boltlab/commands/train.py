"""`boltlab train`: fit, then test with the best checkpoint."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from boltlab import runs
from boltlab.check import SEARCHED
from boltlab.config import Composed, build, compose
from boltlab.trainer import make_trainer, several_steps

if TYPE_CHECKING:
    from concurrent.futures import Future


def main(overrides: list[str]) -> int:
    """Trains once."""
    git = runs.ask_git()  # answers while `compose` imports torch
    composed = compose("train", overrides)
    run(composed, runs.new_folder(composed.config.log_dir, "train", name_of(composed)), git)
    return 0


def name_of(composed: Composed) -> str:
    """The short name of a run: `name=…`, else the experiment, else data and model."""
    chosen = composed.choices
    return str(composed.config.name or chosen.get("experiment") or f"{chosen.get('data')}_{chosen.get('model')}")


def run(composed: Composed, folder: Path, git: "Future[runs.Git] | None" = None) -> float | None:
    """Makes the run in `folder`; returns the best value of the monitored metric."""
    from boltlab.launch import launch

    config = composed.config
    runs.prepare(folder, config, composed.overrides, git)
    runs.write_summary(folder, name=name_of(composed), **{k: composed.choices.get(k) for k in ("data", "model")})
    with runs.recorded(folder):
        if any(OmegaConf.select(config, key) == "auto" for key in SEARCHED):
            from boltlab.commands import tune

            runs.write_summary(folder, found=tune.search(config))
            runs.write_config(folder, config)
        launch(fit, folder, config)
    summary = runs.read_summary(folder)
    _print_end(folder, summary)
    return summary.get("best", {}).get(config.monitor)


def fit(folder_name: str) -> None:
    """What every process of a run does."""
    import lightning.pytorch as pl

    from boltlab import checkpoint

    folder = Path(folder_name)
    config = runs.load_config(folder)
    pl.seed_everything(config.seed, verbose=False)
    started = time.perf_counter()
    data, model = build(config, "data"), build(config, "model")
    trainer = make_trainer(config, **several_steps(config, data, model))
    for logger in trainer.loggers:
        logger.log_hyperparams(OmegaConf.to_container(config, resolve=True))
    if trainer.is_global_zero:
        print(f"{runs.shown(folder)}\n", flush=True)
    trainer.fit(model, datamodule=data)
    fitted = time.perf_counter() - started
    if trainer.interrupted:
        raise KeyboardInterrupt
    final = numbers(trainer.callback_metrics)
    test = {}
    if config.test and not trainer.fast_dev_run:
        best = checkpoint.find(folder, "best")
        trainer.test(model, datamodule=data, ckpt_path=str(best), verbose=False)
        test = numbers(trainer.callback_metrics)
    if trainer.is_global_zero:
        kept = trainer.checkpoint_callbacks
        best_score = next((c.best_model_score for c in kept if getattr(c, "monitor", None) == config.monitor), None)
        throughput = next((c for c in trainer.callbacks if hasattr(c, "samples_per_second")), None)
        runs.end(
            folder,
            status="finished",
            best={} if best_score is None else {config.monitor: float(best_score)},
            final=final,
            test=test,
            epochs=trainer.current_epoch,
            steps=trainer.global_step,
            fit_seconds=round(fitted, 2),
            samples_per_second=getattr(throughput, "samples_per_second", None),
            data_wait_share=getattr(throughput, "data_wait_share", None),
        )
    for logger in trainer.loggers:
        getattr(logger, "finish", lambda: None)()  # a W&B run stays open between fit and test


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """Metric tensors as plain numbers, per-class and other long ones left out."""
    return {key: float(value) for key, value in sorted(metrics.items()) if value.numel() == 1}


def _print_end(folder: Path, summary: dict[str, Any]) -> None:
    if summary.get("test"):
        chosen = ", ".join(f"{key} {value:.4f}" for key, value in summary["best"].items())
        print_metrics(
            f"test split, best checkpoint ({chosen})" if chosen else "test split, last checkpoint", summary["test"]
        )
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
