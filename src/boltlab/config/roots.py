"""The root keys of each verb, with their types; groups are checked against the classes that they name."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

Precision = Literal["auto", "32", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64"]


@dataclass
class Train:
    """Root keys of `boltlab train`; the groups (data, model, …) are checked against the classes that they name."""

    seed: Annotated[int, Ge(0), Lt(2**32)]
    monitor: str  # the metric that chooses the best checkpoint, stops early and is returned to a sweep
    mode: Literal["auto", "min", "max"]
    test: bool
    precision: Precision | Literal[16, 32, 64]
    channels_last: bool | Literal["auto"]
    float32_matmul_precision: Literal["auto", "highest", "high", "medium"]
    compile: bool | Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
    timeout_seconds: Annotated[float, Gt(0)]
    max_restarts: Annotated[int, Ge(0)]
    init_from: str | None
    init_strict: bool
    name: str | None
    tags: list[str]
    project: str | None
    log_dir: str
    data_dir: str
    run_dir: str | None
    resume: str | None
    resume_changed: Literal["restart_epoch"] | None
    data_fingerprint: Literal["names", "contents", "none"]
    augment: dict | None
    data: dict
    optimizer: dict | None  # null where the model makes its own
    scheduler: dict | None
    loss: dict | None
    metrics: dict | None
    model: dict
    trainer: dict
    callbacks: dict | None
    logger: dict | None
    launcher: dict | None


@dataclass
class Bench(Train):
    """Root keys of `boltlab bench`: those of train, and its own."""

    seconds: Annotated[float, Gt(0)]
    output: str | None


@dataclass
class Sweep:
    """Root keys of `boltlab sweep`; any other key is one of its trainings'."""

    sweep: dict
    sampler: dict
    pruner: dict | None
    workers: Annotated[int, Ge(1)] | Literal["auto"]
    seeds: Annotated[int, Ge(1)]
    folds: Annotated[int, Ge(2)] | None
    storage: str | None
    name: str | None
    log_dir: str


@dataclass
class Eval:
    """Root keys of `boltlab eval`; any other key changes the config of the run that is evaluated."""

    run: str
    split: Literal["train", "val", "test"]
    checkpoint: Literal["best", "last"] | None
    log_dir: str
    run_dir: str | None
    callbacks: dict | None
    logger: dict | None


@dataclass
class Reproduce:
    """Root keys of `boltlab reproduce`; any other key changes the config of the run that is trained again."""

    run: str
    compare: str | None
    dry_run: bool
    anyway: bool
    digits: Annotated[int, Ge(1)] | None
    log_dir: str


@dataclass
class Predict:
    """Root keys of `boltlab predict`; any other key changes the config of the run that predicts."""

    run: str
    input: str | list[str] | None
    checkpoint: Literal["best", "last"] | None
    output: str | None
    format: Literal["csv", "json"]
    top_k: Annotated[int, Ge(1)]
    batch_size: Annotated[int, Ge(1)]
    device: str
    devices: Annotated[int, Ge(1)]
    log_dir: str


@dataclass
class Show:
    """Root keys of `boltlab show`."""

    augment: dict | None
    data: dict
    split: Literal["train", "val", "test"]
    count: int
    output: str
    seed: int
    data_dir: str


@dataclass
class Runs:
    """Root keys of `boltlab runs`; any other word is a filter, or an action and the runs that it is for."""

    log_dir: str
    verb: Literal["train", "eval"]
    sort: str | None
    columns: list[str] | None
    seeds: bool
    limit: Annotated[int, Ge(0)] | None
    format: Literal["table", "md", "csv", "json"]
    yes: bool


@dataclass
class Report:
    """Root keys of `boltlab report`; any other word is a filter of runs."""

    log_dir: str
    verb: Literal["train", "eval"]
    output: str
    limit: Annotated[int, Ge(1)]


@dataclass
class Sync:
    """Root keys of `boltlab sync`; the words before them are `runs`."""

    runs: list[str]
    dry_run: bool
    log_dir: str


@dataclass
class Checkpoint:
    """Root keys of `boltlab checkpoint`; the words before them are an action and what `run` means."""

    run: str | None
    checkpoint: Literal["best", "last"] | None
    output: str | None
    trust: bool
    log_dir: str


@dataclass
class Doctor:
    """Root keys of `boltlab doctor`."""

    augment: dict | None
    data: dict | None
    log_dir: str
    data_dir: str
    seed: int


ROOTS: dict[str, Any] = {
    "train": Train,
    "sweep": Sweep,
    "eval": Eval,
    "reproduce": Reproduce,
    "predict": Predict,
    "show": Show,
    "runs": Runs,
    "report": Report,
    "sync": Sync,
    "checkpoint": Checkpoint,
    "doctor": Doctor,
    "bench": Bench,
}
COMPOSED = ("train", "sweep", "show", "bench", "doctor")  # verbs that compose a new config
