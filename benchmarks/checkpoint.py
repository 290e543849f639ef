"""Checkpoints: seconds to write one against plain torch.save, memory, and the share of a training they take.

    python benchmarks/checkpoint.py FOLDER [rounds]        # FOLDER: on the disk to measure; rounds=20

What is written is what Lightning saves of a net with Adam: weights and two moments. The peers are plain torch.save to
the same file, and the same followed by fsync, without which a file is not yet on the disk. The share of a training is
the time that its checkpoints, `best` and `last` after every epoch, took of the time from the first step to the last,
once on the digits and once on random images of MNIST's size and number.
"""

import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Row, in_turns, machine, show
from torch import nn

from boltlab import runs
from boltlab.__main__ import main as boltlab
from boltlab.checkpoints import file as checkpoint_file
from project.models.lenet import LeNet
from project.models.resnet import ResNet

MNIST = ("experiment=mnist_lenet", "trainer.max_epochs=1")


def trained(net: nn.Module) -> dict[str, Any]:
    """What a checkpoint holds after a step of Adam."""
    optimizer = torch.optim.AdamW(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {"state_dict": net.state_dict(), "optimizer_states": [optimizer.state_dict()], "loops": {}}


def ours(content: dict[str, Any], path: Path) -> None:
    checkpoint_file.write(content, path)


def plain(content: dict[str, Any], path: Path) -> None:
    torch.save(content, path)


def synced(content: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        os.fsync(file.fileno())


def seconds(write: Callable[[dict[str, Any], Path], None], content: dict[str, Any], path: Path) -> float:
    started = time.perf_counter()
    write(content, path)
    return time.perf_counter() - started


def writing(folder: Path, rounds: int) -> None:
    rows = []
    nets = {"LeNet": LeNet((1, 28, 28), 10), "ResNet-18": ResNet((3, 32, 32), 10)}
    for name, net in nets.items():
        content = trained(net)
        cases = {f.__name__: partial(seconds, f, content, folder / f"{f.__name__}.ckpt") for f in (ours, plain, synced)}
        in_turns(cases, 2)
        took = {key: [1000 * value for value in values] for key, values in in_turns(cases, rounds).items()}
        what = f"{name}, {(folder / 'ours.ckpt').stat().st_size / 1e6:.1f} MB"
        rows.append(Row(f"{what}, against torch.save", took["ours"], took["plain"]))
        rows.append(Row(f"{what}, against torch.save and fsync", took["ours"], took["synced"]))
    show("Writing a checkpoint", "ms", rows)


def share(what: str, folder: Path, *overrides: str) -> None:
    """Trains, and prints how much of the time went into checkpoints."""
    took = []
    write = checkpoint_file.write

    def timed(content: dict[str, Any], path: Path) -> None:
        took.append(seconds(write, content, path))

    checkpoint_file.write = timed
    try:
        if boltlab(["train", *overrides, "logger=csv", "test=false", f"log_dir={folder / 'logs'}"]):
            raise SystemExit(1)
    finally:
        checkpoint_file.write = write
    training = runs.read_summary(runs.find("latest", folder / "logs"))["fit_seconds"]
    print("\n| training | seconds | in checkpoints | files | share |\n| --- | ---: | ---: | ---: | ---: |")
    print(f"| {what} | {training:.1f} | {sum(took):.2f} | {len(took)} | {sum(took) / training:.1%} |", flush=True)


def fake_mnist(folder: Path) -> Path:
    """Random images in MNIST's files."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 60_000), ("t10k", 10_000)):
        images, labels = torch.randint(256, (count, 28, 28)), torch.randint(10, (count,))
        for kind, values in (("images-idx3", images), ("labels-idx1", labels)):
            head = struct.pack(f">HBB{values.dim()}I", 0, 8, values.dim(), *values.shape)
            (raw / f"{name}-{kind}-ubyte").write_bytes(head + values.to(torch.uint8).numpy().tobytes())
    return folder


def main() -> None:
    parent, rounds = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20
    parent.mkdir(parents=True, exist_ok=True)
    print(machine("torch", "lightning"))
    with tempfile.TemporaryDirectory(dir=parent) as name:
        folder = Path(name)
        writing(folder, rounds)
        share("digits, the default", folder)
        share("mnist_lenet, 1 epoch", folder, *MNIST, f"data_dir={fake_mnist(folder)}")


if __name__ == "__main__":
    main()
