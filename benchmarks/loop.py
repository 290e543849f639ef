"""What the training loop costs: `python benchmarks/loop.py` (five minutes on two cores; --quick for a look).

Every case trains the same net on the same batches, which stand in memory, so all that differs is the loop around the
arithmetic. Peers: a loop in bare PyTorch, a bare Lightning Trainer, and Lightning with the settings of the most used
Lightning and Hydra template (Rich progress bar, a loss and an accuracy metric updated and logged at every step, CSV
logger, checkpoints). They run in this process, in turns with ours.
"""

import argparse
import contextlib
import io
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from common import Row, in_turns, machine, show
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, RichModelSummary, RichProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from boltlab.config.build import build
from boltlab.config.compose import compose
from boltlab.training.trainer import make_trainer

WARMUP = 32  # steps before the clock starts
CLOCK = time.perf_counter


class Batches:
    """Measures from the end of the warm-up to the last batch."""

    def __init__(self, case: "Case", count: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(case.batch_size * case.steps, *case.shape, generator=generator)
        self.y = torch.randint(10, (case.batch_size * case.steps,), generator=generator)
        self.size, self.count = case.batch_size, count
        self.first, self.num_batches = case.warmup, case.steps
        self.per_step = 0.0  # seconds, or calls

    def __len__(self) -> int:
        return len(self.x) // self.size

    def state_dict(self) -> dict[str, Any]:  # as the engine's loaders, which are taken as they are
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        batches = list(zip(self.x.split(self.size), self.y.split(self.size), strict=True))
        calls, start = [0], 0.0

        def profile(frame: Any, event: str, argument: Any) -> None:
            calls[0] += event in ("call", "c_call")

        for number, batch in enumerate(batches):
            if number == self.first:
                start = CLOCK()
                if self.count:
                    sys.setprofile(profile)
            if number == len(batches) - 1:
                sys.setprofile(None)
                steps = number - self.first
                self.per_step = calls[0] / steps if self.count else (CLOCK() - start) / steps
            yield batch


class Data(L.LightningDataModule):
    """The batches in the shape of our data modules."""

    task = "classification"
    num_classes = 10
    class_names = tuple("0123456789")

    def __init__(self, case: "Case", count: bool) -> None:
        super().__init__()
        self.case, self.count = case, count
        self.input_shape = case.shape

    def train_dataloader(self) -> Batches:
        self.batches = Batches(self.case, self.count)
        return self.batches

    def num_train_batches(self) -> int:
        return self.case.steps


class Bare(L.LightningModule):
    """The least that Lightning asks for."""

    def __init__(self, net: nn.Module, optimizer: Callable[[Any], Any]) -> None:
        super().__init__()
        self.net, self.make_optimizer = net, optimizer

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Leader(Bare):
    """Two metric objects, called and logged at every step, with their values in the bar."""

    def __init__(self, net: nn.Module, optimizer: Callable[[Any], Any]) -> None:
        super().__init__(net, optimizer)
        self.mean_loss, self.accuracy = MeanMetric(), MulticlassAccuracy(10)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        output = self.net(batch[0])
        loss = F.cross_entropy(output, batch[1])
        self.mean_loss(loss)
        self.accuracy(output.argmax(dim=1), batch[1])
        shown = {"on_step": False, "on_epoch": True, "prog_bar": True}
        self.log("train/loss", self.mean_loss, **shown)
        self.log("train/acc", self.accuracy, **shown)
        return loss


class Case:
    """One net: how its steps are taken by each of the loops. Every method returns seconds (or calls) a step."""

    def __init__(self, name: str, overrides: list[str], batch_size: int, steps: int, warmup: int = WARMUP) -> None:
        self.name, self.batch_size, self.warmup = name, batch_size, warmup
        self.steps = warmup + steps + 16  # the last fetch, of up to 16 batches, is not measured
        quiet = ["logger=csv", "test=false", "trainer.max_epochs=1", "trainer.accelerator=cpu", "precision=32"]
        self.overrides = [*overrides, *quiet, f"data.batch_size={batch_size}"]
        self.config = compose("train", self.overrides).config
        self.shape = tuple(self.config.data.input_shape)

    def net(self) -> nn.Module:
        net: nn.Module = build(self.config, "model.net")
        return net

    def optimizer(self, fused: bool | None = None) -> Callable[[Any], Any]:
        plain = build(self.config, "optimizer")
        return lambda parameters: plain(parameters, fused=fused)

    def raw(self, fused: bool | None = None, count: bool = False) -> float:
        net, batches = self.net(), Batches(self, count=count)
        optimizer = self.optimizer(fused)(net.parameters())
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
        return batches.per_step

    def bare(self, fused: bool | None = None, count: bool = False) -> float:
        off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        return self._fit(Bare(self.net(), self.optimizer(fused)), count, off)

    def leader(self, count: bool = False) -> float:
        with tempfile.TemporaryDirectory() as folder:
            callbacks = [ModelCheckpoint(folder, save_last=True), EarlyStopping("train/loss", patience=100)]
            callbacks += [RichModelSummary(max_depth=-1), RichProgressBar()]
            settings = {"callbacks": callbacks, "logger": CSVLogger(folder), "default_root_dir": folder}
            return self._fit(Leader(self.net(), self.optimizer()), count, settings)

    def _fit(self, model: L.LightningModule, count: bool, settings: dict[str, Any]) -> float:
        # Our Trainer ends what Lightning's import has begun: a slower look for a GPU at each step.
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
        try:
            batches = Batches(self, count=count)
            L.Trainer(max_epochs=1, accelerator="cpu", **settings).fit(model, batches)
        finally:
            os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
        return batches.per_step

    def ours(self, *overrides: str, count: bool = False) -> float:
        with tempfile.TemporaryDirectory() as folder:
            config = compose("train", [*self.overrides, *overrides]).config
            config.run_dir = folder
            data, model = Data(self, count), build(config, "model")
            make_trainer(config).fit(model, datamodule=data)
            return data.batches.per_step


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """The bars are drawn, as on a terminal, into memory."""
    import rich
    from rich.console import Console

    kept, rich._console = rich._console, Console(file=io.StringIO(), force_terminal=True, width=120)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
    rich._console = kept


def quiet(measure: Callable[..., float], *arguments: Any, **options: Any) -> Callable[[], float]:
    def run() -> float:
        with silence():
            return measure(*arguments, **options)

    return run


def milliseconds(values: list[float]) -> list[float]:
    return [1000 * value for value in values]


def loops(case: Case, rounds: int, goals: dict[str, str]) -> None:
    cases = {
        "raw": quiet(case.raw),
        "raw, fused": quiet(case.raw, True),
        "bare Lightning": quiet(case.bare),
        "leader's settings": quiet(case.leader),
        "ours": quiet(case.ours),
    }
    times = {name: milliseconds(values) for name, values in in_turns(cases, rounds).items()}
    peers = ("raw", "raw, fused", "bare Lightning", "leader's settings")
    rows = [Row(f"default settings / {p}", times["ours"], times[p], goals.get(f"ours/{p}", "")) for p in peers]
    rows.append(Row("(leader's settings / raw)", times["leader's settings"], times["raw"]))
    rows.append(Row("(bare Lightning / raw)", times["bare Lightning"], times["raw"]))
    show(f"{case.name}, batch {case.batch_size}", "ms a step", rows)


def calls(case: Case) -> None:
    with silence():
        ours = case.ours(count=True)
        bare, leader, raw = case.bare(count=True), case.leader(count=True), case.raw(count=True)
    show(
        f"{case.name}: calls of Python and C functions a step (sys.setprofile)",
        "calls",
        [
            Row("default settings / leader's settings", [ours], [leader], "at most 2,400"),
            Row("default settings / bare Lightning", [ours], [bare]),
            Row("default settings / raw", [ours], [raw]),
        ],
    )


def device_probe(rounds: int) -> None:
    """An optimizer's step alone, with and without what Lightning's import sets."""

    def step(fused: bool | None, nvml: bool) -> Callable[[], float]:
        def run() -> float:
            net = nn.Sequential(nn.Linear(784, 128), nn.Linear(128, 10))
            optimizer = torch.optim.Adam(net.parameters(), fused=fused)
            for parameter in net.parameters():
                parameter.grad = torch.zeros_like(parameter)
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1" if nvml else "0"
            optimizer.step()
            start = CLOCK()
            for _ in range(300):
                optimizer.step()
            os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK")
            return 1e6 * (CLOCK() - start) / 300

        return run

    cases = {(fused, nvml): step(fused, nvml) for fused in (None, True) for nvml in (True, False)}
    times = in_turns({str(key): run for key, run in cases.items()}, rounds)
    rows = [
        Row("Adam, no probe / probe", times["(None, False)"], times["(None, True)"]),
        Row("fused Adam, no probe / probe", times["(True, False)"], times["(True, True)"]),
        Row("fused, no probe / not fused, probe", times["(True, False)"], times["(None, True)"]),
    ]
    show("Adam on 101,770 weights", "µs a step", rows)


def precisions(case: Case, rounds: int) -> None:
    fast = ("precision=bf16-mixed", "channels_last=true")
    times = in_turns({"fp32": quiet(case.ours, "channels_last=false"), "bf16": quiet(case.ours, *fast)}, rounds)
    row = Row("bf16-mixed + channels_last / float32", milliseconds(times["bf16"]), milliseconds(times["fp32"]))
    show(f"{case.name}: precision", "ms a step", [row])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="of torch; waiting threads disturb each other")
    parser.add_argument("--quick", action="store_true", help="the MLP alone, three rounds")
    parser.add_argument("--cpu-time", action="store_true", help="of this thread, where others use the machine too")
    options = parser.parse_args()
    if options.cpu_time:
        global CLOCK
        CLOCK = time.thread_time
    rounds = 3 if options.quick else options.rounds
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    for package in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(package).setLevel(logging.ERROR)
    print(
        f"{machine('torch', 'lightning', 'torchmetrics')}, {options.threads} threads, {rounds} rounds, {CLOCK.__name__}"
    )

    mlp = Case("MLP 784-128-10", ["experiment=mnist_mlp"], 64, 400)
    calls(mlp)
    goals = {"ours/raw": "at most 1.60", "ours/leader's settings": "at most 0.45"}
    loops(mlp, rounds, goals)
    device_probe(rounds)
    if options.quick:
        return
    adam = Case(
        "MLP 784-128-10 with Adam",
        ["data=mnist", "augment=none", "model=mlp", "optimizer=adam", "scheduler=constant"],
        64,
        400,
    )
    loops(adam, rounds, goals)
    lenet = Case("LeNet", ["experiment=mnist_lenet"], 64, 100)
    loops(lenet, rounds, {"ours/raw": "at most 1.10"})
    resnet = Case(
        "ResNet-18, 32x32", ["model=resnet18", "data=cifar10", "optimizer=sgd", "scheduler=constant"], 32, 4, 1
    )
    resnet.steps -= 15
    loops(resnet, max(3, rounds // 2), {"ours/raw": "at most 1.03"})
    precisions(resnet, max(3, rounds // 2))


if __name__ == "__main__":
    main()
