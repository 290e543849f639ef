"""How fast a training is here: its loader, its bare step, the loop and the whole; and settings that may make it faster.

Four speeds tell apart what limits it: that of the loader alone, of the bare step on one batch, of the training loop on
that batch, and of the whole. The loop's own work stands between the bare step and the loop, that of the data between
the loop and the whole.
"""

import itertools
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from omegaconf import DictConfig

from boltlab.config.edit import edit
from boltlab.ground.errors import ConfigError, UserError

MAX_TRIES = 3
# A part below this share of a step's time is not worth a try, and a factor below that one is not worth a change.
WORTH_A_TRY = 0.15
WORTH_A_CHANGE = 1.1
ROUNDS = 3
PATIENCE = 6  # times `seconds`: after that, the parts of slow nets get no further turn, and no further setting is tried


class Rate(NamedTuple):
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


def measure(config: DictConfig, seconds: float) -> Figures:
    """All figures of a train config, each part over about that many seconds, and what other settings make of it."""
    from torch.utils._pytree import tree_leaves

    from boltlab.callbacks.throughput import batch_samples
    from boltlab.training import probe
    from boltlab.training.flops import peak_flops
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
                    "loader": _drained(_timed(model, (probe.to_device(trainer, b) for b in stream), ahead, chunk)),
                    "step": Rate(size / step.seconds(batch, chunk)),
                    "loop": (yield from _timed(model, itertools.repeat(batch), 0, chunk)),
                    "whole": (yield from _timed(model, stream, ahead, chunk)),
                }
            )
            peaks.append(peak_flops(model.device, str(config.precision)))
            if time.perf_counter() - begin > PATIENCE * seconds:
                break
        best = {part: max(turn[part] for turn in turns) for part in turns[0]}
        measured: dict[str, Any] = {part: rate.samples_per_second for part, rate in best.items()}
        measured |= step.state_bytes()
        hints.update(
            samples=len(loader) * batch_samples(batch) if hasattr(loader, "__len__") else 0,
            in_memory=getattr(loader.dataset, "whole", False),
            image=any(getattr(leaf, "ndim", 0) == 4 for leaf in tree_leaves(batch)),
        )
        found.append(
            Figures(
                device=_device_name(model.device),
                batch_size=size,
                workers=getattr(loader, "num_workers", 0),
                **measured,
                data_wait_share=best["whole"].waiting,
                activations=activations,
                peak_memory=probe.peak_memory(model.device),
                free_memory=probe.free_memory(model.device),
                flops=step.flops(batch) // size or None,
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


def _drained(timed: Generator[Any, None, Rate]) -> Rate:
    """Times batches without training on them."""
    while True:
        try:
            next(timed)
        except StopIteration as e:
            return e.value


def _timed(model: Any, batches: Iterator[Any], ahead: int, seconds: float) -> Generator[Any, None, Rate]:
    """Has the batches trained on, and times that.

    The first ones do not count: `ahead` of them may be there already, kernels are loaded and nets compiled. Where steps
    are slow, fewer are left out: the loader is not what such a step waits for.
    """
    from boltlab.callbacks.throughput import batch_samples
    from boltlab.training.flops import synchronize

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


def candidates(config: DictConfig, figures: Figures, samples: int, in_memory: bool, image: bool) -> list[str]:
    """Settings that could make the largest parts of a step's time smaller, as overrides; the likeliest first."""
    if config.compile:
        return []  # each would have to be compiled first
    larger = 2 * (config.data.get("batch_size") or figures.batch_size)
    bigger_batch = [f"data.batch_size={larger}"] if larger <= samples and "batch_size" in config.data else []
    layout = " channels_last=true" * (image and config.channels_last is not True)
    settings = {
        "data": [] if in_memory else _of_loader(config.data, figures, samples),
        "loop": bigger_batch,
        "step": [f"precision=bf16-mixed{layout}"] * (str(config.precision) == "32") + bigger_batch,
    }
    shares = figures.shares()
    parts = sorted((part for part in shares if shares[part] >= WORTH_A_TRY), key=lambda part: -shares[part])
    return list(dict.fromkeys(setting for part in parts for setting in settings[part]))[:MAX_TRIES]


def _of_loader(data: DictConfig, figures: Figures, samples: int) -> list[str]:
    """Settings of data that are not in memory already."""
    from boltlab.data.loader import available_cores

    found = []
    if "cache" in data:  # of files
        seconds_to_fill = samples / figures.loader
        found += ["data.cache=memory"] * (data.cache != "memory" and seconds_to_fill < 10)
        found += ["data.decode=fastest"] * (data.decode != "fastest")
    if "num_workers" in data:
        found.append(f"data.num_workers={0 if figures.workers else available_cores()}")
    return found
