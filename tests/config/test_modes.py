"""Which way a metric gets better: what chooses the best checkpoint, ends a training and ranks trials."""

import csv
import json
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from boltlab import runs
from boltlab.checkpoints import file as checkpoint_file
from boltlab.config.build import build
from boltlab.config.compose import compose
from boltlab.config.modes import direction
from boltlab.ground.errors import ConfigError

pytestmark = pytest.mark.floats

QUICK = ("model=mlp", "data.max_samples=200", "data.batch_size=50", "scheduler=constant", "logger=csv")
QUICK += ("trainer.max_epochs=4", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "test=false")
UNSTEADY = ("optimizer=sgd", "optimizer.lr=0.1", "optimizer.momentum=0.95")
# A convex problem whose loss swings, by half of it and more: rounding decides nothing.
SWINGING = (*UNSTEADY, "data=diabetes", "model=linear_regressor", "optimizer.lr=0.02")
STOPPING = "callbacks=[best,last,early_stopping,lr_monitor]"


def only_run():
    (folder,) = runs.folders("logs", "train")
    return folder


def column(folder, metric):
    """What a run has logged of a metric, epoch by epoch."""
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return np.array([float(row[metric]) for row in csv.DictReader(file) if row.get(metric)])


def mistakes(*overrides, verb="train"):
    with pytest.raises(ConfigError) as caught:
        compose(verb, list(overrides))
    return {m.where: m.message for m in caught.value.mistakes}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "best", "more"),
    [
        ("val_loss", np.argmin, ()),
        ("val_acc", np.argmax, ()),
        ("val_top5", np.argmax, ()),  # its object knows, its name does not
        ("train_loss", np.argmin, ()),
        ("val_mae", np.argmin, SWINGING),
        ("train_mse", np.argmin, SWINGING),
        ("val_r2", np.argmax, SWINGING),
    ],
)
def test_the_best_checkpoint_is_the_best_epoch(boltlab, metric, best, more):
    code, _, err = boltlab("train", *QUICK, *UNSTEADY, *more, f"monitor={metric}")
    assert code == 0, err
    folder, values = only_run(), column(only_run(), metric)
    assert len(values) == 4 and values.min() < values.max(), values
    content = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert content["epoch"] == best(values)
    assert runs.read_summary(folder)["best"] == {metric: pytest.approx(values[best(values)], rel=1e-5)}
    if metric.startswith("val_"):
        code, _, err = boltlab("eval", f"run={folder}", "split=val", "trainer.accelerator=cpu", "logger=csv")
        (evaluated,) = (runs.read_summary(path) for path in Path("logs/eval").iterdir())
        assert code == 0 and evaluated["test"][metric] == pytest.approx(values[best(values)], rel=1e-4), err


@pytest.mark.parametrize(
    "overrides",
    [
        (*UNSTEADY, "monitor=val_loss"),  # digits
        (*SWINGING, "monitor=val_loss"),
        (*SWINGING, "monitor=val_r2", "callbacks.early_stopping.monitor=val_loss"),
        (
            *SWINGING,
            "monitor=val_r2",
            "callbacks.early_stopping.mode=auto",
            "callbacks.early_stopping.monitor=val_loss",
        ),
        (*SWINGING, "monitor=val_loss", "callbacks.early_stopping.monitor=val_r2"),
    ],
)
def test_a_training_stops_when_its_metric_gets_no_better(boltlab, overrides):
    asked = (STOPPING, "callbacks.early_stopping.patience=1", "trainer.max_epochs=30", *overrides)
    code, _, err = boltlab("train", *QUICK, *asked)
    assert code == 0, err
    metric = overrides[-1].rpartition("=")[2]
    values = column(only_run(), metric)
    better = values if metric == "val_r2" else -values
    no_better = better[1:] <= np.maximum.accumulate(better)[:-1]
    assert 2 < len(values) < 30 and np.argmax(no_better) + 2 == len(values), values


@pytest.mark.parametrize("monitor", ["monitor=val_loss", "scheduler.monitor=val_loss"])
def test_a_plateau_lowers_the_rate_when_its_metric_gets_no_better(boltlab, monitor):
    asked = (*SWINGING, "callbacks=[best,last,lr_monitor]", "scheduler=plateau", "trainer.max_epochs=6")
    asked += ("trainer.log_every_n_steps=1", "scheduler.gamma=0.5", "scheduler.patience_epochs=0")
    code, _, err = boltlab("train", *QUICK, *asked, monitor)
    assert code == 0, err
    losses, best, rates = column(only_run(), "val_loss"), np.inf, [0.02]
    for loss in losses[:-1]:
        better = loss < best * (1 - 1e-4)  # torch's threshold
        best = loss if better else best
        rates.append(rates[-1] * (1.0 if better else 0.5))
    (name,) = (key for key in (only_run() / "metrics.csv").read_text().splitlines()[0].split(",") if "lr" in key)
    logged = column(only_run(), name)
    assert rates[1] == 0.02 > rates[-1], losses  # it gets better, then not
    assert logged[:: len(logged) // 6] == pytest.approx(rates)


SWEEP = ("sampler=grid", "pruner=none", "callbacks=[best,last]", "workers=2", "trainer.max_epochs=2")
SWEEPS = {
    "monitor": ("monitor=val_loss",),
    "objective": ("sweep.objectives={val_loss: auto}",),
    "stack": ("monitor=val_loss", "sweep.engine=vectorized"),
    "summary": ("sweep.objectives={parameters: auto}",),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", SWEEPS)
def test_the_best_trial_of_a_sweep_is_the_best_of_its_runs(boltlab, case):
    space = "optimizer.lr=1e-1,1e-4,1e-2" if case != "summary" else "model.net.hidden_sizes=[16],[4],[8]"
    code, out, err = boltlab("sweep", *QUICK, "optimizer=sgd", space, *SWEEP, *SWEEPS[case])
    assert code == 0, (out, err)
    (top,) = (path.parent for path in Path("logs/train").glob("*/sweep.json"))
    summaries = {path.parent.name: json.loads(path.read_text()) for path in top.glob("*/summary.json")}
    if case == "summary":
        found = {name: summary["parameters"] for name, summary in summaries.items()}
    else:
        found = {name: column(top / name, "val_loss").min() for name in summaries}
    assert len(found) == len(set(found.values())) == 3
    best = optuna.load_study(study_name=None, storage=f"sqlite:///{top}/study.db").best_trial
    assert str(best.number) == min(found, key=found.get)
    assert best.value == pytest.approx(min(found.values()), rel=1e-5)
    if case in ("monitor", "stack"):
        assert summaries[str(best.number)]["best"] == {"val_loss": pytest.approx(best.value)}
    ((key, value),) = best.params.items()
    assert OmegaConf.select(OmegaConf.load(top / "best.yaml"), key) == OmegaConf.create(f"value: {value}").value


SECOND = "+callbacks.second={_target_: lightning.pytorch.callbacks.ModelCheckpoint, dirpath: x, monitor: val_mean}"
CONTRADICTIONS = {
    "loss": (("monitor=val_loss", "mode=max"), "val_loss", "mode", "min"),
    "accuracy": (("mode=min",), "val_acc", "mode", "max"),
    "of each step": (("monitor=train_loss_step", "mode=max"), "train_loss_step", "mode", "min"),
    "known to its object alone": (("monitor=val_top5", "mode=min"), "val_top5", "mode", "max"),
    "regression": (("data=diabetes", "model=mlp_regressor", "mode=max"), "val_mse", "mode", "min"),
    "best": (("callbacks.best.monitor=val_loss", "callbacks.best.mode=max"), "val_loss", "callbacks.best.mode", "min"),
    "early stopping": (
        ("callbacks=[best,early_stopping]", "callbacks.early_stopping.mode=min"),
        *("val_acc", "callbacks.early_stopping.mode", "max"),
    ),
    "plateau": (
        ("scheduler=plateau", "scheduler.monitor=val_loss", "scheduler.mode=max"),
        *("val_loss", "scheduler.mode", "min"),
    ),
    "a second checkpoint": (
        (SECOND.replace("val_mean", "val_f1, mode: min"),),
        *("val_f1", "callbacks.second.mode", "max"),
    ),
    "the summary of W&B": (
        ("logger=wandb", "logger.wandb.monitor=val_loss", "logger.wandb.monitor_mode=max"),
        *("val_loss", "logger.wandb.monitor_mode", "min"),
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_mode_that_is_known_to_be_wrong_is_refused(boltlab, case):
    overrides, metric, key, better = CONTRADICTIONS[case]
    what, wrong = {"min": ("smaller", "max"), "max": ("larger", "min")}[better]
    code, out, err = boltlab("train", "trainer.fast_dev_run=true", *overrides)
    assert (code, out) == (2, "") and not Path("logs").exists()
    assert err.startswith("boltlab train: 1 mistake in the config, nothing was started\n")
    assert (
        f"\n  {key}={wrong}\n      {metric} is better when it is {what}: {key}={better}, or leave {key}=auto\n" in err
    )


@pytest.mark.parametrize(("metric", "wrong", "better"), [("val_loss", "max", "min"), ("latency_ms", "max", "min")])
def test_an_objective_that_is_known_to_be_wrong_is_refused(boltlab, metric, wrong, better):
    asked = (f"sweep.objectives={{val_acc: max, {metric}: {wrong}}}", "pruner=none")
    code, out, err = boltlab("sweep", *QUICK, "optimizer.lr=0.1,0.01", *asked)
    key = f"sweep.objectives.{metric}"
    assert (code, out) == (2, "") and "1 mistake " in err
    assert (
        f"\n  {key}={wrong}\n      {metric} is better when it is smaller: {key}={better}, or leave {key}=auto\n" in err
    )


OWN = """
from project.models.classifier import Classifier

class Names(Classifier):
    @staticmethod
    def logged_metrics(arguments):
        return {"val_score", "val_loss", "val_acc"}

class More(Classifier):
    @staticmethod
    def logged_metrics(arguments):
        return Classifier.logged_metrics(arguments) | {"val_score": None}

class Knows(Classifier):
    @classmethod
    def logged_metrics(cls, arguments):
        return {"val_score": False, "val_loss": True, "val_acc": None, "val_mean": None}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_tasks.py").write_text(OWN, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return lambda name: (*QUICK, f"model._target_=own_tasks.{name}")


def test_a_metric_that_nothing_is_known_of_needs_its_mode(boltlab, own):
    names, knows = own("Names"), own("Knows")
    code, out, err = boltlab("train", *names, "monitor=val_score")
    assert (code, out) == (2, "") and not Path("logs").exists()
    message = "nothing says whether val_score is better when it is larger or smaller: mode=max or mode=min"
    assert f"1 mistake in the config, nothing was started\n\n  mode=auto\n      {message}\n" in err
    assert [compose("train", [*names, "monitor=val_score", f"mode={m}"]).config.mode for m in ("max", "min")] == [
        "max",
        "min",
    ]
    assert compose("train", [*names, "monitor=val_loss"]).config.mode == "min"
    assert compose("train", [*own("More"), "monitor=val_top5"]).config.mode == "max"
    assert list(mistakes(*own("More"), "monitor=val_score")) == ["mode=auto"]
    modes = {m: compose("train", [*knows, f"monitor={m}"]).config.mode for m in ("val_score", "val_loss", "val_acc")}
    assert modes == {"val_score": "min", "val_loss": "max", "val_acc": "max"}
    assert list(mistakes(*knows, SECOND)) == ["callbacks.second.mode=auto"]
    assert list(mistakes(*knows, "monitor=val_mean")) == ["mode=auto"]
    objectives = ["sweep.objectives.val_score=auto", "pruner=none", "optimizer.lr=0.1,0.01"]
    code, _, err = boltlab("sweep", *names, *objectives[1:], "sweep.objectives={val_score: auto}")
    assert code == 2 and f"  {objectives[0]}\n" in err and message.replace("mode=", objectives[0][:-4]) in err


@pytest.mark.slow
@pytest.mark.parametrize("model", ["mlp", "mlp_regressor"])
def test_a_metric_goes_the_way_of_its_object(model):
    more = ["data=diabetes"] if "regressor" in model else []
    base = compose("train", [f"model={model}", *more]).config
    module = build(base, "model")
    objects = {**dict(module.val_metrics.items()), **dict(module.test_metrics.items())}
    assert {"loss", module.train_metrics.name} <= {name.partition("_")[2] for name in objects}
    for name, metric in objects.items():
        larger = metric.higher_is_better if not name.endswith("_loss") else False
        assert isinstance(larger, bool)
        config = compose("train", [f"model={model}", *more, f"monitor={name}"]).config
        assert config.mode == config.callbacks.best.mode == ("max" if larger else "min"), name


WORDS = {
    "min": "loss val_loss_step train_loss_epoch val/MSE val.mae eval-rmse val_error perplexity val_mae_step",
    "max": "acc val_Accuracy val_f1 auroc val/precision/dataloader_idx_1 test_recall mean_iou val_r2_epoch",
    None: "val_score top5 valloss loss_weight lossless val_losses val_f1_macro step val_step r22 myacc",
}


@pytest.mark.parametrize("way", WORDS)
def test_the_last_word_of_a_name_says_it_or_nothing_does(way):
    assert {name: direction(name, {}) for name in WORDS[way].split()} == dict.fromkeys(WORDS[way].split(), way)
    assert direction("val_loss", {"val_loss": True}) == "max" and direction("val_loss", {"val_loss": None}) == "min"


def test_what_watches_another_metric_follows_that_one(tmp_path, monkeypatch):
    (tmp_path / "own_callbacks.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Beeps(Callback):\n    def __init__(self, monitor: str, mode: str = 'loud'): ...\n"
        "class Guesses(Callback):\n    def __init__(self, monitor: str, mode: str = 'auto'): ...\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = ["callbacks=[default,early_stopping]", "callbacks.early_stopping.monitor=val_loss", "scheduler=plateau"]
    given += ["scheduler.monitor=val_loss", "logger=wandb", "logger.wandb.monitor=train_loss"]
    given += ["callbacks.best.monitor=val_f1", "monitor=val_top5", SECOND.replace("val_mean", "val_acc")]
    given += [f"+callbacks.{n}={{_target_: own_callbacks.{n}, monitor: val_loss}}" for n in ("Beeps", "Guesses")]
    config = compose("train", given).config
    found = {name: node.get("mode") for name, node in config.callbacks.items() if "monitor" in node}
    assert found == {"best": "max", "early_stopping": "min", "second": "max", "Beeps": None, "Guesses": None}
    assert (config.mode, config.scheduler.mode, config.model.scheduler.mode) == ("max", "min", "min")
    assert (config.logger.wandb.monitor_mode, config.logger.wandb.mode) == ("min", "auto")


def contradict(folder, *nodes):
    """The run as an earlier version left it, where nobody had said `mode=min`."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    content = checkpoint_file.read(folder / "checkpoints" / "last.ckpt")
    for whole in (config, content["config"]):
        for node in (whole, *(whole["callbacks"][name] for name in nodes)):
            assert node["mode"] == "min"
            node["mode"] = "max"
    states = {key.replace("'mode': 'min'", "'mode': 'max'"): state for key, state in content["callbacks"].items()}
    assert len(states.keys() - content["callbacks"].keys()) == len(nodes)
    content["callbacks"] = states
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    checkpoint_file.write(content, folder / "checkpoints" / "last.ckpt")


@pytest.mark.slow
def test_a_run_whose_mode_is_wrong_goes_on_with_the_right_one(boltlab):
    more = ("trainer.max_epochs=1", STOPPING, "monitor=val_loss")
    assert boltlab("train", *QUICK, *more)[0] == 0
    folder = only_run()
    contradict(folder, "best", "early_stopping")
    for verb, *options in (["eval", "trainer.accelerator=cpu"], ["runs"], ["reproduce", "dry_run=true"]):
        run = [] if verb == "runs" else ["run=latest"]
        code, _, err = boltlab(verb, *run, *options)  # what was chosen is chosen
        assert code == 0 and "better" not in err, (verb, err)
    longer = ("train", "resume=latest", "trainer.max_epochs=3")
    code, _, err = boltlab(*longer)
    message = "val_loss is better when it is smaller: mode=min, or leave mode=auto"
    assert code == 2 and f": 1 mistake in the config, nothing was started\n\n  mode=max\n      {message}\n" in err
    code, _, err = boltlab(*longer, "mode=min")
    assert code == 0, err
    config, values = yaml.safe_load((folder / "config.yaml").read_text()), column(folder, "val_loss")
    assert {config["mode"], *(config["callbacks"][name]["mode"] for name in ("best", "early_stopping"))} == {"min"}
    since = values[1:]  # its best begins anew
    assert len(values) == 3 and runs.read_summary(folder)["best"] == {"val_loss": pytest.approx(since.min(), rel=1e-5)}


def test_a_run_goes_on_with_another_monitor(boltlab):
    assert boltlab("train", *QUICK, "trainer.max_epochs=1", STOPPING)[0] == 0
    code, _, err = boltlab("train", "resume=latest", "trainer.max_epochs=3", "monitor=val_loss")
    assert code == 0, err
    config = yaml.safe_load((only_run() / "config.yaml").read_text())
    for node in (config, config["callbacks"]["best"], config["callbacks"]["early_stopping"]):
        assert (node["monitor"], node["mode"]) == ("val_loss", "min")
    losses = column(only_run(), "val_loss")[1:]
    assert runs.read_summary(only_run())["best"] == {"val_loss": pytest.approx(losses.min(), rel=1e-5)}
