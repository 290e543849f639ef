"""Which trainings a stack does not do (`sweeps.vectorized`), each setting named, with what is wrong with it."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf

from boltlab.config.build import build
from boltlab.config.check import SEARCHED
from boltlab.config.compose import Composed, compose
from boltlab.ground.errors import Mistake
from boltlab.optim.schedulers import Schedule
from boltlab.sweeps.stack import RULES

Problems = Iterator[tuple[str, str]]  # a setting, and what is wrong with it

_ROOT = {"compile": False, "init_from": None, "max_restarts": 0}
# Of the trainer, what a stack heeds and what changes no number; the rest must stand at Lightning's own default.
_TRAINER = {"accelerator", "max_epochs", "log_every_n_steps", "num_sanity_val_steps", "default_root_dir"}
_TRAINER |= {"use_distributed_sampler", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"}
_TRAINER |= {"enable_autolog_hparams"}
_CALLBACKS = {"nan_guard", "throughput", "lr_monitor", "summary", "confusion_matrix", "mistakes", "progress"}
_CALLBACKS |= {"best", "last", "finite_metrics"}
_SAID = {"criterion", "train_value", "predict", "forward"}  # what a class derived from one that stacks may say


def problems(config: DictConfig, shipped: dict[str, Any]) -> list[Mistake]:
    """What of a training's config a stack does not do. shipped: the callbacks of one without overrides."""
    found = [*_of_root(config), *_of_trainer(config.trainer, config.precision)]
    found += [*_of_callbacks(config, shipped), *_of_values(config)]
    model = build(config, "model")
    own = list(_of_class(model))
    found += own or [problem for rule in (_of_optimizer, _of_task) for problem in rule(config, model)]
    return [_mistake(*problem) for problem in found]


def _of_root(config: DictConfig) -> Problems:
    yield from ((f"{key}={config[key]}", "is not done") for key, value in _ROOT.items() if config[key] != value)
    yield from ((key, "searches with one net") for key in SEARCHED if OmegaConf.select(config, key) == "auto")


def _of_trainer(trainer: Any, precision: Any) -> Problems:
    usual = {key: known.default for key, known in inspect.signature(pl.Trainer).parameters.items()}
    usual |= {"_target_": "lightning.pytorch.Trainer", "devices": 1, "precision": precision}
    for key in trainer:  # a switch that is off stands at None there
        if key not in _TRAINER and (trainer[key] or None) != (usual.get(key) or None):
            yield f"trainer.{key}", "is not as by default, and not heeded"


def _of_callbacks(config: DictConfig, shipped: dict[str, Any]) -> Problems:
    callbacks: Any = OmegaConf.to_container(config.callbacks or DictConfig({}), resolve=False)
    for key, node in callbacks.items():
        if key not in _CALLBACKS or node != shipped.get(key):
            yield f"callbacks.{key}", "is not as by default, and not heeded"


def _of_values(config: DictConfig) -> Problems:
    accelerator, epochs = config.trainer.get("accelerator", "auto"), config.trainer.max_epochs
    if accelerator not in ("auto", "cpu", *(("gpu", "cuda") if torch.cuda.is_available() else ())):
        yield f"trainer.accelerator={accelerator}", "is neither the CPU nor a CUDA device of this machine"
    if not isinstance(epochs, int) or epochs < 1:
        yield "trainer.max_epochs", "says no length"
    if str(config.precision) not in ("32", "64", "bf16-mixed"):
        yield f"precision={config.precision}", "is neither 32, 64 nor bf16-mixed"
    if config.data.get("max_bad_files"):
        yield "data.max_bad_files", "leaves samples out"


def _of_class(model: Any) -> Problems:
    # A class says of itself, not of those derived from it, that a stack does all that it does.
    known = [kind for kind in type(model).__mro__ if vars(kind).get("stacks")]
    kinds = set(type(model).__mro__) - {*known, *pl.LightningModule.__mro__}
    own = {name for kind in kinds for name, of in vars(kind).items() if callable(of) and name[:2] != "__"}
    others = [name for name in sorted(own - _SAID) if known and hasattr(known[0], name)]
    if not known or others or hasattr(model.net, "load_pretrained"):
        yield "model", f"has steps or weights of its own {others or ''}".rstrip()


def _of_optimizer(config: DictConfig, model: Any) -> Problems:
    try:
        optimizer = model.make_optimizer([torch.nn.Parameter(torch.zeros(()))])
    except (TypeError, ValueError) as e:  # torch's word on values that do not go together
        if OmegaConf.select(config, "optimizer.lr") != "auto":
            yield "optimizer", str(e)
        return
    if (rule := RULES.get(type(optimizer))) is None:
        known = ", ".join(kind.__name__.lower() for kind in RULES)
        yield "optimizer", f"{type(optimizer).__name__} is not written for stacks; known: {known}"
        return
    own = optimizer.defaults
    yield from ((f"optimizer.{k}", f"is not {v}") for k, v in rule.fixed.items() if own.get(k, v) != v)


def _of_task(config: DictConfig, model: Any) -> Problems:
    if model.scheduler is not None and type(model.scheduler).build is not Schedule.build:
        yield "scheduler", f"{type(model.scheduler).__name__} is more than a factor at each step"
    if config.monitor not in {*model.train_metrics.names, *model.val_metrics.keys(), *model.test_metrics.keys()}:
        yield f"monitor={config.monitor}", "is not known when an epoch ends"
    drawing = [m for m in model.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0]
    if drawing or getattr(model, "mixers", None):
        yield "model", "draws at each step (dropout, mixup, cutmix), other numbers than alone"
    yield from ((f"model.{key}", "is not done") for key in ("loss", "metrics") if config.get(key))
    if getattr(model, "balanced", False):
        yield "model.class_weights=balanced", "is counted on the data: give numbers"


def _mistake(where: str, what: str) -> Mistake:
    return Mistake(where, f"{what}: sweep.engine=vectorized cannot, sweep.engine=optuna can")


def refuse(composed: Sequence[Composed], asked: Mapping[str, Any], folds: Any, launcher: Any) -> list[Mistake]:
    """All that stands against training these configs in stacks. composed: the first as it is, then those of the ends
    of the space and of the objectives, each as the monitor."""
    shipped: Any = OmegaConf.to_container(compose("train", ["local=null"], check=False).config.callbacks, resolve=False)
    found = {str(mistake): mistake for one in composed for mistake in problems(one.config, shipped)}
    measured = [name for name in ("seconds", "samples_per_second", "latency_ms") if name in asked["objectives"]]
    others = [_mistake(f"sweep.objectives.{name}", "of one net is not known in a stack") for name in measured]
    if (monitor := composed[0].config.monitor).startswith("test_"):
        others.append(Mistake(f"monitor={monitor}", "is not known while a net is trained: val_…"))
    if folds:
        others.append(_mistake("folds", "train on other samples each, and a stack on the same"))
    if launcher is not None:
        others.append(_mistake("launcher", "starts processes, and a stack is one"))
    return [*found.values(), *others]
