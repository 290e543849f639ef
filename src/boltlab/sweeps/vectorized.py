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

from boltlab import runs
from boltlab.checkpoints import file as checkpoint_file
from boltlab.config.build import build
from boltlab.config.compose import Composed, compose
from boltlab.ground import credentials, signals
from boltlab.ground.errors import UserError
from boltlab.loggers.csv import CSVLogger
from boltlab.sweeps import space as spaces
from boltlab.sweeps.stack import Stack
from boltlab.sweeps.study import Claimed, Lost, Study
from boltlab.sweeps.table import Table
from boltlab.sweeps.worker import WAIT_SECONDS, Dead, Part, State, outcome, value_of
from boltlab.training import resume

AT_ONCE = 32  # trials, where `workers` does not say
FREE = ("lr", "weight_decay", "momentum", "betas", "eps")  # of the optimizer, in which nets of a stack may differ


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
        self.left: dict[int, Claimed] = {}  # of the trials that are at work together, those that have not ended
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
        try:
            while len(self.left) < self.trials and (one := self.study.take()) is not None:
                self.left[one.number] = one
                self.watch()
            if not self.left:
                if not self.study.others():
                    return False
                self.watch()
                time.sleep(WAIT_SECONDS)
            stacks: dict[str, list[Net]] = {}
            for one in list(self.left.values()):
                for net in self._nets(one):
                    stacks.setdefault(_signature(net.config), []).append(net)
            for nets in stacks.values():
                _Training(self, nets).run()
            return True
        finally:
            self.at_work.clear()
            while self.left:
                self.study.leave(self.left.popitem()[1])

    def _nets(self, claimed: Claimed) -> list[Net]:
        """The runs of a trial that are to be trained; where a worker that is gone had trained them all, none."""
        if reason := claimed.hopeless():
            self.died(claimed, reason)
            return []
        nets, done, shared = [], [], [*self.study.asked["train"], *spaces.overrides(claimed.params)]
        for part in self.parts:
            folder = self.study.folder(claimed.number, part.label)
            status = runs.status(runs.read_summary(folder), folder)
            if status == "pruned":  # by a worker that was killed before it could tell
                self.pruned(claimed, "pruned")
                return []
            if status == "running":
                self.died(claimed, f"{folder.name} is running by another process", again=True)
                return []
            done.append(status == "finished")
            try:
                composed = compose("train", [*shared, *part.overrides])
            except UserError as e:
                self.died(claimed, " ".join(str(e).split())[:500])
                return []
            composed.config.channels_last = False  # a stack has a dimension more; the numbers are the same
            nets.append(Net(claimed, part, composed, folder))
        if all(done):
            self.finished(claimed, nets)
            return []
        return nets

    # -- what became of a trial

    def finished(self, claimed: Claimed, nets: Sequence[Net]) -> None:
        try:
            found = {n.part.label: [value_of(n.folder, *o) for o in self.study.objectives.items()] for n in nets}
        except Dead as e:
            self.died(claimed, str(e))
            return
        values, more = outcome(found)
        self._tell(claimed, f"finished: {values[0]:.4f}", lambda: self.study.complete(claimed, values, **more))

    def pruned(self, claimed: Claimed, reason: str) -> None:
        self._tell(claimed, reason, lambda: self.study.prune(claimed, reason=reason))

    def died(self, claimed: Claimed, reason: str, again: bool = False) -> None:
        self._tell(claimed, f"died: {reason}", lambda: self.study.fail(claimed, reason, again=again))

    def _tell(self, claimed: Claimed, what: str, tell: Callable[[], Any]) -> None:
        try:
            tell()
        except Lost:
            self.lost(claimed)
        else:
            self._over(claimed, what)

    def lost(self, claimed: Claimed) -> None:
        self.study.release(claimed)
        self._over(claimed, "was taken over by another worker")

    def _over(self, claimed: Claimed, what: str) -> None:
        self.at_work.pop(claimed.number, None)
        del self.left[claimed.number]
        self.table.say(f"trial {claimed.number} {what}")


class _Training:
    """One stack, from its run folders to their end."""

    def __init__(self, engine: Vectorized, nets: list[Net]) -> None:
        self.engine, self.nets = engine, nets
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
        self.record = resume.DataRecord(first.folder, first.config, data, goes_on=False)
        if first.config.get("data_fingerprint") != "none":
            data.on_load = self.record
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
        for nets in self._by_trial().values():
            try:
                how = self._verdict(nets, epoch + 1)
            except Lost:
                self.engine.lost(nets[0].claimed)
                ended += nets
                continue
            if how:
                for net in nets:
                    self._end(self.nets.index(net), **how)
                self.engine.pruned(nets[0].claimed, how["reason"])
                ended += nets
        if ended:
            places = [place for place, net in enumerate(self.nets) if net not in ended]
            self.nets = [self.nets[place] for place in places]
            if places:
                self.stack.keep(places)

    def _verdict(self, nets: list[Net], epochs: int) -> dict[str, str]:
        """The status and the reason with which a trial ends after so many epochs; empty where it trains on.

        Raises:
            Lost
        """
        study, objective, rows = self.engine.study, self.engine.objective, [net.rows[-1] for net in nets]
        state = self.engine.at_work[nets[0].claimed.number]
        state.epoch = epochs
        if any(not math.isfinite(value) for row in rows for key, value in row.items() if key.endswith("_loss")):
            return {"status": "failed", "error": "NonFiniteLoss", "reason": f"diverged in epoch {epochs}"}
        if objective not in rows[0]:
            return {}
        state.value = statistics.fmean(row[objective] for row in rows)
        late = len(study.objectives) == 1 and study.report(nets[0].claimed, state.value, epochs)
        ends = late and epochs < self.stack.epochs
        return {"status": "pruned", "reason": f"pruned at epoch {epochs}"} if ends else {}

    def _by_trial(self) -> dict[int, list[Net]]:
        found: dict[int, list[Net]] = {}
        for net in self.nets:
            found.setdefault(net.claimed.number, []).append(net)
        return found

    def _finish(self) -> None:
        tested = self.stack.evaluate("test", best=True) if self.config.test else [{} for _ in self.nets]
        for place, (net, test) in enumerate(zip(self.nets, tested, strict=True)):
            if test:
                net.log.log_metrics(test, step=self.stack.step)
            self._end(place, status="finished", test=test)
        for nets in self._by_trial().values():
            self.engine.finished(nets[0].claimed, nets)

    def _end(self, place: int, **values: Any) -> None:
        """Writes the checkpoints and the summary of a net's run, and tells its other loggers all at once."""
        net = self.nets[place]
        self.engine.study.alive()  # loggers may take their time
        self.record.wait()
        if self.data_json.is_file() and net.folder != self.data_json.parent:
            shutil.copyfile(self.data_json, net.folder / "data.json")
        self._save(place)
        known = {"best": {} if net.best is None else {net.config.monitor: net.best}}
        known["final"] = {key: value for key, value in net.rows[-1].items() if key != "epoch"}
        parameters = sum(p.numel() for p in self.stack.models[place].parameters() if p.requires_grad)
        counted = {"epochs": len(net.rows), "steps": self.stack.step, "parameters": parameters, "processes": 1}
        seconds = round(time.perf_counter() - self.started, 2)
        runs.end(net.folder, fit_seconds=seconds, **counted, **known, **values)
        for name in net.config.logger or {}:
            if name != "metrics":
                known["test"] = values.get("test") or {}
                self._tell(build(net.config, f"logger.{name}"), net, known, values["status"] == "finished")

    def _save(self, place: int) -> None:
        net = self.nets[place]
        shared = {"epoch": len(net.rows) - 1, "global_step": self.stack.step, "config": credentials.plain(net.config)}
        shared[type(self.stack.data).__qualname__] = self.stack.data.state_dict()
        for name, best in (("last", False), ("best", True))[: 1 if net.best is None else 2]:
            content = {**shared, "state_dict": self.stack.state_dict(place, best)}
            checkpoint_file.write(content, net.folder / "checkpoints" / f"{name}.ckpt")

    def _tell(self, logger: Any, net: Net, known: Mapping[str, dict[str, float]], finished: bool) -> None:
        logger.log_hyperparams(credentials.plain(net.config))
        per_epoch = self.stack.step // len(net.rows)
        for number, row in enumerate(net.rows, 1):
            logger.log_metrics(row, step=number * per_epoch - 1)
        if known["test"]:
            logger.log_metrics(known["test"], step=self.stack.step)
        if hasattr(logger, "log_checkpoint") and finished:
            for path in (net.folder / "checkpoints").glob("*.ckpt"):
                logger.log_checkpoint(path, path.stem)
        if hasattr(logger, "log_summary"):
            named = {f"{part}/{k.removeprefix(f'{part}_')}": v for part in known for k, v in known[part].items()}
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
