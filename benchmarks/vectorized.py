"""Many small nets trained at once, stacked, against one after another: `python benchmarks/vectorized.py DATA_DIR`.

Ours is `sweep.engine=vectorized`, the peer `boltlab train`, run after run in this process: the same runs, which differ
in learning rate, weight decay, momentum and seed, with a validation each epoch. On a GPU where there is one. With
--sweeps N, whole commands too: `boltlab sweep` with either engine, the peer with N workers.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import loop as single
import torch
from common import Row, in_turns, machine, show

from boltlab import runs
from boltlab.checkpoints import file as checkpoint_file
from boltlab.config.compose import Composed, compose
from boltlab.ground.malloc import keep_freed_memory
from boltlab.sweeps.stack import Stack
from boltlab.training import start as train

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODELS = 32


def trials(overrides: list[str], count: int, own_seeds: bool) -> list[Composed]:
    found = []
    for i in range(count):
        own = [f"optimizer.lr={0.003 * 1.08**i:.5f}", f"optimizer.weight_decay={1e-5 * i:g}"]
        own += [f"optimizer.momentum={0.8 + 0.15 * i / count:.4f}", f"seed={i if own_seeds else 0}"]
        found.append(compose("train", ["logger=csv", "test=false", *overrides, *own]))
    return found


def separate(composed: list[Composed], log_dir: Path) -> list[Path]:
    folders = [runs.new_folder(log_dir, "train", "one") for _ in composed]
    with single.silence():
        for one, folder in zip(composed, folders, strict=True):
            train.run(one, folder)
    return folders


def stacked(composed: list[Composed], log_dir: Path) -> Stack:
    stack = Stack([one.config for one in composed], DEVICE)
    stack.load()
    for epoch in range(stack.epochs):
        stack.train_epoch(epoch, lambda: None)
        stack.evaluate("val")
    for place in range(len(stack)):
        checkpoint_file.write({"state_dict": stack.state_dict(place)}, log_dir / f"{place}.ckpt")
    return stack


def exactness(overrides: list[str], own_seeds: bool) -> str:
    """Largest difference of a weight of four nets after an epoch, over the largest weight of its tensor."""
    composed, worst = trials([*overrides, "trainer.max_epochs=1"], 4, own_seeds), 0.0
    with tempfile.TemporaryDirectory() as name:
        stack = stacked(composed, Path(name))
        for place, folder in enumerate(separate(composed, Path(name))):
            theirs = checkpoint_file.read(folder / "checkpoints/last.ckpt")["state_dict"]
            ours = stack.state_dict(place)
            for key in (key for key in theirs if key.startswith("net.")):
                worst = max(worst, float((ours[key] - theirs[key]).abs().max() / theirs[key].abs().max()))
    return f"{worst:.1e}"


def timed(run: Any, composed: list[Composed], factor: float = 1.0) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        run(composed, Path(folder))
        return (time.perf_counter() - start) * factor


def whole_runs(name: str, overrides: list[str], options: argparse.Namespace) -> None:
    rows = []
    for seeds, own_seeds in {"one seed": False, "own seeds": True}.items():
        composed = trials([*overrides, f"trainer.max_epochs={options.epochs}"], MODELS, own_seeds)
        alone = composed[:: MODELS // options.alone]
        timed(separate, alone[:1])  # a warm-up
        cases = {"stacked": partial(timed, stacked, composed)}
        cases["separate"] = partial(timed, separate, alone, MODELS / len(alone))
        times = in_turns(cases, options.rounds)
        rows.append(Row(f"{seeds}, stacked / one after another", *times.values(), "at most 0.20"))
    show(f"{name}: {MODELS} runs of {options.epochs} epochs", "s", rows)


def sweeps(overrides: list[str], options: argparse.Namespace) -> None:
    def sweep(*own: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            space = ["optimizer.lr=tag(log,interval(1e-3,1e-1))", "sampler=random", "pruner=none"]
            shared = [*overrides, f"trainer.max_epochs={options.epochs}", "logger=csv", f"log_dir={folder}"]
            command = [sys.executable, "-m", "boltlab", "sweep", *shared, *space, f"sweep.trials={MODELS}", *own]
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            return time.perf_counter() - start

    others = partial(sweep, f"workers={options.sweeps}")
    times = in_turns({"ours": partial(sweep, "sweep.engine=vectorized"), "peer": others}, 1)
    row = Row(f"vectorized / optuna, {options.sweeps} workers", *times.values())
    show(f"boltlab sweep: {MODELS} trials of {options.epochs} epochs", "s", [row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data_dir")
    for name, default in {"rounds": 3, "epochs": 2, "threads": 1, "alone": 4, "sweeps": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    print(f"{machine('torch')}, {device}, {options.threads} threads, {options.rounds} rounds")
    mnist = ["experiment=mnist_mlp", f"data_dir={options.data_dir}", "precision=32"]
    for precision in ("64", "32"):
        exact = [*mnist, f"precision={precision}", "float32_matmul_precision=highest"]
        found = [exactness(exact, own_seeds) for own_seeds in (False, True)]
        print(f"differences, float{precision}: one seed {found[0]}, own seeds {found[1]}", flush=True)
    whole_runs("MNIST, 784-128-10", mnist, options)
    if options.sweeps:
        sweeps(mnist, options)


if __name__ == "__main__":
    main()
