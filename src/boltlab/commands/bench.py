"""`boltlab bench`: what limits a training configuration on this machine, and what another setting would give.

Four speeds tell it apart: that of the loader alone, of the bare step on one batch, of the training loop on that batch,
and of the whole. What stands between the bare step and the loop is the loop's own work, what stands between the loop
and the whole is the data's. Settings that could help are tried; only measured factors are printed.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from boltlab.config.compose import compose
from boltlab.config.devices import process_count
from boltlab.config.edit import edit
from boltlab.ground.errors import ConfigError, Mistake, UserError

MAX_TRIES = 3
# A part below this share of a step's time is not worth a try, and a factor below that one is not worth a change.
WORTH_A_TRY = 0.15
WORTH_A_CHANGE = 1.1
# A step that makes less of the most FLOP/s that were measured waits for memory or for many small operations.
BOUND_BY_ARITHMETIC = 0.3
ROUNDS = 3
UNSTEADY = 1.2
PATIENCE = 6  # times `seconds`: after that, the parts of slow nets get no further turn, and no further setting is tried


@dataclass
class Rate:
    """Samples per second, and the share of the time in which the data was waited for."""

    samples_per_second: float
    waiting: float = 0.0


@dataclass
class Figures:
    """What was measured; rates are samples per second, memory is in bytes, `flops` are those of a sample's step."""

    device: str
    batch_size: int
    workers: int
    loader: float
    step: float
    loop: float
    whole: float
    data_wait_share: float
    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak_memory: int | None
    free_memory: int | None
    flops: int | None
    peak_flops_per_second: float
    repeated: float | None = None  # `whole` once more, among the tries, as a factor on the first time
    tried: dict[str, float] = field(default_factory=dict)  # setting → factor on the better of both times

    def shares(self) -> dict[str, float]:
        """Parts of a step's time that go to the bare step, to the loop and to the data; together 1."""
        data = max(0.0, 1 - self.whole / self.loop)
        if not self.workers:  # then all that data costs is waited for; the rest of the difference is chance
            data = min(data, self.data_wait_share)
        step = (1 - data) * min(1.0, self.loop / self.step)
        return {"step": step, "loop": 1 - data - step, "data": data}

    def flops_share(self) -> float | None:
        """FLOP/s of the whole training as a part of the most that was measured here."""
        if not self.flops or not self.peak_flops_per_second:
            return None
        return self.flops * self.whole / self.peak_flops_per_second

    def best_change(self) -> str | None:
        best = max(self.tried, key=lambda setting: self.tried[setting], default=None)
        return best if best is not None and self.tried[best] >= WORTH_A_CHANGE else None


def main(overrides: list[str]) -> int:
    """Measures, prints and writes the figures to `output`."""
    composed = compose("bench", overrides)
    config = composed.config
    if process_count(config) > 1:
        what = "makes several processes, and one is measured: take trainer.devices=1"
        raise ConfigError([Mistake(f"trainer.devices={config.trainer.devices}", what)])
    seconds, output = config.pop("seconds"), config.pop("output")
    figures = measure(config, seconds)
    precision = f"precision {config.precision}{', compiled' * bool(config.compile)}"
    print(f"\n{composed.choices.get('data')}, {composed.choices.get('model')} on {figures.device}, {precision}\n")
    show(figures)
    if output is not None:
        content = {**asdict(figures), "shares": figures.shares(), "flops_share": figures.flops_share()}
        try:
            Path(output).write_text(json.dumps(content, indent=1), encoding="utf-8")
        except OSError as e:
            raise UserError(f"cannot write output={output}: {e.strerror}") from e
    return 0


# ---------------------------------------------------------------- measuring


def measure(config: DictConfig, seconds: float) -> Figures:
    """All figures of a train config, each part over about that many seconds, and what other settings make of it."""
    from boltlab.callbacks.throughput import batch_samples
    from boltlab.training import probe
    from boltlab.training.plain import describe

    found: list[Figures] = []
    hints: dict[str, Any] = {}

    def parts(trainer: Any, model: Any, loader: Any) -> Iterator[Any]:
        stream, ahead, begin = probe.endless(loader), _batches_ahead(loader), time.perf_counter()
        batch = probe.to_device(trainer, next(stream))
        size = batch_samples(batch)
        if not size:
            raise UserError(f"a batch holds {describe(batch)}: how many samples that are cannot be told")
        step = probe.Step(trainer, model)
        activations = step.activation_bytes(batch)
        probe.reset_peak_memory(model.device)
        turns: list[dict[str, Rate]] = []
        peaks: list[float] = []
        # The parts take turns, and the best of each counts: what else the machine does comes and goes.
        for _ in range(ROUNDS):
            chunk = seconds / ROUNDS
            turns.append(
                {
                    "loader": _drain(trainer, stream, ahead, chunk),
                    "step": Rate(size / step.seconds(batch, chunk)),
                    "loop": (yield from _timed(model, itertools.repeat(batch), 0, chunk)),
                    "whole": (yield from _timed(model, stream, ahead, chunk)),
                }
            )
            peaks.append(_peak_flops(model.device, str(config.precision)))
            if time.perf_counter() - begin > PATIENCE * seconds:
                break
        best = {
            part: max((turn[part] for turn in turns), key=lambda rate: rate.samples_per_second) for part in turns[0]
        }
        hints.update(
            samples=len(loader) * batch_samples(batch) if hasattr(loader, "__len__") else 0,
            in_memory=getattr(loader.dataset, "whole", False),
            image="channels_last" in config.model and batch[0].ndim == 4,
        )
        found.append(
            Figures(
                device=_device_name(model.device),
                batch_size=size,
                workers=getattr(loader, "num_workers", 0),
                loader=best["loader"].samples_per_second,
                step=best["step"].samples_per_second,
                loop=best["loop"].samples_per_second,
                whole=best["whole"].samples_per_second,
                data_wait_share=best["whole"].waiting,
                weights=step.weight_bytes(),
                gradients=step.gradient_bytes(),
                optimizer=step.optimizer_bytes(),
                activations=activations,
                peak_memory=probe.peak_memory(model.device),
                free_memory=probe.free_memory(model.device),
                flops=_flops(step, batch, size),
                peak_flops_per_second=max(peaks),
            )
        )

    probe.fit(config, parts)
    (figures,) = found
    rates: dict[str, float] = {}
    begin = time.perf_counter()
    for setting in candidates(config, figures, **hints):
        try:
            changed = edit(config, setting.split())
        except ConfigError:  # this data or model has no such choice
            continue
        if time.perf_counter() - begin > PATIENCE * seconds:
            break
        rates[setting] = whole(changed, seconds)
        if figures.repeated is None:
            figures.repeated = whole(config, seconds) / figures.whole
    # A factor that another load on the machine makes is none: the better of the two times is what counts.
    reference = figures.whole * max(1.0, figures.repeated or 0.0)
    figures.tried = {setting: rate / reference for setting, rate in rates.items()}
    return figures


def whole(config: DictConfig, seconds: float) -> float:
    """Samples per second of a training with its loader, the better of two times."""
    from boltlab.training import probe

    rates: list[float] = []

    def parts(trainer: Any, model: Any, loader: Any) -> Iterator[Any]:
        stream, ahead, begin = probe.endless(loader), _batches_ahead(loader), time.perf_counter()
        while len(rates) < 2 and time.perf_counter() - begin < 2 * seconds:
            rate = yield from _timed(model, stream, ahead, seconds / 2)
            rates.append(rate.samples_per_second)

    probe.fit(config, parts)
    return max(rates)


def _drain(trainer: Any, stream: Iterator[Any], ahead: int, seconds: float) -> Rate:
    """The loader alone, its batches on the device and normalized."""
    from boltlab.callbacks.throughput import batch_samples
    from boltlab.training import probe

    device = trainer.strategy.root_device
    start, samples = 0.0, 0
    for count in itertools.count():
        if count == ahead + 1:
            probe.synchronize(device)
            start, samples = time.perf_counter(), 0
        samples += batch_samples(probe.to_device(trainer, next(stream)))
        if start and count > 2 * ahead and time.perf_counter() - start >= seconds:
            break
    probe.synchronize(device)
    return Rate(samples / (time.perf_counter() - start))


def _timed(model: Any, batches: Iterator[Any], ahead: int, seconds: float) -> Generator[Any, None, Rate]:
    """Has the batches trained on, and times that.

    The first ones do not count: `ahead` of them may be there already, kernels are loaded and nets compiled. Where steps
    are slow, fewer are left out: the loader is not what such a step waits for.
    """
    from boltlab.callbacks.throughput import batch_samples
    from boltlab.training.probe import synchronize

    patience = 2 * seconds + 1
    begin, start, samples, waited, counted = time.perf_counter(), 0.0, 0, 0.0, 0
    for count in itertools.count():
        now = time.perf_counter()
        if not start and count and (count >= ahead + 3 or now - begin > patience):
            synchronize(model.device)
            start, samples, waited, counted = time.perf_counter(), 0, 0.0, count
        elif start and now - start >= seconds and (count > counted + ahead or now - start > patience):
            break
        asked = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - asked
        samples += batch_samples(batch)
        yield batch
    synchronize(model.device)
    took = time.perf_counter() - start
    return Rate(samples / took, waited / took)


def _batches_ahead(loader: Any) -> int:
    """How many batches are made in advance at most: those are there at once after a pause."""
    return 3 * getattr(loader, "num_workers", 0)


def _device_name(device: Any) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else str(device.type)


def _flops(step: Any, batch: Any, size: int) -> int | None:
    """FLOPs of training on one sample; the backward pass of a Task's net takes twice those of the forward pass."""
    from boltlab.callbacks.summary import summarize
    from boltlab.models.task import Task

    if not isinstance(step.model, Task):
        return step.flops(batch) // size or None
    forward = summarize(step.model.net, tuple(batch[0].shape[1:]))[0].flops
    return 3 * forward if forward else None


def _peak_flops(device: Any, precision: str) -> float:
    """FLOP/s of a large matrix product or convolution, whichever is faster, in the number format of `precision`.

    Both, because one can be far from what the machine does: on AMD processors MKL's product makes a third of oneDNN's
    convolution.
    """
    import torch

    from boltlab.commands.doctor import matmul
    from boltlab.training.probe import synchronize

    bits, _, _ = precision.partition("-")
    dtype = {"bf16": torch.bfloat16, "16": torch.float16, "64": torch.float64}.get(bits, torch.float32)
    tf32 = device.type == "cuda" and torch.get_float32_matmul_precision() != "highest"
    size, images = (1024, 8) if device.type == "cpu" else (8192, 1024)
    fastest = 0.0
    with contextlib.suppress(RuntimeError):  # no such product on this device
        fastest = 1e12 * matmul(device, dtype, size, tf32)[0]
    with contextlib.suppress(RuntimeError), torch.no_grad():
        layout: Any = {"device": device, "dtype": dtype, "memory_format": torch.channels_last}
        x, weight = torch.randn(images, 256, 16, 16).to(**layout), torch.randn(256, 256, 3, 3).to(**layout)
        for _ in range(4):
            synchronize(device)
            start = time.perf_counter()
            torch.conv2d(x, weight, padding=1)
            synchronize(device)
            fastest = max(fastest, 2 * images * 16 * 16 * 256 * 256 * 9 / (time.perf_counter() - start))
    return fastest


# ---------------------------------------------------------------- judging


def candidates(config: DictConfig, figures: Figures, samples: int, in_memory: bool, image: bool) -> list[str]:
    """Settings that could make the largest parts of a step's time smaller, as overrides; the likeliest first."""
    if config.compile:
        return []  # each would have to be compiled first
    from boltlab.data.loader import available_cores

    data = config.data
    larger = 2 * (data.get("batch_size") or figures.batch_size)
    bigger_batch = [f"data.batch_size={larger}"] if larger <= samples and "batch_size" in data else []
    settings: dict[str, list[str]] = {"data": [], "loop": [], "step": []}
    if not in_memory:
        if "cache" in data and data.cache != "memory" and samples / figures.loader < 10:  # seconds to fill it
            settings["data"].append("data.cache=memory")
        if "cache" in data and data.decode != "fastest":  # of files
            settings["data"].append("data.decode=fastest")
        if "num_workers" in data:
            settings["data"].append(f"data.num_workers={0 if figures.workers else available_cores()}")
    settings["loop"] += bigger_batch
    if str(config.precision) == "32":
        layout = " channels_last=true" * (image and config.channels_last is not True)
        settings["step"].append(f"precision=bf16-mixed{layout}")
    settings["step"] += bigger_batch
    shares = figures.shares()
    parts = sorted((part for part in shares if shares[part] >= WORTH_A_TRY), key=lambda part: -shares[part])
    return list(dict.fromkeys(setting for part in parts for setting in settings[part]))[:MAX_TRIES]


def verdict(figures: Figures) -> str:
    """What limits: the largest part of a step's time."""
    shares = figures.shares()
    part = max(shares, key=lambda part: shares[part])
    if part == "data":
        if figures.data_wait_share < shares["data"] / 2:
            return "the data: the loader's work takes the processor from the step"
        return "the data: the step waits for the loader"
    if part == "loop":
        return "the Python of the loop around the step: metrics, callbacks, logging"
    used = figures.flops_share()
    if used is None:
        return "the step itself; its FLOPs are not known"
    if used >= BOUND_BY_ARITHMETIC:
        return f"arithmetic: {used:.0%} of the FLOP/s of a large convolution or matrix product"
    return f"memory traffic or many small operations: {used:.1%} of the FLOP/s of a large convolution"


def show(figures: Figures) -> None:
    """Prints the figures, the verdict and what the tries gave."""
    from rich.console import Console
    from rich.table import Table

    from boltlab.callbacks.summary import human

    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("samples/s", justify="right")
    table.add_column(f"ms a batch of {figures.batch_size}", justify="right")
    table.add_column("")
    rows = {
        "loader alone": (figures.loader, "on the device, normalized"),
        "step alone": (figures.step, "forward, loss, backward, optimizer"),
        "with the loop": (figures.loop, "metrics, callbacks, logging; on one batch"),
        "with the loader": (figures.whole, f"waits for data {figures.data_wait_share:.1%} of the time"),
    }
    for name, (rate, note) in rows.items():
        table.add_row(name, f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}", _ms(figures.batch_size / rate), note)
    console.print(table)
    shares = ", ".join(f"{part} {share:.0%}" for part, share in figures.shares().items())
    console.print(f"\ntime     {shares}")
    states = f"weights {_mib(figures.weights)}, gradients {_mib(figures.gradients)}"
    kept = f"{states}, optimizer {_mib(figures.optimizer)}, activations {_mib(figures.activations)}"
    peak = "" if figures.peak_memory is None else f"; peak {_mib(figures.peak_memory)}"
    free = "" if figures.free_memory is None else f"; free {_mib(figures.free_memory)}"
    console.print(f"memory   {kept}{peak}{free}")
    share = figures.flops_share()
    if share is not None and figures.flops and figures.peak_flops_per_second:
        made, most = human(figures.flops * figures.whole), human(figures.peak_flops_per_second)
        console.print(f"FLOP/s   {made} of {most}, the most that was measured: {share:.1%}")
    console.print(f"limit    {verdict(figures)}")
    for i, (setting, factor) in enumerate(figures.tried.items()):
        console.print(f"{'' if i else 'tried':<9}{setting}  {factor:.2f} times as fast")
    change = figures.best_change()
    if change is not None:
        console.print(f"change   {change}{_caution(change)}")
    if figures.repeated is not None and not 1 / UNSTEADY < figures.repeated < UNSTEADY:
        console.print(
            f"note     the unchanged setting made {figures.repeated:.2f} times its own speed when measured again"
        )
        console.print(f"{'':<9}something else keeps this machine busy: try again, or with a larger seconds=…")
    if change is None and figures.tried:
        console.print("change   nothing: no setting that was tried makes it faster here")


def _caution(setting: str) -> str:
    """What else the setting changes."""
    if setting.startswith("data.batch_size"):
        return "  (fewer steps an epoch: look for the learning rate again)"
    if setting.startswith("precision"):
        return "  (bfloat16 rounds: compare the metric)"
    if setting.startswith("data.decode"):
        return "  (slightly other pixels: compare the metric)"
    return ""


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.3g}" if seconds < 1 else f"{1000 * seconds:,.0f}"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.3g} MiB" if count < 1000 * 2**20 else f"{count / 2**30:,.3g} GiB"
