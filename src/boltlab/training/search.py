"""The finders of `boltlab train`: `optimizer.lr=auto` and `data.batch_size=auto` become numbers before the run starts.

Nothing of a search goes into the run: model and data are built again, so it equals a run that was given the numbers.
"""

import math
import time
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from boltlab.config.check import SEARCHED
from boltlab.ground.errors import UserError

SMALLEST_BATCH = 16
# Of the memory that is free before the search.
MEMORY_SHARE = {"cpu": 0.5, "cuda": 0.9, "mps": 0.7}
# A larger batch is taken where it makes more than this many times the samples a second.
WORTH_DOUBLING = 1.1
SECONDS_PER_SIZE = 0.3
LR_RANGE = (1e-6, 10.0)
LR_STEPS = 100
EXPLODED = 3.0  # times the first loss
FALLEN = 0.99  # of the first loss: less of a fall is none


def search(config: DictConfig) -> dict[str, float]:
    """Finds what stands at "auto", writes it into the config, prints a line each and returns it.

    The batch size comes first: the learning rate depends on it.

    Raises:
        UserError: there is no answer; the message says what to give instead.
    """
    found: dict[str, float] = {}
    for key, find in (("data.batch_size", batch_size), ("optimizer.lr", lr)):
        if OmegaConf.select(config, key) == "auto":
            begin = time.perf_counter()
            found[key], why = find(config)
            OmegaConf.update(config, key, found[key])
            print(f"{key}={found[key]}  found in {time.perf_counter() - begin:.1f} s: {why}", flush=True)
    return found


def batch_size(config: DictConfig) -> tuple[int, str]:
    """The smallest power of two that trains nearly as fast as any that fits into memory, and why it is that.

    From SMALLEST_BATCH on, sizes are doubled, each with some real steps, until that makes no more samples a second: a
    larger batch would only cost memory and steps. Where doubling continues to pay, memory ends it: on a GPU the real
    one, of which a share stays free, and on the CPU, which has no such error but a kernel that kills, the bytes that
    the last size's forward pass kept, doubled. No batch is larger than the training split.

    Lightning's Tuner looks for the largest that fits, returns the first size that it did not try when it comes to its
    bound, and has no bound by memory on the CPU.

    Raises:
        UserError: not even the smallest fits.
    """
    from boltlab.training import probe

    trial = _trial(config)
    trial.data.batch_size = SMALLEST_BATCH
    rates: dict[int, float] = {}
    ends: list[str] = []

    def sizes(trainer: Any, model: Any, loader: Any) -> Iterator[Any]:
        ends.append(_double(trainer, model, loader, rates))
        yield from ()

    probe.fit(trial, sizes)
    if not rates:
        raise UserError(f"data.batch_size=auto: {ends[0]}; give a number, beginning with {SMALLEST_BATCH // 2}")
    best = next(size for size in rates if WORTH_DOUBLING * rates[size] >= max(rates.values()))
    return best, f"{rates[best]:,.0f} samples/s; {ends[0]}"


def _double(trainer: Any, model: Any, loader: Any, rates: dict[int, float]) -> str:
    """Notes the samples per second of each size; returns why no larger one is tried."""
    from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error

    from boltlab.training import probe

    dataset: Any = getattr(loader, "dataset", None)
    samples = len(dataset) if hasattr(dataset, "__len__") else math.inf
    device = model.device
    share = MEMORY_SHARE.get(device.type, 0.5)
    budget = share * (probe.free_memory(device) or math.inf)
    batch = probe.to_device(trainer, next(probe.endless(loader)))
    step, in_vain, size = probe.Step(trainer, model), 0, SMALLEST_BATCH
    while size <= samples:
        try:
            seconds, needed = _try_size(step, batch, size)
        except RuntimeError as e:
            if not is_oom_error(e):
                raise
            garbage_collection_cuda()  # what torch had cached for it
            return f"{size} does not fit into memory"
        if needed > budget:
            return f"{size} takes {needed / 2**30:.3g} GiB, more than {share:.0%} of the free memory"
        before = max(rates.values(), default=0.0)
        rates[size] = size / seconds
        in_vain = 0 if rates[size] > WORTH_DOUBLING * before else in_vain + 1
        if in_vain == 2:
            return f"up to {size}, larger ones are hardly faster"
        size *= 2
        if device.type == "cpu" and 2 * needed > budget:
            return f"{size} may take more than {share:.0%} of the free memory"
    return f"the training split has {samples} samples"


def _try_size(step: Any, batch: Any, size: int) -> tuple[float, int]:
    """Seconds of a step with so many samples, and the bytes that it takes at its peak."""
    import torch

    from boltlab.callbacks.throughput import batch_samples
    from boltlab.training import probe
    from boltlab.training.plain import rows

    device, given = step.model.device, batch_samples(batch)
    larger = rows(batch, torch.arange(size, device=device) % given, given)
    probe.reset_peak_memory(device)
    seconds = min(step.seconds(larger, SECONDS_PER_SIZE / 3) for _ in range(3))
    peak = probe.peak_memory(device)
    if peak is None:
        peak = step.activation_bytes(larger) + step.state_bytes()["gradients"]
    return seconds, peak


def lr(config: DictConfig) -> tuple[float, str]:
    """A quarter of the learning rate at which the loss was lowest, to three digits, and how it was found.

    A range test (Smith 2015, arXiv:1506.01186): the rate rises by the same factor after each step until the loss
    explodes. All parameter groups get the same rate; what is found is the peak of a schedule.

    Lightning's Tuner suggests where the loss falls fastest by lr itself instead of by log lr, that is near the lowest
    rates: 4.8e-5 for SGD as for AdamW on the digits, where 0.03 and 0.007 are found here.

    Raises:
        UserError: no learning rate made the loss smaller.
    """
    from boltlab.training import probe

    lowest, highest = LR_RANGE
    tried: list[float] = []
    losses: list[float] = []

    def steps(trainer: Any, model: Any, loader: Any) -> Iterator[Any]:
        step = probe.Step(trainer, model)
        for i, batch in zip(range(LR_STEPS), probe.endless(loader), strict=False):
            rate = lowest * (highest / lowest) ** (i / (LR_STEPS - 1))
            for group in step.optimizer.param_groups:
                group["lr"] = rate
            loss = float(step(probe.to_device(trainer, batch)))
            if not math.isfinite(loss) or (losses and loss > EXPLODED * losses[0]):
                break
            tried.append(rate)
            losses.append(loss)
        yield from ()

    probe.fit(_trial(config), steps)
    smooth = smoothed(losses)
    best = min(range(len(smooth)), key=lambda i: smooth[i], default=0)
    if not smooth or smooth[best] > FALLEN * smooth[0]:
        raise UserError(
            f"optimizer.lr=auto: the loss did not fall in {len(losses)} steps from {lowest:g} to "
            f"{tried[-1] if tried else lowest:.3g}; give a number"
        )
    why = f"the loss fell from {smooth[0]:.3g} to {smooth[best]:.3g} at {tried[best]:.2g}, taken is a quarter"
    return float(f"{tried[best] / 4:.3g}"), why


def smoothed(losses: list[float]) -> list[float]:
    """Means over nine neighbours, fewer at the ends: centred, so that a minimum stays where it is."""
    windows = [losses[max(0, i - 4) : i + 5] for i in range(len(losses))]
    return [sum(window) / len(window) for window in windows]


def _trial(config: DictConfig) -> DictConfig:
    """A copy of the config for a search: not compiled (each size would be anew), no callbacks."""
    trial = OmegaConf.create(OmegaConf.to_container(config))
    assert isinstance(trial, DictConfig)
    trial.compile = False
    trial.callbacks = {}
    trial.logger = {}
    trial.trainer.accumulate_grad_batches = 1
    for key in SEARCHED:
        if OmegaConf.select(trial, key) == "auto":  # the one that is not searched yet
            OmegaConf.update(trial, key, LR_RANGE[0] if key == "optimizer.lr" else SMALLEST_BATCH)
    return trial
