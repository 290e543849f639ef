"""`sweep.engine=vectorized`: trials of equal architecture train at once in this process, as one stack (`sweeps.stack`).

Points are drawn for a whole stack before any of it is trained, and its trials go epoch by epoch together, so a pruner
compares them at each. A trial leaves an ordinary run, whose checkpoints hold weights only: one that was stopped begins
again, in seconds. What a stack does not do is refused by name.
"""

import math
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from boltlab import checkpoint, credentials, resume, runs, signals
from boltlab.check import Mistake, process_count
from boltlab.config import Composed, build, compose
from boltlab.errors import UserError
from boltlab.loggers.csv import CSVLogger
from boltlab.models.task import Task, each_step_overrides
from boltlab.sweeps import space as spaces
from boltlab.sweeps.stack import RULES, Stack
from boltlab.sweeps.study import Claimed, Lost, Study
from boltlab.sweeps.table import Table
from boltlab.sweeps.worker import WAIT_SECONDS, Dead, Part, State, value_of

AT_ONCE = 32  # trials, where `workers` does not say
FREE = ("lr", "weight_decay", "momentum", "betas", "eps")  # of the optimizer, in which nets of a stack may differ
WATCH_STEPS = 16
_TRAINER = ("accelerator", "max_epochs", "log_every_n_steps", "enable_progress_bar")
_ROOT = ("compile", "steps_per_execution", "init_from", "max_restarts")


def problems(config: DictConfig, plain: DictConfig) -> list[Mistake]:
    """What of a training's config a stack does not do. plain: the config of a training without overrides."""
    found = [(f"{key}={config[key]}", "is not done") for key in _ROOT if config[key] != plain[key]]
    for name, nodes in (("trainer", config.trainer), ("callbacks", config.callbacks or {})):
        ours, shipped = (OmegaConf.to_container(node, resolve=False) for node in (nodes, plain[name]))
        changed = [key for key, value in ours.items() if key not in shipped or shipped[key] != value]
        found += [(f"{name}.{key}", "is not as by default, and not heeded") for key in changed if key not in _TRAINER]
    if process_count(config) > 1:
        found.append(("trainer.devices", "is more than one"))
    if not isinstance(config.trainer.max_epochs, int) or config.trainer.max_epochs < 1:
        found.append(("trainer.max_epochs", "says no length"))
    if str(config.precision) not in ("32", "64", "bf16-mixed"):
        found.append((f"precision={config.precision}", "is neither 32, 64 nor bf16-mixed"))
    if config.data.get("max_bad_files"):
        found.append(("data.max_bad_files", "leaves samples out"))
    model = build(config, "model")
    optimizer = model.make_optimizer([torch.nn.Parameter(torch.zeros(()))])
    rule = RULES.get(type(optimizer))
    if rule is None:
        known = ", ".join(kind.__name__.lower() for kind in RULES)
        found.append(("optimizer", f"{type(optimizer).__name__} is not written for stacks; known: {known}"))
    else:
        found += [(f"optimizer.{k}", f"is not {v}") for k, v in rule.fixed.items() if optimizer.defaults.get(k, v) != v]
    if type(model.scheduler).__name__ == "Plateau":
        found.append(("scheduler=plateau", "follows the metric of one net"))
    if not isinstance(model, Task) or each_step_overrides(type(model)) or hasattr(model.net, "load_pretrained"):
        found.append(("model", "has steps or weights of its own"))
    drawing = [m for m in model.modules() if isinstance(m, torch.nn.modules.dropout._DropoutNd) and m.p > 0]
    if drawing or getattr(model, "mixers", None):
        found.append(("model", "draws at each step (dropout, mixup, cutmix), other numbers than alone"))
    if getattr(model, "balanced", False):
        found.append(("model.class_weights=balanced", "is counted on the data: give numbers"))
    return [Mistake(where, f"{what}: sweep.engine=vectorized cannot, sweep.engine=optuna can") for where, what in found]


def refuse(composed: Sequence[Composed], asked: Mapping[str, Any], folds: Any, launcher: Any) -> list[Mistake]:
    """All that stands against training these configs in stacks."""
    plain = compose("train", [], check=False).config
    found = {str(mistake): mistake for one in composed for mistake in problems(one.config, plain)}
    measured = [name for name in ("seconds", "samples_per_second", "latency_ms") if name in asked["objectives"]]
    others = [Mistake(f"sweep.objectives.{name}", "of one net cannot be told in a stack") for name in measured]
    if folds:
        others.append(Mistake("folds", "train on other samples each, and a stack on the same: sweep.engine=optuna"))
    if launcher is not None:
        others.append(Mistake("launcher", "starts processes, and a stack is one: sweep.engine=optuna"))
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
            UserError: a stack does not fit into the memory.
        """
        with self.table.shown(self.at_work):
            while not (self.deadline and time.time() > self.deadline):
                claimed: list[Claimed] = []
                while len(claimed) < self.trials and (one := self.study.take()) is not None:
                    claimed.append(one)
                if claimed:
                    self._train(claimed)
                elif self.study.others():
                    self._watch()
                    time.sleep(WAIT_SECONDS)
                else:
                    break

    def _watch(self) -> None:
        self.study.alive()
        self.table.update()
        if signals.inbox.stop:
            raise signals.Stopped(signals.inbox.stop)

    def _train(self, claimed: list[Claimed]) -> None:
        left = {one.number: one for one in claimed}
        signals.inbox.deferred = True  # no signal breaks off a transaction of the study, or a recording on the GPU
        try:
            stacks: dict[str, list[Net]] = {}
            for one in claimed:
                for net in self._nets(one, left):
                    stacks.setdefault(_signature(net.config), []).append(net)
            for nets in stacks.values():
                _Training(self, nets, left).run()
        finally:
            signals.inbox.deferred = False
            for one in left.values():
                self.study.leave(one)

    def _nets(self, claimed: Claimed, left: dict[int, Claimed]) -> list[Net]:
        """The runs of a trial that are to be trained; where a worker that is gone had trained them all, none."""
        nets, done = [], []
        for part in self.parts:
            folder = self.study.folder(claimed.number, part.label)
            done.append(runs.read_summary(folder).get("status") == "finished")
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
        self.at_work.pop(claimed.number, None)
        del left[claimed.number]
        try:
            tell()
        except Lost:
            self.study.release(claimed)
            what = "was taken over by another worker"
        self.table.say(f"trial {claimed.number} {what}")


class _Training:
    """One stack, from its run folders to their end."""

    def __init__(self, engine: Vectorized, nets: list[Net], left: dict[int, Claimed]) -> None:
        self.engine, self.nets, self.left = engine, nets, left
        self.config = nets[0].config
        self.started, self._steps = time.perf_counter(), 0

    def run(self) -> None:
        wanted = self.config.trainer.accelerator
        device = torch.device("cuda" if wanted in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu")
        for number in {net.claimed.number for net in self.nets}:
            claimed = next(net.claimed for net in self.nets if net.claimed.number == number)
            self.engine.at_work[number] = State(claimed.params)
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
                stopped = isinstance(e, signals.Stopped | KeyboardInterrupt)
                for net in self.nets:
                    runs.end(net.folder, status="interrupted" if stopped else "failed", reason=runs.reason(e))
                if isinstance(e, torch.OutOfMemoryError):
                    cure = f"workers={max(1, len(self.nets) // 2)} stacks fewer"
                    raise UserError(f"{len(self.nets)} nets at once do not fit into the GPU's memory: {cure}") from e
                raise

    def _load(self) -> None:
        first, data = self.nets[0], self.stack.data
        if first.config.get("data_fingerprint") != "none":
            data.on_load = lambda split: resume.record_data(first.folder, first.config, data, split, goes_on=False)
        self.stack.load()
        if (path := first.folder / "data.json").is_file():
            for net in self.nets[1:]:
                shutil.copyfile(path, net.folder / path.name)

    def _epochs(self) -> None:
        for net in self.nets:
            net.log = CSVLogger(net.folder)
        for epoch in range(self.stack.epochs):
            trained = self.stack.train_epoch(epoch, self._between)
            for place, (net, train, val) in enumerate(zip(self.nets, trained, self.stack.evaluate("val"), strict=True)):
                net.rows.append({"epoch": epoch, **train, **val})
                net.log.log_metrics(net.rows[-1], step=self.stack.step - 1)
                value = {**train, **val}[net.config.monitor]
                sign = 1 if net.config.mode == "max" else -1
                if not math.isnan(value) and (net.best is None or sign * value > sign * net.best):
                    net.best = value
                    self.stack.is_best(place)
            self._look(epoch)
            if not self.nets:
                return
        self._finish()

    def _between(self) -> None:
        self._steps += 1
        if self._steps % WATCH_STEPS == 0:
            self.engine._watch()

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
                late = alone and self.engine.study.report(nets[0].claimed, state.value, epoch + 1)
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
        shared = {"epoch": len(net.rows) - 1, "global_step": self.stack.step, "config": credentials.plain(net.config)}
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
            if name == "csv":
                continue
            logger = build(net.config, f"logger.{name}")
            logger.log_hyperparams(credentials.plain(net.config))
            per_epoch = self.stack.step // len(net.rows)
            for number, row in enumerate(net.rows, 1):
                logger.log_metrics(row, step=number * per_epoch - 1)
            if hasattr(logger, "log_summary"):
                parts = {**known, "test": values.get("test") or {}}
                named = {f"{part}/{k.removeprefix(f'{part}_')}": v for part in parts for k, v in parts[part].items()}
                logger.log_summary(named)
            logger.finalize("success")
            getattr(logger, "finish", lambda: None)()


def _signature(config: DictConfig) -> str:
    """What nets of one stack have in common."""
    plain: Any = OmegaConf.to_container(config, resolve=False)
    for key in ("seed", "name", "tags", "run_dir", "scheduler"):
        plain.pop(key, None)
    for key in FREE:
        plain["optimizer"].pop(key, None)
    return repr(plain)
