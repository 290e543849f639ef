"""Many small nets trained at once, stacked, against one after another: `python benchmarks/vectorized.py DATA_DIR`.

The peer is `boltlab train`, run after run in this process, as a sweep runs it. Ours trains the same runs (learning
rate, weight decay, momentum and seed differ) with their weights stacked on a leading dimension: the same initial
weights, order of samples, parameter groups and metrics; of files only last.ckpt without the optimizer's state. The
clock is this process's processor time, for others may use the machine; --wall takes the other one.
"""

import argparse
import copy
import itertools
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import loop as single
import torch
import torch.nn.functional as F
from common import Row, in_turns, machine, show
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from boltlab import checkpoint, runs
from boltlab.commands import train
from boltlab.config import Composed, build, compose
from boltlab.launch import keep_freed_memory
from boltlab.models.task import decayed_parameters

MODELS, MEASURED = 32, 4  # so many ordinary runs stand for all
Weights = dict[str, Tensor]  # [models, …]


def trials(overrides: list[str], count: int, own_seeds: bool = True) -> list[Composed]:
    found = []
    for i in range(count):
        own = [f"optimizer.lr={0.003 * 1.08**i:.5f}", f"optimizer.weight_decay={1e-5 * i:g}"]
        own += [f"optimizer.momentum={0.8 + 0.15 * i / count:.4f}", f"seed={i if own_seeds else 0}"]
        found.append(compose("train", ["logger=csv", "trainer.accelerator=cpu", "precision=32", *overrides, *own]))
    return found


def separate(composed: list[Composed], log_dir: Path) -> list[Path]:
    folders = [runs.new_folder(log_dir, "train", "one") for _ in composed]
    with single.silence():
        for one, folder in zip(composed, folders, strict=True):
            train.run(one, folder)
    return folders


class Stack:
    """The nets of several configs, their weights stacked; torch's own optimizer works on the slices."""

    def __init__(self, composed: list[Composed]) -> None:
        self.configs, self.models = [one.config for one in composed], []
        for config in self.configs:
            pl.seed_everything(config.seed, verbose=False)
            model = build(config, "model")
            self.models.append(model.double() if str(config.precision) == "64" else model)
        self.net = self.models[0].net
        named = [dict(model.net.named_parameters()) for model in self.models]
        self.weights = {name: torch.stack([own[name].detach() for own in named]) for name in named[0]}
        for place, own in enumerate(named):
            for name, parameter in own.items():
                parameter.data = self.weights[name][place]
        self.slices = {name: [own[name] for own in named] for name in self.weights}
        self.optimizer, *others = map(self._optimizer, self.models)
        for group in itertools.chain(*(other.param_groups for other in others)):
            self.optimizer.add_param_group(group)  # each carries its own learning rate, decay and momentum
        self.data = build(self.configs[0], "data")
        self.data.prepare_data()
        self.data.setup("fit")
        seeds, self.loaders = dict.fromkeys(config.data.seed for config in self.configs), []
        for seed in seeds:
            data = copy.copy(self.data)  # shares the images
            data.seed = seed
            self.loaders.append(data.train_dataloader())
        self.own = len(seeds) > 1  # else all nets see the same batches

    @staticmethod
    def _optimizer(model: Any) -> Any:
        decayed, rest = ([p for _, p, d in decayed_parameters(model.net) if d is wanted] for wanted in (True, False))
        return model.make_optimizer([{"params": decayed}, {"params": rest, "weight_decay": 0.0}], fused=True)

    def batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """x [B, …], y [B] where all nets see the same, else [models, B, …]."""
        for loader in self.loaders:
            loader.sampler.set_epoch(epoch)
        for parts in zip(*self.loaders, strict=True):
            x, y = (torch.stack(tensors) if self.own else tensors[0] for tensors in zip(*parts, strict=True))
            x = self.data.normalize(x.flatten(0, 1)).view(x.shape) if self.own else self.data.normalize(x)
            yield x.to(self.models[0].dtype), y

    def step(self, x: Tensor, y: Tensor) -> None:
        def mean_loss(weights: Weights, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            output = functional_call(self.net, weights, (x,))
            return F.cross_entropy(output, y), output

        axes = (0, 0, 0) if self.own else (0, None, None)
        gradients, (losses, outputs) = vmap(grad_and_value(mean_loss, has_aux=True), axes)(self.weights, x, y)
        for name, parameters in self.slices.items():
            for parameter, gradient in zip(parameters, gradients[name].unbind(), strict=True):
                parameter.grad = gradient
        self.optimizer.step()
        right = outputs.argmax(-1) == y
        for model, loss, values in zip(self.models, losses.unbind(), right.unbind(), strict=True):
            model.train_metrics.add(loss, len(values), values)

    @torch.no_grad()
    def evaluate(self, split: Any) -> None:
        outputs, net = [], vmap(partial(functional_call, self.net), in_dims=(0, None))
        for x, _ in self.data.dataloader(split):
            outputs.append(net(self.weights, (self.data.normalize(x).to(self.models[0].dtype),)))
        target = self.data.dataset(split).labels
        for model, output in zip(self.models, torch.cat(outputs, dim=1), strict=True):
            metrics = getattr(model, f"{split}_metrics")
            metrics.update(preds=output, target=target, value=F.cross_entropy(output, target), weight=len(target))
            metrics.compute()
            metrics.reset()

    def fit(self, log_dir: Path) -> list[Path]:
        """Trains, validates and writes last.ckpt of each after each epoch, tests; returns the folders."""
        folders = [runs.new_folder(log_dir, "train", "stacked") for _ in self.models]
        for epoch in range(self.configs[0].trainer.max_epochs):
            for batch in self.batches(epoch):
                self.step(*batch)
            self.evaluate("val")
            for model, folder in zip(self.models, folders, strict=True):
                state = {key: value.clone() for key, value in model.state_dict().items()}  # not a view of the stack
                checkpoint.write({"state_dict": state, "epoch": epoch}, folder / "checkpoints/last.ckpt")
                model.train_metrics.reset()
        self.evaluate("test")
        return folders


def exactness(overrides: list[str]) -> str:
    """Largest difference of a weight of four nets after an epoch, over the largest weight of its tensor."""
    composed, worst = trials([*overrides, "trainer.max_epochs=1"], 4), 0.0
    with tempfile.TemporaryDirectory() as name:
        for folders in zip(Stack(composed).fit(Path(name)), separate(composed, Path(name)), strict=True):
            ours, theirs = (checkpoint.read(folder / "checkpoints/last.ckpt")["state_dict"] for folder in folders)
            for key in (key for key in theirs if key.startswith("net.")):
                worst = max(worst, float((ours[key] - theirs[key]).abs().max() / theirs[key].abs().max()))
    return f"{worst:.1e}"


def timed(run: Any, composed: list[Composed], factor: float = 1.0) -> float:
    with tempfile.TemporaryDirectory() as folder:
        start = single.CLOCK()
        run(composed, Path(folder))
        return (single.CLOCK() - start) * factor


def measure(name: str, overrides: list[str], epochs: int, options: argparse.Namespace) -> None:
    case, stack = single.Case(name, overrides, 64, 100), Stack(trials(overrides, MODELS, own_seeds=False))
    x, y = torch.randn(64, *case.shape), torch.randint(10, (64,))

    def twenty(composed: list[Composed], folder: Path) -> None:
        for _ in range(20):
            stack.step(x, y)

    timed(twenty, [])  # a warm-up
    peers = {"boltlab train": single.quiet(case.ours), "raw loop": single.quiet(case.raw, True)}
    steps = {peer: partial(lambda run: 1000 * MODELS * run(), run) for peer, run in peers.items()}
    times = in_turns({"stacked": partial(timed, twenty, [], 50.0), **steps}, options.rounds)
    show(f"{name}: a step of {MODELS}", "ms", [Row(f"stacked / {p}", times["stacked"], times[p]) for p in peers])
    rows = []
    for seeds, own_seeds in {"one seed": False, "own seeds": True}.items():
        composed = trials([*overrides, f"trainer.max_epochs={epochs}"], MODELS, own_seeds)
        cases = {"stacked": partial(timed, lambda c, folder: Stack(c).fit(folder), composed)}
        cases["separate"] = partial(timed, separate, composed[:: MODELS // MEASURED], MODELS / MEASURED)
        times = in_turns(cases, options.rounds)
        rows.append(Row(f"{seeds}, stacked / one after another", *times.values(), "at most 0.20"))
    show(f"{name}: {MODELS} whole runs of {epochs} epochs", "s", rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data_dir")
    for name, default in {"rounds": 3, "epochs": 2, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--wall", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    single.CLOCK = time.perf_counter if options.wall else time.process_time
    print(f"{machine('torch')}, {options.threads} threads, {options.rounds} rounds, {single.CLOCK.__name__}")
    mnist = ["experiment=mnist_mlp", f"data_dir={options.data_dir}"]
    print(f"differences: float32 {exactness(mnist)}, float64 {exactness([*mnist, 'precision=64'])}", flush=True)
    measure("MNIST, 784-128-10", mnist, options.epochs, options)
    measure("MNIST, 784-64-10", [*mnist, "model.net.hidden_sizes=[64]"], options.epochs, options)
    measure("digits, 784-128-10", [*mnist, "data=digits", "augment=none"], 10 * options.epochs, options)


if __name__ == "__main__":
    main()
