"""The study of a sweep: what is asked for, which trials there are, and who is at work on which.

<log_dir>/train/<date>_<time>_<name>-<id>/
    sweep.json     what is asked for             study.db     Optuna's study (storage=null)
    0/ 1/ …        the trials' run folders       claims/      a file for each trial, locked by who is at work on it
    best.yaml      the best config, as an experiment          report.html, *.png

Workers, threads of one command or commands on several machines, share the study and nothing else. A trial whose worker
is gone is taken by another one, and resumes from its own checkpoint.
"""

import hashlib
import json
import platform
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt

from boltlab import runs
from boltlab.config.build import build
from boltlab.ground.credentials import masked
from boltlab.ground.errors import UserError
from boltlab.sweeps import rebuild
from boltlab.sweeps import space as spaces

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

ASKED = "sweep.json"
GRID = "optuna.samplers.BruteForceSampler"
SAME = "same_as"  # user attributes of a trial: its values are those of another one
RETRY, FINAL = "retry_of", "given_up"
ALIVE_SECONDS = 30.0  # how often a worker says that it is there
GONE_SECONDS = 300.0  # without that, one of another machine is gone
MOST_TAKEOVERS = 3  # of a trial whose worker was killed: it may be what killed them
_DUPLICATES = 10  # in a row, before the points of a finite space are looked through for one that is left
URL = "BOLTLAB_STORAGE"  # the variable in which workers of a cluster get it: it may hold a password


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """configs/sweep/*.yaml.

    train: overrides that all trials share. space: see `boltlab.sweeps.space`.
    objectives: metrics and which way each gets better: auto, max or min; null is the training's own monitor. Beside
        what is logged: parameters, seconds, samples_per_second, latency_ms (of one sample, forward).
    trials: points that are tried; those that are pruned, or fail twice, count. null: every point of a grid, else 20.
    engine: wandb has the W&B server choose, with its own samplers; vectorized trains many small nets as one.
    """

    train: list[str] = field(default_factory=list)
    space: dict[str, Any] = field(default_factory=dict)
    objectives: dict[str, Literal["auto", "max", "min"]] | None = None
    trials: Annotated[int, Ge(1)] | None = None
    timeout_minutes: Annotated[float, Gt(0)] | None = None
    engine: Literal["optuna", "vectorized", "wandb"] = "optuna"


@dataclass
class Claimed:
    """A trial that this process is at work on."""

    trial: "Trial"
    params: dict[str, Any]
    lock: Any
    reported: int = 0  # the last step that the pruner knows
    taken: int = 0  # how often it was taken over from a worker that was killed

    @property
    def number(self) -> int:
        return self.trial.number

    def hopeless(self) -> str:
        """Why not to try it once more; empty where there is no reason."""
        killed = f"its worker was killed {self.taken} times, each time with this trial"
        return killed if self.taken >= MOST_TAKEOVERS else ""


class Lost(Exception):
    """Another worker has taken a trial over, and has told its end."""


def definition(asked: Mapping[str, Any]) -> str:
    """What makes two sweeps the same one: all that is asked for but how long."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def begin(log_dir: Path, asked: Mapping[str, Any], more: Mapping[str, Any]) -> tuple[Path, bool]:
    """The folder of the sweep that asks for this, and whether there was one already; of commands that begin it at the
    same moment, one makes it. more: what its file says beside."""
    from filelock import FileLock

    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(log_dir / ".sweep").acquire()
    except OSError as e:
        raise UserError(f"cannot write into {log_dir}: {e.strerror}; choose another with log_dir=…") from e
    with lock:
        found = runs.newest_sweep(log_dir, ASKED, lambda content: content.get("of") == definition(asked))
        top = found or runs.new_folder(log_dir, "train", asked["name"])
        started = runs.read_json(top / ASKED).get("started", time.time())
        runs.write_json(top / ASKED, {"of": definition(asked), "started": started, **more, "asked": asked})
        return top, found is not None


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna says what it does on stderr, and warns of what is still experimental."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def open_storage(url: str | None, top: Path) -> Any:
    """
    Raises:
        UserError: it cannot be opened, or is damaged.
    """
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    for attempt in range(1, 4):
        try:
            if url == "journal":
                return JournalStorage(JournalFileBackend(str(top / "study.journal")))
            if url is None:
                rebuild.refuse_damaged(top / "study.db")
                return RDBStorage(f"sqlite:///{top / 'study.db'}", engine_kwargs={"connect_args": {"timeout": 60}})
            return RDBStorage(url)
        except ImportError as e:
            raise UserError(f"storage={masked(str(url))}: {e}") from None
        except (UserError, UnicodeDecodeError, json.JSONDecodeError):  # damaged
            raise
        except Exception as e:  # SQLAlchemy's own, and those of each database's driver
            said = masked(str(e).splitlines()[0])[:300]
            # Another command, on another machine perhaps, makes the same tables at the same moment.
            if attempt == 3 or (type(e).__name__ != "IntegrityError" and "already exists" not in said):
                raise UserError(f"storage={masked(str(url))} cannot be opened: {type(e).__name__}: {said}") from None
            time.sleep(1)
    raise AssertionError("the third attempt returns or raises")


class Study:
    """An open study: what to try next, and what became of it. Its methods may be called from several threads.

    asked: train, space, objectives, sampler, pruner, parts, as `commands.sweep` has checked them.
    total: how many points to try. key: tells workers in different processes apart, which draw different samples.
    anew: whether the study is made anew from the runs in `top`.

    Raises:
        UserError: the study cannot be opened, is damaged, or is not the one of the runs in `top`.
    """

    def __init__(
        self,
        top: Path,
        asked: Mapping[str, Any],
        total: int | None,
        url: str | None,
        key: str = "",
        anew: bool = False,
    ) -> None:
        import optuna
        from optuna.study import StudyDirection

        self.top, self.asked = top, asked
        self.space = spaces.parse(asked["space"])
        self.size = spaces.size(self.space)
        self.total = int(min(total or self.size, self.size))
        self.objectives: dict[str, str] = asked["objectives"]
        self.mine: set[int] = set()
        self.busy: dict[int, float] = {}
        self._here = f"{platform.node()} {top}"
        self._lock = threading.RLock()
        (top / "claims").mkdir(exist_ok=True)
        shared = url not in (None, "journal")  # by folders whose keys may be the same
        name = f"{asked['name']}-{definition(asked)}" if shared else top.name
        with quiet(), self._asking():
            if anew:
                rebuild.set_aside(top)
            storage = open_storage(url, top)
            known = {s.study_name: s.n_trials for s in optuna.get_all_study_summaries(storage)}
            drawn = {"seed": asked["seed"]}
            if not asked["sampler"]["_target_"].endswith("QMCSampler"):  # whose workers draw from one sequence
                drawn |= {"known": known.get(name, 0), "key": key + self._here * (shared and name in known)}
            self.study = optuna.create_study(
                storage=storage,
                study_name=name,
                directions=[StudyDirection[f"{mode.upper()}IMIZE"] for mode in self.objectives.values()],
                load_if_exists=True,
                sampler=build(asked, "sampler", seed=int(definition(drawn), 16) % 2**31),
                pruner=build(asked, "pruner"),
            )
            if not known.get(name):
                self.study.set_metric_names(list(self.objectives))
            if anew:
                rebuild.fill(self.study, top, self.space)
            rebuild.refuse_strangers(top, self.space, self.trials())

    @contextmanager
    def _asking(self) -> Iterator[None]:
        from filelock import FileLock

        with self._lock, FileLock(self.top / "claims" / "ask"), quiet():
            try:
                yield
            except (json.JSONDecodeError, UnicodeDecodeError) as e:
                raise UserError(f"{runs.shown(self.top / 'study.journal')} is damaged ({e}): {rebuild.CURE}") from None

    def folder(self, number: int, label: str) -> Path:
        """Of a run: of a trial, or of one of its parts."""
        return self.top / f"{number}{label and '-'}{label}"

    def trials(self) -> list["FrozenTrial"]:
        with self._lock:
            return self.study.get_trials(deepcopy=False)

    def take(self, new: bool = True) -> Claimed | None:
        """The next trial: one whose worker is gone, else, if asked for, a new one; None where there are enough."""
        with self._asking():
            known = self.trials()
            if (orphan := self._orphan(known)) is not None:
                return orphan
            if not new:
                return None
            again = any(t.state.name == "WAITING" for t in known)  # counted already
            return self._ask() if again or sum(map(counts, known)) < self.total else None

    def others(self) -> bool:
        """Whether a trial is at work elsewhere, or waits: there may be something to do when that ends."""
        return any(t.state.name in ("RUNNING", "WAITING") and t.number not in self.mine for t in self.trials())

    def _orphan(self, known: list["FrozenTrial"]) -> Claimed | None:
        from optuna.trial import Trial

        for t in known:
            if t.state.name != "RUNNING" or t.number in self.mine:
                continue
            since = t.user_attrs.get("alive") or (t.datetime_start.timestamp() if t.datetime_start else 0.0)
            elsewhere = t.user_attrs.get("at", self._here) not in (None, self._here)
            if elsewhere and time.time() - since < GONE_SECONDS:
                continue
            if (lock := self._claim(t.number)) is None:
                continue
            trial = Trial(self.study, t._trial_id)
            params = spaces.suggest_all(self.space, trial)  # what its worker had drawn, and what it was killed before
            was_left = t.user_attrs.get("at", self._here) is None
            taken = int(t.user_attrs.get("taken", 0)) + (not was_left)
            claimed = Claimed(trial, params, lock, max(t.intermediate_values, default=0), taken)
            trial.set_user_attr("taken", taken)
            return self._begin(claimed)
        return None

    def _claim(self, number: int) -> Any:
        from filelock import FileLock, Timeout

        lock = FileLock(self.top / "claims" / str(number), thread_local=False)
        with suppress(Timeout):
            lock.acquire(timeout=0)
        return lock if lock.is_locked else None

    def _ask(self) -> Claimed | None:
        for attempt in range(_DUPLICATES + 1):
            if attempt == _DUPLICATES:
                known = [t.params for t in self.trials()]
                left = next((point for point in spaces.points(self.space) if point not in known), None)
                if left is None:
                    return None
                self.study.enqueue_trial(left)
            trial = self.study.ask()
            params = spaces.suggest_all(self.space, trial)
            if RETRY in trial.user_attrs or not self._known(trial, params):
                return self._begin(Claimed(trial, params, self._claim(trial.number)))
        return None

    def _begin(self, claimed: Claimed) -> Claimed:
        claimed.trial.set_user_attr("at", self._here)
        claimed.trial.set_user_attr("alive", time.time())
        self.mine.add(claimed.number)
        self.busy[claimed.number] = time.monotonic()
        return claimed

    def _known(self, trial: "Trial", params: dict[str, Any]) -> bool:
        """Whether a point of a finite space was tried before: nothing would come of it but the same again."""
        if not self.space or self.size == float("inf"):
            return False
        for t in self.trials():
            if t.number != trial.number and t.params == params and SAME not in t.user_attrs:
                trial.set_user_attr(SAME, t.number)
                self._tell(trial, t.values, None if t.state.name == "COMPLETE" else "FAIL")
                return True
        return False

    def alive(self) -> None:
        """Says that the trials at work here are; called now and then."""
        for number, told in list(self.busy.items()):
            if time.monotonic() - told > ALIVE_SECONDS:
                with suppress(Lost), self._telling():  # who is lost hears it with what is told next
                    if number not in self.busy:  # it has ended meanwhile
                        continue
                    self.busy[number] = time.monotonic()
                    trial_id = self.study._storage.get_trial_id_from_study_id_trial_number(self.study._study_id, number)
                    self.study._storage.set_trial_user_attr(trial_id, "alive", time.time())

    def report(self, claimed: Claimed, value: float, step: int) -> bool:
        """Tells the pruner a value of the objective, and returns whether the trial is to end. Steps count from 1."""
        if step <= claimed.reported:  # before its worker was gone
            return False
        with self._telling():
            claimed.trial.report(value, step)
            claimed.reported = step
            return bool(claimed.trial.should_prune())

    def complete(self, claimed: Claimed, values: list[float], **attributes: Any) -> None:
        self._end(claimed, values, None, attributes)

    def prune(self, claimed: Claimed, **attributes: Any) -> None:
        self._end(claimed, None, "PRUNED", attributes)

    def fail(self, claimed: Claimed, reason: str, again: bool = True) -> bool:
        """Records why a trial died; returns whether its point is tried once more."""
        again = again and RETRY not in claimed.trial.user_attrs
        with self._asking():  # nobody may ask between the two
            if again:
                self.study.enqueue_trial(claimed.params, user_attrs={RETRY: claimed.number})
            self._end(claimed, None, "FAIL", {"reason": reason} | ({} if again else {FINAL: True}))
        return again

    def leave(self, claimed: Claimed) -> None:
        """Lets go of a trial that has saved, for any worker to resume."""
        with suppress(Lost), self._telling():
            claimed.trial.set_user_attr("at", None)
        self.release(claimed)

    def release(self, claimed: Claimed) -> None:
        with self._lock:
            self.mine.discard(claimed.number)
            self.busy.pop(claimed.number, None)
        claimed.lock.release()

    @contextmanager
    def _telling(self) -> Iterator[None]:
        """
        Raises:
            Lost: another worker has ended the trial.
        """
        from optuna.exceptions import UpdateFinishedTrialError

        try:
            with self._lock, quiet():
                yield
        except UpdateFinishedTrialError as e:
            raise Lost from e

    def _end(self, claimed: Claimed, values: list[float] | None, state: str | None, attributes: dict[str, Any]) -> None:
        with self._telling():
            for key, value in attributes.items():
                claimed.trial.set_user_attr(key, value)
            self._tell(claimed.trial, values, state)
        self.release(claimed)

    def _tell(self, trial: "Trial", values: list[float] | None, state: str | None) -> None:
        from optuna.trial import TrialState

        try:
            self.study.tell(trial, None if state else values, state=TrialState[state] if state else None)
        except RuntimeError as e:
            if "Study.stop" not in str(e):  # the sampler of grids has none left; `take` counts them itself
                raise
        except ValueError as e:
            if "Cannot tell" in str(e):
                raise Lost from e
            raise


def counts(trial: "FrozenTrial") -> bool:
    """Whether a trial is one of those that were asked for; a dead one is, if it is not tried again."""
    return SAME not in trial.user_attrs and (trial.state.name != "FAIL" or FINAL in trial.user_attrs)
