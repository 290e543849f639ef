"""The root keys of each verb, with their types; groups are checked against the classes that they name.

Of eval, predict and reproduce, any other key changes the config of the run; of sweep, it is one of its trainings'. Of
runs and report, any other word is a filter; of checkpoint and sync, the words before the keys are `run` and `runs`.
"""

from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Gt, Lt

Precision = Literal["auto", "32", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64"]


class Train:
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


class Bench(Train):
    seconds: Annotated[float, Gt(0)]
    output: str | None


class Sweep:
    sweep: dict
    sampler: dict
    pruner: dict | None
    workers: Annotated[int, Ge(1)] | Literal["auto"]
    seeds: Annotated[int, Ge(1)]
    folds: Annotated[int, Ge(2)] | None
    storage: str | None
    rebuild: bool
    name: str | None
    log_dir: str


class Eval:
    run: str
    split: Literal["train", "val", "test"]
    checkpoint: Literal["best", "last"] | None
    log_dir: str
    run_dir: str | None
    callbacks: dict | None
    logger: dict | None


class Reproduce:
    run: str
    compare: str | None
    dry_run: bool
    anyway: bool
    digits: Annotated[int, Ge(1)] | None
    log_dir: str


class Predict:
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


class Show:
    augment: dict | None
    data: dict
    split: Literal["train", "val", "test"]
    count: int
    output: str
    seed: int
    data_dir: str


class Runs:
    log_dir: str
    verb: Literal["train", "eval"]
    sort: str | None
    columns: list[str] | None
    seeds: bool
    limit: Annotated[int, Ge(0)] | None
    format: Literal["table", "md", "csv", "json"]
    yes: bool


class Report:
    log_dir: str
    verb: Literal["train", "eval"]
    output: str
    limit: Annotated[int, Ge(1)]


class Sync:
    runs: list[str]
    dry_run: bool
    log_dir: str


class Checkpoint:
    run: str | None
    checkpoint: Literal["best", "last"] | None
    output: str | None
    trust: bool
    log_dir: str


class Doctor:
    augment: dict | None
    data: dict | None
    log_dir: str
    data_dir: str
    seed: int


_VERBS = (Train, Sweep, Eval, Reproduce, Predict, Show, Runs, Report, Sync, Checkpoint, Doctor, Bench)
# Verb → root key → its annotation.
ROOTS: dict[str, dict[str, Any]] = {verb.__name__.lower(): get_type_hints(verb, include_extras=True) for verb in _VERBS}
COMPOSED = ("train", "sweep", "show", "bench", "doctor")  # verbs that compose a new config
