"""`boltlab bench`: what limits a training configuration on this machine, and what another setting would give."""

import json
from dataclasses import asdict
from pathlib import Path

from boltlab.config.compose import compose
from boltlab.config.devices import process_count
from boltlab.ground.errors import ConfigError, Mistake, UserError
from boltlab.ground.texts import print_table
from boltlab.training.speed import Figures, measure

# A step that makes less of the most FLOP/s that were measured waits for memory or for many small operations.
BOUND_BY_ARITHMETIC = 0.3
UNSTEADY = 1.2


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
    _show_rates(figures)
    shares = ", ".join(f"{part} {share:.0%}" for part, share in figures.shares().items())
    lines = [f"\ntime     {shares}", _memory(figures), *_arithmetic(figures), f"limit    {verdict(figures)}"]
    for i, (setting, factor) in enumerate(figures.tried.items()):
        lines.append(f"{'' if i else 'tried':<9}{setting}  {factor:.2f} times as fast")
    change = figures.best_change()
    if change is not None:
        lines.append(f"change   {change}{_caution(change)}")
    if figures.repeated is not None and not 1 / UNSTEADY < figures.repeated < UNSTEADY:
        again = f"{figures.repeated:.2f}"
        lines.append(f"note     the unchanged setting made {again} times its own speed when measured again")
        lines.append(f"{'':<9}something else keeps this machine busy: try again, or with a larger seconds=…")
    if change is None and figures.tried:
        lines.append("change   nothing: no setting that was tried makes it faster here")
    print("\n".join(lines))


def _show_rates(figures: Figures) -> None:
    from rich.table import Column

    right = [Column(title, justify="right") for title in ("samples/s", f"ms a batch of {figures.batch_size}")]
    rates = (
        ("loader alone", figures.loader, "on the device, normalized"),
        ("step alone", figures.step, "forward, loss, backward, optimizer"),
        ("with the loop", figures.loop, "metrics, callbacks, logging; on one batch"),
        ("with the loader", figures.whole, f"waits for data {figures.data_wait_share:.1%} of the time"),
    )
    rows = [
        (name, f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}", _ms(figures.batch_size / rate), note)
        for name, rate, note in rates
    ]
    print_table(("", *right, ""), rows, pad_edge=False)


def _memory(figures: Figures) -> str:
    states = f"weights {_mib(figures.weights)}, gradients {_mib(figures.gradients)}"
    kept = f"{states}, optimizer {_mib(figures.optimizer)}, activations {_mib(figures.activations)}"
    peak = "" if figures.peak_memory is None else f"; peak {_mib(figures.peak_memory)}"
    free = "" if figures.free_memory is None else f"; free {_mib(figures.free_memory)}"
    return f"memory   {kept}{peak}{free}"


def _arithmetic(figures: Figures) -> list[str]:
    from boltlab.callbacks.summary import human

    if (share := figures.flops_share()) is None or figures.flops is None:
        return []
    made, most = human(figures.flops * figures.whole), human(figures.peak_flops_per_second)
    return [f"FLOP/s   {made} of {most}, the most that was measured: {share:.1%}"]


_CAUTIONS = {  # what else a setting changes
    "data.batch_size": "  (fewer steps an epoch: look for the learning rate again)",
    "precision": "  (bfloat16 rounds: compare the metric)",
    "data.decode": "  (slightly other pixels: compare the metric)",
}


def _caution(setting: str) -> str:
    return next((text for key, text in _CAUTIONS.items() if setting.startswith(key)), "")


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.3g}" if seconds < 1 else f"{1000 * seconds:,.0f}"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.3g} MiB" if count < 1000 * 2**20 else f"{count / 2**30:,.3g} GiB"
