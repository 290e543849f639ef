"""The start: CPU seconds of what answers without training, and the time to the first optimizer step on digits.

    python benchmarks/start.py                                     # rounds=7: seven rounds
    python benchmarks/start.py rounds=7 leader=PATH leader_python=PATH/TO/python

The peer of the first step is a bare script that imports torch and Lightning, loads the same digits and trains a LeNet
with `pl.Trainer`, no logger and no checkpoints; both processes end when the first optimizer step has ended. The peer of
`--help` is that of the leader among templates, where a folder of it is given. All are measured in turns, each as a
process of its own, with compiled bytecode and everything in the file cache (one round goes before). CPU seconds are
user and system time, those of child processes included.
"""

import importlib.abc
import importlib.util
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

BARE = """
import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import DataLoader, TensorDataset

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 5, padding=2), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 5), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(800, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
        )

    def training_step(self, batch, index):
        images, labels = batch
        loss = cross_entropy(self.net(images), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.003)

pl.seed_everything(0)
digits = load_digits()
images = interpolate(torch.from_numpy(digits.images).float()[:, None] / 16, size=(28, 28), mode="bicubic")
data = TensorDataset(images[:1293], torch.from_numpy(digits.target)[:1293])
trainer = pl.Trainer(max_epochs=30, logger=False, enable_checkpointing=False)
trainer.fit(Net(), DataLoader(data, batch_size=64, shuffle=True))
"""


# ---------------------------------------------------------------- the measured process


class AtFirstStep(importlib.abc.MetaPathFinder):
    """Calls `action` at the end of the process's first optimizer step; imports nothing before its time."""

    def __init__(self, action: Callable[..., None]):
        self.action = action
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torch.optim.optimizer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def load_and_hook(module: ModuleType) -> None:
            load(module)
            module.register_optimizer_step_post_hook(self.action)

        spec.loader.exec_module = load_and_hook  # type: ignore[method-assign]
        return spec


def end(*_: Any) -> None:
    """Writes the times so far to the file that FIRST_STEP_FILE names, and ends the process."""
    wall, own = time.time(), resource.getrusage(resource.RUSAGE_SELF)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:  # what children have begun before the step counts until their end
        try:
            if os.waitpid(-1, os.WNOHANG) == (0, 0):
                time.sleep(0.01)
        except ChildProcessError:
            break
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(usage.ru_utime + usage.ru_stime for usage in (own, children))
    Path(os.environ["FIRST_STEP_FILE"]).write_text(json.dumps({"ended": wall, "cpu": cpu}), encoding="utf-8")
    os._exit(0)


def to_first_step(script: list[str]) -> None:
    """Runs a script, or boltlab's command line, up to the first optimizer step."""
    AtFirstStep(end)
    sys.argv = script
    if script[0] == "boltlab":
        from boltlab.__main__ import main

        main()
    else:
        runpy.run_path(script[0], run_name="__main__")


# ---------------------------------------------------------------- the measuring process


def process(command: list[str], folder: str, **environment: str) -> tuple[float, float]:
    """CPU and wall seconds of a process."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    where = {**os.environ, "HOME": folder, **environment}
    subprocess.run(command, cwd=folder, env=where, capture_output=True, check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def first_step(script: list[str], folder: str) -> tuple[float, float]:
    """CPU and wall seconds from the start of a process to the end of its first optimizer step."""
    written = Path(folder) / "first_step.json"
    written.unlink(missing_ok=True)
    began = time.time()
    process([sys.executable, __file__, "--to-first-step", *script], folder, FIRST_STEP_FILE=str(written))
    found = json.loads(written.read_text(encoding="utf-8"))
    return found["cpu"], found["ended"] - began


def main(rounds: int = 7, leader: str | None = None, leader_python: str | None = None) -> None:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["BOLTLAB_PROJECT"] = str(Path(__file__).resolve().parents[1])
    python = [sys.executable, "-m", "boltlab"]
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "bare.py"
        bare.write_text(BARE, encoding="utf-8")
        cases: dict[str, Callable[[], tuple[float, float]]] = {
            "--help": lambda: process([*python, "--help"], folder),
            "train --help": lambda: process([*python, "train", "--help"], folder),
            "train --cfg job": lambda: process([*python, "train", "--cfg", "job"], folder),
            "completion of model=": lambda: process(
                [*python, "-sc", "query=bash"], folder, COMP_LINE="boltlab train model=", COMP_POINT="20"
            ),
            "a mistyped key": lambda: process([*python, "train", "model.net.dorp=0.1"], folder),
            "bare script": lambda: first_step([str(bare)], folder),
            "boltlab train": lambda: first_step(["boltlab", "train"], folder),
        }
        if leader:
            command = [leader_python or sys.executable, str(Path(leader).resolve() / "src" / "train.py"), "--help"]
            cases["leader --help"] = lambda: process(command, folder)
        for case in cases.values():
            case()
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
        for number in range(rounds):
            names = list(cases)[number % len(cases) :] + list(cases)[: number % len(cases)]
            for name in names:
                times[name].append(cases[name]())

    def cell(name: str, kind: int) -> str:
        values = [pair[kind] for pair in times[name]]
        return f"{statistics.median(values):.2f} ({min(values):.2f})"

    def ratio(ours: str, peer: str, kind: int) -> str:
        pairs = zip(times[ours], times[peer], strict=True)
        return f"{statistics.median(a[kind] / b[kind] for a, b in pairs):.2f}"

    print(f"seconds, median (least) of {rounds} rounds; ours / peer: median of the rounds' ratios\n")
    print("| what | ours | peer | ours / peer | goal |\n| --- | ---: | ---: | ---: | --- |")
    for name, goal in (
        ("--help", "below 0.1"),
        ("train --help", "below 0.7"),
        ("train --cfg job", "below 0.7"),
        ("completion of model=", "below 0.7"),
        ("a mistyped key", "below 0.7"),
    ):
        against = ["leader --help"] if name == "--help" and leader else []
        peer = [cell(against[0], 0), ratio(name, against[0], 0)] if against else ["", ""]
        print(f"| {name}, CPU | {cell(name, 0)} | {' | '.join(peer)} | {goal} |")
    for kind, what in enumerate(("CPU", "wall")):
        peer = [cell("bare script", kind), ratio("boltlab train", "bare script", kind)]
        print(f"| to the first optimizer step, {what} | {cell('boltlab train', kind)} | {' | '.join(peer)} | ≤ 1.15 |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--to-first-step"]:
        to_first_step(sys.argv[2:])
    else:
        options = dict(argument.split("=", 1) for argument in sys.argv[1:])
        main(int(options.get("rounds", 7)), options.get("leader"), options.get("leader_python"))
