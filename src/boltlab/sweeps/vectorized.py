"""`sweep.engine=vectorized`: trials of equal architecture train at once in this process, as one stack (`sweeps.stack`).

Points are drawn for a whole stack before any of it is trained, and its trials go epoch by epoch together, so a pruner
compares them at each. A trial leaves an ordinary run, whose checkpoints hold weights only: one that was stopped begins
again, in seconds. What a stack does not do is refused by name.
"""

import inspect
import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf

from boltlab import checkpoint, credentials, resume, runs, signals
from boltlab.check import SEARCHED, Mistake
from boltlab.config import Composed, build, compose
from boltlab.errors import UserError
from boltlab.loggers.csv import CSVLogger
from boltlab.models.classifier import Classifier
from boltlab.models.regressor import Regressor
from boltlab.models.schedulers import Schedule
from boltlab.models.task import Task
from boltlab.sweeps import space as spaces
from boltlab.sweeps.stack import RULES, Stack
from boltlab.sweeps.study import Claimed, Lost, Study
from boltlab.sweeps.table import Table
from boltlab.sweeps.worker import WAIT_SECONDS, Dead, Part, State, value_of

AT_ONCE = 32  # trials, where `workers` does not say
FREE = ("lr", "weight_decay", "momentum", "betas", "eps")  # of the optimizer, in which nets of a stack may differ
_ROOT = {"compile": False, "init_from": None, "max_restarts": 0}
# Of the trainer, what a stack heeds and what changes no number; the rest must stand at Lightning's own default.
_TRAINER = {"accelerator", "max_epochs", "log_every_n_steps", "num_sanity_val_steps", "default_root_dir"}
_TRAINER |= {"use_distributed_sampler", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"}
_TRAINER |= {"enable_autolog_hparams"}
_CALLBACKS = {"nan_guard", "throughput", "lr_monitor", "summary", "confusion_matrix", "mistakes", "progress"}
_CALLBACKS |= {"best", "last", "finite_metrics"}
_SAID = {"criterion", "train_value", "predict", "forward"}  # what a task of one's own says, as `Task` asks for it


def problems(config: DictConfig, shipped: dict[str, Any]) -> list[Mistake]:
    """What of a training's config a stack does not do. shipped: the callbacks of one without overrides."""
    found = [(f"{key}={config[key]}", "is not done") for key, value in _ROOT.items() if config[key] != value]
    found += [(key, "searches with one net") for key in SEARCHED if OmegaConf.select(config, key) == "auto"]
    usual = {key: known.default for key, known in inspect.signature(pl.Trainer).parameters.items()}
    usual |= {"_target_": "lightning.pytorch.Trainer", "devices": 1, "precision": config.precision}
    trainer: Any = config.trainer
    callbacks: Any = OmegaConf.to_container(config.callbacks or DictConfig({}), resolve=False)
    # A switch that is off stands at None there.
    changed = [k for k in trainer if k not in _TRAINER and (trainer[k] or None) != (usual.get(k) or None)]
    found += [(f"trainer.{key}", "is not as by default, and not heeded") for key in changed]
    changed = [k for k, node in callbacks.items() if k not in _CALLBACKS or node != shipped.get(k)]
    found += [(f"callbacks.{key}", "is not as by default, and not heeded") for key in changed]
    accelerator, cuda = trainer.get("accelerator", "auto"), torch.cuda.is_available()
    if accelerator not in (("auto", "cpu", "gpu", "cuda") if cuda else ("auto", "cpu")):
        found.append((f"trainer.accelerator={accelerator}", "is neither the CPU nor a CUDA device of this machine"))
    if not isinstance(trainer.max_epochs, int) or trainer.max_epochs < 1:
        found.append(("trainer.max_epochs", "says no length"))
    if str(config.precision) not in ("32", "64", "bf16-mixed"):
        found.append((f"precision={config.precision}", "is neither 32, 64 nor bf16-mixed"))
    if config.data.get("max_bad_files"):
        found.append(("data.max_bad_files", "leaves samples out"))
    model = build(config, "model")
    kinds = [kind for kind in type(model).__mro__ if kind not in (Classifier, Regressor, *Task.__mro__)]
    others = {name for kind in kinds for name, of in vars(kind).items() if callable(of) and name[:2] != "__"}
    others = {name for name in others - _SAID if hasattr(Task, name)}
    if not isinstance(model, Task) or others or hasattr(model.net, "load_pretrained"):
        found.append(("model", f"has steps or weights of its own {sorted(others) or ''}".rstrip()))
        return [_mistake(*one) for one in found]
    try:
        optimizer = model.make_optimizer([torch.nn.Parameter(torch.zeros(()))])
        rule = RULES.get(type(optimizer))
        if rule is None:
            known = ", ".join(kind.__name__.lower() for kind in RULES)
            found.append(("optimizer", f"{type(optimizer).__name__} is not written for stacks; known: {known}"))
        else:
            own = optimizer.defaults
            found += [(f"optimizer.{k}", f"is not {v}") for k, v in rule.fixed.items() if own.get(k, v) != v]
    except (TypeError, ValueError) as e:  # torch's word on values that do not go together
        found += [("optimizer", str(e))] if OmegaConf.select(config, "optimizer.lr") != "auto" else []
    if model.scheduler is not None and type(model.scheduler).build is not Schedule.build:
        found.append(("scheduler", f"{type(model.scheduler).__name__} is more than a factor at each step"))
    if config.monitor not in {*model.train_metrics.names, *model.val_metrics.keys(), *model.test_metrics.keys()}:
        found.append((f"monitor={config.monitor}", "is not known when an epoch ends"))
    drawing = [m for m in model.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0]
    if drawing or getattr(model, "mixers", None):
        found.append(("model", "draws at each step (dropout, mixup, cutmix), other numbers than alone"))
    if getattr(model, "balanced", False):
        found.append(("model.class_weights=balanced", "is counted on the data: give numbers"))
    return [_mistake(*one) for one in found]


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


@dataclass(eq=False)
class Net:
    """One net of a stack: a trial, or a part of one, and its run."""

    claimed: Claimed
    part: Part
    composed: Composed
    folder: Path
    log: Any = None
    rows: list[dict[str, float]] = field(default_factory=list)
    best: float | None = None

    @property
    def config(self) -> DictConfig:
        return self.composed.config


class Vectorized:
    """Trains the trials of a study, `at_once` nets in a stack, until there is nothing left to do."""

    def __init__(
        self, study: Study, parts: Sequence[Part], at_once: int, name: Callable[[Composed], str], deadline: float | None
    ) -> None:
        self.study, self.parts, self.name, self.deadline = study, list(parts), name, deadline
        self.trials = max(1, at_once // len(self.parts))
        self.table = Table(study, self.trials, live=True)
        self.at_work: dict[int, State] = {}
        self.objective = next(iter(study.objectives))
        self.git = runs.ask_git()

    def run(self) -> None:
        """
        Raises:
            Stopped: this command was told to stop; the trials at work begin again when it is given again.
            UserError: a stack does not fit into the memory, or the net cannot be stacked.
        """
        signals.inbox.deferred = True  # no signal breaks off a transaction of the study, or a recording on the GPU
        try:
            with self.table.shown(self.at_work):
                while not (self.deadline and time.time() > self.deadline) and self._some():
                    pass
        finally:
            signals.inbox.deferred = False

    def watch(self) -> None:
        """Called all the while, between two steps at the most."""
        if signals.inbox.stop:
            raise signals.Stopped(signals.inbox.stop)
        self.study.alive()
        self.table.update()

    def _some(self) -> bool:
        """Trains as many trials as are at work at once; returns whether there may be more to do."""
        left: dict[int, Claimed] = {}
        try:
            while len(left) < self.trials and (one := self.study.take()) is not None:
                left[one.number] = one
                self.watch()
            if not left:
                if not self.study.others():
                    return False
                self.watch()
                time.sleep(WAIT_SECONDS)
            stacks: dict[str, list[Net]] = {}
            for one in list(left.values()):
                for net in self._nets(one, left):
                    stacks.setdefault(_signature(net.config), []).append(net)
            for nets in stacks.values():
                _Training(self, nets, left).run()
            return True
        finally:
            self.at_work.clear()
            for one in left.values():
                self.study.leave(one)

    def _nets(self, claimed: Claimed, left: dict[int, Claimed]) -> list[Net]:
        """The runs of a trial that are to be trained; where a worker that is gone had trained them all, none."""
        if reason := claimed.hopeless():
            self.died(claimed, left, reason, again=False)
            return []
        nets, done = [], []
        for part in self.parts:
            folder = self.study.folder(claimed.number, part.label)
            status = runs.status(runs.read_summary(folder), folder)
            if status == "pruned":  # by a worker that was killed before it could tell
                self.pruned(claimed, left, "pruned")
                return []
            if status == "running":
                self.died(claimed, left, f"{folder.name} is running by another process", again=True)
                return []
            done.append(status == "finished")
            texts = [*self.study.asked["train"], *spaces.overrides(claimed.params), *part.overrides]
            try:
                composed = compose("train", texts)
                composed.config.channels_last = False  # a stack has a dimension more; the numbers are the same
                nets.append(Net(claimed, part, composed, folder))
            except UserError as e:
                self.died(claimed, left, " ".join(str(e).split())[:500], again=False)
                return []
        if all(done):
            self.finished(claimed, left, nets)
            return []
        return nets

    # -- what became of a trial

    def finished(self, claimed: Claimed, left: dict[int, Claimed], nets: Sequence[Net]) -> None:
        try:
            found = [[value_of(net.folder, m, mode) for m, mode in self.study.objectives.items()] for net in nets]
        except Dead as e:
            self.died(claimed, left, str(e), again=False)
            return
        values, more = [statistics.fmean(column) for column in zip(*found, strict=True)], {}
        if len(nets) > 1:
            by_part = {net.part.label: own[0] for net, own in zip(nets, found, strict=True)}
            more = {"parts": by_part, "deviation": statistics.stdev(by_part.values())}
        self._tell(claimed, left, f"finished: {values[0]:.4f}", lambda: self.study.complete(claimed, values, **more))

    def pruned(self, claimed: Claimed, left: dict[int, Claimed], reason: str) -> None:
        self._tell(claimed, left, reason, lambda: self.study.prune(claimed, reason=reason))

    def died(self, claimed: Claimed, left: dict[int, Claimed], reason: str, again: bool) -> None:
        self._tell(claimed, left, f"died: {reason}", lambda: self.study.fail(claimed, reason, again=again))

    def _tell(self, claimed: Claimed, left: dict[int, Claimed], what: str, tell: Callable[[], Any]) -> None:
        try:
            tell()
        except Lost:
            self.lost(claimed, left)
        else:
            self.at_work.pop(claimed.number, None)
            del left[claimed.number]
            self.table.say(f"trial {claimed.number} {what}")

    def lost(self, claimed: Claimed, left: dict[int, Claimed]) -> None:
        self.at_work.pop(claimed.number, None)
        del left[claimed.number]
        self.study.release(claimed)
        self.table.say(f"trial {claimed.number} was taken over by another worker")


class _Training:
    """One stack, from its run folders to their end."""

    def __init__(self, engine: Vectorized, nets: list[Net], left: dict[int, Claimed]) -> None:
        self.engine, self.nets, self.left = engine, nets, left
        self.config = nets[0].config
        self.started = time.perf_counter()

    def run(self) -> None:
        wanted = self.config.trainer.accelerator
        device = torch.device("cuda" if wanted in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu")
        for net in self.nets:
            self.engine.at_work.setdefault(net.claimed.number, State(net.claimed.params))
        with ExitStack() as held:
            for net in self.nets:
                shutil.rmtree(net.folder, ignore_errors=True)  # of a stack that was stopped
                net.folder.mkdir(parents=True)
                held.enter_context(runs.lock(net.folder))
                runs.prepare(net.folder, net.config, net.composed.overrides, self.engine.git)
                chosen = {key: net.composed.choices.get(key) for key in ("data", "model")}
                runs.write_summary(net.folder, name=self.engine.name(net.composed), stack=len(self.nets), **chosen)
            try:
                self.stack = Stack([net.config for net in self.nets], device)
                self._load()
                self._epochs()
            except BaseException as e:
                status = "interrupted" if isinstance(e, signals.Stopped) else "failed"
                for net in self.nets:
                    if runs.read_summary(net.folder).get("status") == "running":
                        runs.end(net.folder, status=status, reason=runs.reason(e))
                if isinstance(e, torch.OutOfMemoryError):
                    cure = f"workers={max(1, len(self.nets) // 2)} stacks fewer"
                    raise UserError(f"{len(self.nets)} nets at once do not fit into the GPU's memory: {cure}") from e
                if isinstance(e, RuntimeError) and "vmap" in str(e):  # a net that draws, or looks at its numbers
                    raise UserError(f"the net cannot be stacked: sweep.engine=optuna can. {runs.reason(e)}") from e
                raise

    def _load(self) -> None:
        first, data = self.nets[0], self.stack.data
        if first.config.get("data_fingerprint") != "none":
            data.on_load = lambda split: resume.record_data(first.folder, first.config, data, split, goes_on=False)
        self.data_json = first.folder / "data.json"
        self.stack.load()

    def _epochs(self) -> None:
        for net in self.nets:
            net.log = CSVLogger(net.folder)
        for epoch in range(self.stack.epochs):
            trained = self.stack.train_epoch(epoch, self.engine.watch)
            for place, (net, train, val) in enumerate(zip(self.nets, trained, self.stack.evaluate("val"), strict=True)):
                net.rows.append({"epoch": epoch, **train, **val})
                net.log.log_metrics(net.rows[-1], step=self.stack.step - 1)
                value, sign = net.rows[-1][net.config.monitor], 1 if net.config.mode == "max" else -1
                value = -sign * math.inf if math.isnan(value) else value  # as Lightning's ModelCheckpoint has it
                if net.best is None or sign * value > sign * net.best:
                    net.best = value
                    self.stack.is_best(place)
            self._look(epoch)
            if not self.nets:
                return
        self._finish()

    def _look(self, epoch: int) -> None:
        """Tells the study how the trials do, and takes those out that are to end."""
        ended: list[Net] = []
        for number, nets in self._by_trial().items():
            state, how = self.engine.at_work[number], {}
            state.epoch = epoch + 1
            if any(not math.isfinite(v) for net in nets for k, v in net.rows[-1].items() if k.endswith("_loss")):
                how = {"status": "failed", "error": "NonFiniteLoss", "reason": f"diverged in epoch {epoch + 1}"}
            elif self.engine.objective in nets[0].rows[-1]:
                state.value = statistics.fmean(net.rows[-1][self.engine.objective] for net in nets)
                alone = len(self.engine.study.objectives) == 1
                try:
                    late = alone and self.engine.study.report(nets[0].claimed, state.value, epoch + 1)
                except Lost:
                    self.engine.lost(nets[0].claimed, self.left)
                    ended += nets
                    continue
                if late and epoch + 1 < self.stack.epochs:
                    how = {"status": "pruned", "reason": f"pruned at epoch {epoch + 1}"}
            if how:
                for net in nets:
                    self._end(self.nets.index(net), **how)
                self.engine.pruned(nets[0].claimed, self.left, how["reason"])
                ended += nets
        if ended:
            places = [place for place, net in enumerate(self.nets) if net not in ended]
            self.nets = [self.nets[place] for place in places]
            if places:
                self.stack.keep(places)

    def _by_trial(self) -> dict[int, list[Net]]:
        found: dict[int, list[Net]] = {}
        for net in self.nets:
            found.setdefault(net.claimed.number, []).append(net)
        return found

    def _finish(self) -> None:
        tested = self.stack.evaluate("test", best=True) if self.config.test else [{} for _ in self.nets]
        for place, net in enumerate(self.nets):
            net.log.log_metrics(tested[place], step=self.stack.step) if tested[place] else None
            self._end(place, status="finished", test=tested[place])
        for nets in self._by_trial().values():
            self.engine.finished(nets[0].claimed, self.left, nets)

    def _end(self, place: int, **values: Any) -> None:
        """Writes the checkpoints and the summary of a net's run, and tells its other loggers all at once."""
        net = self.nets[place]
        self.engine.study.alive()  # loggers may take their time
        if self.data_json.is_file() and net.folder != self.data_json.parent:
            shutil.copyfile(self.data_json, net.folder / "data.json")
        shared = {"epoch": len(net.rows) - 1, "global_step": self.stack.step, "config": credentials.plain(net.config)}
        shared[type(self.stack.data).__qualname__] = self.stack.data.state_dict()
        for name, best in (("last", False), ("best", True))[: 1 if net.best is None else 2]:
            content = {**shared, "state_dict": self.stack.state_dict(place, best)}
            checkpoint.write(content, net.folder / "checkpoints" / f"{name}.ckpt")
        known = {"best": {} if net.best is None else {net.config.monitor: net.best}}
        known["final"] = {key: value for key, value in net.rows[-1].items() if key != "epoch"}
        parameters = sum(p.numel() for p in self.stack.models[place].parameters() if p.requires_grad)
        counted = {"epochs": len(net.rows), "steps": self.stack.step, "parameters": parameters, "processes": 1}
        seconds = round(time.perf_counter() - self.started, 2)
        runs.end(net.folder, fit_seconds=seconds, **counted, **known, **values)
        for name in net.config.logger or {}:
            if name == "metrics":
                continue
            logger = build(net.config, f"logger.{name}")
            logger.log_hyperparams(credentials.plain(net.config))
            per_epoch = self.stack.step // len(net.rows)
            for number, row in enumerate(net.rows, 1):
                logger.log_metrics(row, step=number * per_epoch - 1)
            if values.get("test"):
                logger.log_metrics(values["test"], step=self.stack.step)
            if hasattr(logger, "log_checkpoint") and values["status"] == "finished":
                for path in (net.folder / "checkpoints").glob("*.ckpt"):
                    logger.log_checkpoint(path, path.stem)
            if hasattr(logger, "log_summary"):
                parts = {**known, "test": values.get("test") or {}}
                named = {f"{part}/{k.removeprefix(f'{part}_')}": v for part in parts for k, v in parts[part].items()}
                logger.log_summary(named)
            logger.finalize("success")
            getattr(logger, "finish", lambda: None)()


def _signature(config: DictConfig) -> str:
    """What nets of one stack have in common."""
    plain: Any = OmegaConf.to_container(config, resolve=True)  # what follows the seed may be more than the order
    for key in ("seed", "name", "tags", "run_dir", "scheduler"):
        plain.pop(key, None)
    plain["data"].pop("seed")
    plain["model"].pop("scheduler", None)
    for optimizer in (plain["optimizer"], plain["model"]["optimizer"]):
        for key in FREE:
            optimizer.pop(key, None)
    return repr(plain)
