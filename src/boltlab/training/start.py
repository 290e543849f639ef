"""Plans how a run starts, by reading alone, and executes the plan. Every training starts here."""

import platform
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from omegaconf import DictConfig, OmegaConf

from boltlab import runs
from boltlab.config import auto
from boltlab.config.build import build
from boltlab.config.check import SEARCHED
from boltlab.config.compose import Composed
from boltlab.config.edit import edit
from boltlab.config.overrides import keys
from boltlab.ground import credentials, started_by
from boltlab.ground.errors import UserError
from boltlab.ground.signals import Stopped
from boltlab.processes import launch
from boltlab.processes.exits import exit_code
from boltlab.training import resume
from boltlab.training.outcome import print_end

if TYPE_CHECKING:
    from concurrent.futures import Future

JOB = f"{__name__}:job"  # what a launcher's process calls with its run folder


@dataclass(frozen=True)
class Start:
    """A run and the way in which it starts. Whoever plans and executes it holds the lock of its folder.

    kind: "new"; "queued", made by another process and begun here; "resumed".
    composed: of a new run. state: the checkpoint content that a new run begins with (`ckpt_path`).
    checkpoint: the file that a run resumes from; None where it begins again.
    changed: the changes that break exactness, see `resume.check`. said: the line to print.
    kept: the text of the run's config.yaml before this start; unchanged: `config` is equal to it.
    """

    folder: Path
    config: DictConfig
    overrides: list[str]
    kind: Literal["new", "queued", "resumed"]
    composed: Composed | None = None
    state: dict[str, Any] | None = None
    checkpoint: Path | None = None
    changed: tuple[tuple[str, Any, Any], ...] = ()
    said: str = ""
    unchanged: bool = False
    kept: str = ""

    @classmethod
    def resumed(cls, folder: Path, overrides: list[str], own: bool = False) -> "Start":
        """Plans how a run resumes, or how one begins that was queued, with overrides on top of its config.

        own: this same command has composed its config, which need not be checked against `boltlab.config.trust`.

        Raises:
            UserError: it is finished, or what changed does not allow it to resume exactly.
        """
        from boltlab.runs import checkpoints  # which imports torch

        summary = runs.read_summary(folder)
        kept = runs.config_text(folder)
        before = runs.parse_config(folder, kept, own, keys(overrides))
        _reopen(before)
        newest, warnings = checkpoints.newest_good(folder)
        for line in warnings:
            print(line, file=sys.stderr)
        status = summary.get("status")
        # What is there holds weights only; to begin again would write over it.
        ended = status not in ("queued", "running")
        if newest is None and ended and any((folder / "checkpoints").glob("*.ckpt")):
            cure = f"boltlab train init_from={folder.name} begins a new run with its weights"
            raise UserError(f"{runs.shown(folder)} is {status}, and no checkpoint of it can be resumed: {cure}")
        queued = newest is None and status == "queued"
        queued_by = summary.get("host"), summary.get("pid")
        if queued and own and not overrides and queued_by == (platform.node(), started_by.parent):
            # Checked where it was queued.
            open_keys = auto.placeholders(before)
            auto.resolve(before, open_keys, build)
            return cls(folder, before, [], "queued", unchanged=not open_keys and not _searched(before), kept=kept)
        config = edit(before, overrides, ("resume", "init_from"))
        config.update({"run_dir": str(folder), "init_from": before.get("init_from")})
        if queued:
            return cls(folder, config, overrides, "queued", kept=kept)
        if newest is None:
            return cls(folder, config, overrides, "resumed", said="has no checkpoint yet: it begins again", kept=kept)
        changed, said = _against(newest, config, folder)
        return cls(folder, config, overrides, "resumed", checkpoint=newest, changed=changed, said=said, kept=kept)

    def execute(self, git: "Future[runs.Git] | None" = None) -> float | None:
        """Writes what is known before the run, trains and tests it; returns the best value of the monitored metric."""
        with self._config_restored():
            written = self._recorded(git)
            # A search fills in what other keys refer to; in what was written, these hold its `auto`.
            return _execute(self.folder, self.config if _searched(written) else written)

    def _recorded(self, git: "Future[runs.Git] | None") -> DictConfig:
        """Writes how the run starts; returns its config as it is read again."""
        if self.kind == "queued":
            return runs.record_start(self.folder, self.config, git, written=self.unchanged)
        if self.composed is None:
            name = self.checkpoint.name if self.checkpoint else None
            config = runs.record_resume(self.folder, self.config, self.overrides, name, list(self.changed), git)
            print(f"{runs.shown(self.folder)} {self.said}", flush=True)
            return config
        known: dict[str, Any] = {key: self.composed.choices.get(key) for key in ("data", "model")}
        known["name"] = name_of(self.composed)
        config = runs.prepare(self.folder, self.config, self.overrides, git, **known)
        if self.state is not None:
            from boltlab.checkpoints import file as checkpoint_file

            checkpoint_file.write(self.state, self.folder / "checkpoints" / "last.ckpt")
            runs.write_summary(self.folder, ckpt_path=self.state["ckpt_path"])
        return config

    @contextmanager
    def _config_restored(self) -> Iterator[None]:
        """Puts the config of a run back where nothing was trained with the new one."""
        if self.kind == "new":
            yield
            return
        last = self.checkpoint and self.checkpoint.stat().st_mtime_ns
        try:
            yield
        except Exception:
            if self.checkpoint is None or self.checkpoint.stat().st_mtime_ns == last:
                runs.write_whole(self.folder / "config.yaml", self.kept)
            raise


def run(
    composed: Composed, folder: Path, git: "Future[runs.Git] | None" = None, state: dict[str, Any] | None = None
) -> float | None:
    """Trains a new run in `folder`, from `state` where it is given; returns the best of the monitored metric."""
    folder.mkdir(parents=True, exist_ok=True)
    with runs.lock(folder):
        return Start(folder, composed.config, composed.overrides, "new", composed, state).execute(git)


def resume_run(
    folder: Path, overrides: list[str], git: "Future[runs.Git] | None" = None, own: bool = False
) -> float | None:
    """Resumes a run, or begins one that was queued; see `Start.resumed`.

    Raises:
        UserError: also where another process holds the folder, or where it holds an evaluation.
    """
    if "evaluated" in (summary := runs.read_summary(folder)):
        trained = Path(str(summary["evaluated"])).name
        raise UserError(f"{runs.shown(folder)} is an evaluation, no training: resume={trained}")
    from boltlab.checkpoints import file as checkpoint_file

    runs.refuse_links(folder)
    with runs.lock(folder):
        checkpoint_file.clean_leftovers(folder)
        return Start.resumed(folder, overrides, own).execute(git)


def job(folder: Path) -> int:
    """Entry point of a launcher's process: resumes a run, or begins one that was queued; returns the exit code."""

    def begin() -> int:
        try:
            resume_run(folder, [], own=True)
        except Exception as e:
            if runs.read_summary(folder).get("status") == "queued":  # it never began, so it did not say why itself
                said = " ".join(str(e).split())[:500] if isinstance(e, UserError) else runs.reason(e)
                runs.end(folder, status="failed", reason=credentials.masked(said))
            raise
        return 0

    return exit_code("train", begin)


def name_of(composed: Composed) -> str:
    """The short name of a run: `name=…`, else the experiment, else data and model."""
    chosen = composed.choices
    return str(composed.config.name or chosen.get("experiment") or f"{chosen.get('data')}_{chosen.get('model')}")


def say_unused(composed: Composed) -> None:
    """Names the loggers that a file sets and nobody chose."""
    if composed.unused:
        print(f"not used: {' and '.join(composed.unused)}; logger=… does not choose it", flush=True)


def settle_weights(composed: Composed) -> None:
    """Finds what `init_from` means, and that it is whole, before anything is started."""
    if composed.config.init_from:
        from boltlab.training import init_from

        init_from.settle(composed.config)


def state_of(path: Path, config: DictConfig) -> dict[str, Any]:
    """The complete state in a checkpoint, for a new run to begin with: `ckpt_path=…`. What was best begins anew.

    Raises:
        UserError: it is damaged, holds weights only, or belongs to another model, optimizer or schedule.
    """
    from boltlab.checkpoints import file as checkpoint_file

    content = checkpoint_file.read(path)
    if not {"optimizer_states", "loops", "config"} <= content.keys():
        raise UserError(f"ckpt_path={path} holds weights only: init_from={path} begins with them")
    resume.check(content, OmegaConf.merge(config, {"resume_changed": "restart_epoch"}), path)  # type: ignore[arg-type]
    states = content.get("callbacks") or {}
    content["callbacks"] = {key: state for key, state in states.items() if "best_model_path" not in state}
    return {**content, "ckpt_path": str(path.resolve())}


def _reopen(config: DictConfig) -> None:
    """Opens in a run's config, in place, what is settled anew at each start."""
    if OmegaConf.select(config, "optimizer.lr") == "auto":  # stopped in its search: the model refers to it again
        config.model.optimizer = "${optimizer}"
    config.resume_changed = None  # it was said of an earlier time
    auto.reopen(config)


def _against(path: Path, config: DictConfig, folder: Path) -> tuple[tuple[tuple[str, Any, Any], ...], str]:
    """The changes that break exactness between a checkpoint and the config that resumes; and the line to print."""
    from boltlab.checkpoints import file as checkpoint_file

    content = checkpoint_file.read(path)
    try:
        resume.refuse_finished(content, config, folder)
        changed = resume.check(content, config, folder)
        said = f"resumes from {path.name}, {resume.place(content)}"
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise checkpoint_file.CheckpointError(f"{path} is not as boltlab writes it: no {e}") from e
    schedule = config.get("scheduler")
    if resume.longer(content, config) and schedule and "Constant" not in schedule._target_:
        said += "; the learning rate follows the schedule of the new length"
    return tuple(changed), said


def _searched(config: DictConfig) -> bool:
    """Whether something is at `auto` that is searched for by trying it."""
    return any(OmegaConf.select(config, key) == "auto" for key in SEARCHED)


def _execute(folder: Path, config: DictConfig) -> float | None:
    if started_by.leader is not None:
        started_by.leader.begin(folder)
    try:
        with runs.recorded(folder):
            if _searched(config):
                from boltlab.training import search

                found = search.search(config)
                runs.write_summary(folder, found=found)
                config = runs.write_config(folder, config)
            from boltlab.training.fit import fit

            launch.launch(fit, folder, config)
    except (Stopped, KeyboardInterrupt):
        print(f"\nto resume: boltlab train {shlex.quote(f'resume={runs.shown(folder)}')}", file=sys.stderr)
        raise
    print_end(folder)
    best: float | None = runs.read_summary(folder).get("best", {}).get(config.monitor)
    return best
