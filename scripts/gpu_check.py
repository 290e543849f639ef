"""The checks of scripts/gpu_check.sh: each in a process of its own, with a time limit; gpu_check.json grows with each.

They stand in the order of what they tell. Images are made, but for `cifar10_fast` where data/ holds CIFAR-10.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

# Everything is imported before the checks are forked. None of it may ask CUDA: a forked process could not use it then.
# Plugins of pytest that were imported already would warn that they cannot be rewritten.
os.environ.update(PYTORCH_NVML_BASED_CUDA_CHECK="1", WANDB_MODE="disabled", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from boltlab import runs
from boltlab.__main__ import main as boltlab
from boltlab.config.build import build
from boltlab.config.compose import compose
from boltlab.data.loader import TensorData
from boltlab.training.trainer import make_trainer
from project.data.torchvision_images import TorchvisionImages

REPOSITORY = Path(__file__).resolve().parents[1]
CHECKS: dict[str, tuple[int, Callable[[bool], dict[str, Any]]]] = {}  # name → (seconds, check)
NO_GPU = "no GPU"
CUDA_TESTS = ("callbacks/test_overhead.py", "data/test_loader.py", "sweeps/test_stack.py")


def check(seconds: int) -> Callable[[Callable[[bool], dict[str, Any]]], Callable[[bool], dict[str, Any]]]:
    """Marks a check: it is told whether sizes are tiny, returns figures, and raises where something is wrong."""

    def mark(function: Callable[[bool], dict[str, Any]]) -> Callable[[bool], dict[str, Any]]:
        CHECKS[function.__name__] = seconds, function
        return function

    return mark


@check(20)
def machine(tiny: bool) -> dict[str, Any]:
    """The GPU multiplies."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.eye(64, device=device)
    assert torch.equal((x @ x).cpu(), torch.eye(64))
    name = torch.cuda.get_device_name() if device == "cuda" else NO_GPU
    return {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}


@check(90)
def generator(tiny: bool) -> dict[str, Any]:
    """A plain module that draws on the GPU in its step is killed, and resumes to the same bits."""
    device = "cpu" if tiny else "cuda"
    return _pytest("training/test_plain_resume.py", "-k", f"drawn_on_a_device and {device}", "-m", "")


@check(90)
def precisions(tiny: bool) -> dict[str, Any]:
    """bf16-mixed and 16-mixed with clipped gradients learn as float32 does."""
    found = {}
    for precision in ("32", "bf16-mixed", "16-mixed"):
        epochs = 1 if tiny else 6
        given = ("data=digits", "model=lenet_bn", f"precision={precision}", f"trainer.max_epochs={epochs}")
        found[precision] = _train(precision, *given, "trainer.gradient_clip_val=0.5", "optimizer=sgd")
    accuracies = [figures["test_acc"] for figures in found.values()]
    assert min(accuracies) > max(accuracies) - 0.1, f"accuracies differ by more than 0.1: {found}"
    assert tiny or min(accuracies) > 0.8, f"it does not learn: {found}"
    return found


@check(120)
def tests(tiny: bool) -> dict[str, Any]:
    """The tests that need a CUDA device."""
    return _pytest(*CUDA_TESTS, "-k", "gpu or cuda or recorded")


@check(110)
def resnet(tiny: bool) -> dict[str, Any]:
    """`boltlab train` makes as many images a second as a loop in bare PyTorch, in bf16, channels last."""
    cases = {"resnet18, 32 pixels": (18, 32, 512), "resnet50, 224 pixels": (50, 224, 256)}
    if tiny:
        cases = {name: (depth, 32, 4) for name, (depth, *_) in cases.items()}
    found = {}
    for name, (depth, size, batch) in cases.items():
        loops = _Loops(depth, size, batch, steps=4 if tiny else 64)
        turns = [(loops.ours(), loops.raw()) for _ in range(1 if tiny else 3)]
        ours, raw = (statistics.median(side) for side in zip(*turns, strict=True))
        ratio = statistics.median(a / b for a, b in turns)
        found[name] = {"batch": batch, "images/s": round(ours), "raw images/s": round(raw), "ratio": round(ratio, 3)}
    assert tiny or all(figures["ratio"] > 0.95 for figures in found.values()), f"slower than the bare loop: {found}"
    return found


@check(130)
def compiled(tiny: bool) -> dict[str, Any]:
    """A compiled net learns as one that is not, also with accumulated batches (and so without CUDA graphs)."""
    found = {}
    for batches in (1, 2):
        for compile in ("false", "true"):
            given = ("data=digits", "model=lenet_bn", f"compile={compile}", f"trainer.max_epochs={1 if tiny else 5}")
            name = f"compile={compile}, {batches} batches a step"
            found[name] = _train(name, *given, "precision=32", f"trainer.accumulate_grad_batches={batches}")
        plain, fast = (figures["test_loss"] for figures in list(found.values())[-2:])
        assert abs(plain - fast) < 0.1 * plain + 0.02, f"the test losses differ: {found}"
    return found


@check(160)
def cifar10_fast(tiny: bool) -> dict[str, Any]:
    """The recipe, on CIFAR-10 where it is there, else for four epochs on as many made images."""
    real = REPOSITORY / "data" / "cifar-10-batches-py"
    short = [] if real.is_dir() else ["trainer.max_epochs=4"]
    if not real.is_dir():
        TorchvisionImages.read = _made_images(1000 if tiny else 60000)  # type: ignore[method-assign]
    short += ["trainer.max_epochs=1", "compile=false", "data.batch_size=64"] if tiny else []
    found = _train("cifar10_fast", "experiment=cifar10_fast", f"data_dir={real.parent}", *short)
    assert tiny or found["test_acc"] > 0.85, f"it does not learn: {found}"
    return {"data": "CIFAR-10" if real.is_dir() else "made: ten patterns under noise", **found}


def _train(name: str, *overrides: str) -> dict[str, Any]:
    """Trains in this process; what the summary says."""
    quiet = ("logger=csv", "trainer.enable_progress_bar=false", f"log_dir=logs/{len(os.listdir())}")
    assert boltlab(["train", *overrides, *quiet]) == 0, f"{name} failed"
    summary = runs.read_summary(next(runs.folders(quiet[-1].partition("=")[2])))
    figures = {**summary["test"], **summary}
    found = {key: figures[key] for key in ("test_acc", "test_loss", "fit_seconds", "samples_per_second")}
    assert all(value == value for value in found.values()), f"{name}: not a number: {found}"
    return {key: round(value, 4) for key, value in found.items()}


def _pytest(*arguments: str) -> dict[str, Any]:
    """Runs tests of the suite in this process: how many passed and were skipped."""
    found: dict[str, list[str]] = {}

    class Recorder:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                found.setdefault(report.outcome, []).append(report.nodeid)

    tests = [
        text if text.startswith("-") or "/" not in text else str(REPOSITORY / "tests" / text) for text in arguments
    ]
    options = ["-q", "-p", "no:cacheprovider", "-c", str(REPOSITORY / "pyproject.toml"), f"--rootdir={REPOSITORY}"]
    code = pytest.main([*options, *tests], plugins=[Recorder()])
    assert code == 0, f"pytest ended with {code!r}, failed: {found.get('failed')}"
    return {outcome: len(names) for outcome, names in found.items()}


def _made_images(count: int) -> Any:
    """Stands for torchvision's reader: uint8 [N, 3, 32, 32], ten patterns under noise; a sixth is for the test."""

    def read(self: TorchvisionImages, train: bool) -> TensorData:
        draw = torch.Generator().manual_seed(int(train))
        patterns = torch.randint(0, 256, (10, 3, 32, 32), generator=torch.Generator().manual_seed(7))
        labels = torch.arange(count * 5 // 6 if train else count // 6) % 10
        noise = torch.randint(0, 256, (len(labels), 3, 32, 32), generator=draw)
        return TensorData((0.3 * patterns[labels] + 0.7 * noise).to(torch.uint8), labels)

    return read


class _Steps:
    """A loader of batches that stand on the device; times the steps behind the first ones."""

    def __init__(self, batches: list[Any], steps: int) -> None:
        self.batches, self.steps, self.warmup, self.seconds = batches, steps, steps // 2, 0.0

    def __len__(self) -> int:
        return self.warmup + self.steps + 2  # batches are fetched ahead: the last ones are not timed

    def __iter__(self) -> Iterator[Any]:
        start = 0.0
        for number in range(len(self)):
            if number in (self.warmup, self.warmup + self.steps):
                if self.batches[0][0].is_cuda:
                    torch.cuda.synchronize()
                start, self.seconds = time.perf_counter(), time.perf_counter() - start
            yield self.batches[number % len(self.batches)]

    def state_dict(self) -> dict[str, Any]:  # as the engine's loaders, which are taken as they are
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class _Data(pl.LightningDataModule):
    task, num_classes, class_names = "classification", 10, tuple("0123456789")

    def __init__(self, loader: _Steps) -> None:
        super().__init__()
        self.loader, self.input_shape = loader, tuple(loader.batches[0][0].shape[1:])

    def train_dataloader(self) -> _Steps:
        return self.loader

    def num_train_batches(self) -> int:
        return len(self.loader)


class _Loops:
    """Images a second of one ResNet: of the training of a config, and of a loop around torch alone."""

    def __init__(self, depth: int, size: int, batch: int, steps: int) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        x = torch.randn(4, batch, 3, size, size, device=self.device)
        y = torch.randint(10, (4, batch), device=self.device)
        self.batches = [(x[i].contiguous(memory_format=torch.channels_last), y[i]) for i in range(4)]
        self.images, self.steps = batch * steps, steps
        given = [f"model=resnet{depth}", "data=cifar10", f"data.input_shape=[3,{size},{size}]", "precision=bf16-mixed"]
        given += ("channels_last=true", "optimizer=sgd", "scheduler=constant", "logger=csv", "test=false")
        given += ("trainer.max_epochs=1", "trainer.limit_val_batches=0", "monitor=train_loss", "mode=min")
        self.config = compose("train", [*given, "trainer.enable_progress_bar=false"]).config

    def ours(self) -> float:
        loader = _Steps(self.batches, self.steps)
        with tempfile.TemporaryDirectory() as folder:
            self.config.run_dir = folder
            make_trainer(self.config).fit(build(self.config, "model"), datamodule=_Data(loader))
        return self.images / loader.seconds

    def raw(self) -> float:
        net = build(self.config, "model.net").to(self.device, memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True)
        loader = _Steps(self.batches, self.steps)
        for x, y in loader:
            with torch.autocast(self.device.type, torch.bfloat16):
                output: Tensor = net(x)
                loss = F.cross_entropy(output.float(), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return self.images / loader.seconds


def _run(name: str, tiny: bool, sender: Any, log: str) -> None:
    """In a process and a folder of its own: sends outcome and figures."""
    os.setsid()
    output = open(log, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  # open until the process ends
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    warnings.simplefilter("ignore")
    if tiny:
        torch.set_num_threads(1)
        compile = torch.compile
        torch.compile = lambda *a, **k: compile(*a, **{**k, "backend": "eager", "mode": None})
    found: dict[str, Any] = {"outcome": "passed", "tiny": tiny}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            found["figures"] = CHECKS[name][1](tiny)
        except BaseException as e:
            traceback.print_exc()
            found.update(outcome="failed", reason=f"{type(e).__name__}: {e}"[:2000])
    output.flush()
    sender.send(found)
    sender.close()
    os._exit(0)


def _one(name: str, tiny: bool) -> dict[str, Any]:
    """The outcome of one check, within its time."""
    limit, start = CHECKS[name][0] * (5 if tiny else 1), time.perf_counter()
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.NamedTemporaryFile(suffix=".txt") as log:
        process = context.Process(target=_run, args=(name, tiny, sender, log.name))
        process.start()
        pid = process.pid
        assert pid
        sender.close()
        try:
            found = receiver.recv() if receiver.poll(limit) else {"outcome": "timed out", "limit_seconds": limit}
        except EOFError:
            process.join()
            found = {"outcome": "died", "exit_code": process.exitcode}
        if found["outcome"] != "passed":
            found["output"] = Path(log.name).read_text(errors="replace")[-3000:]
        with suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # also what the check has started and left
        process.join()
    return {"seconds": round(time.perf_counter() - start, 1), **found}


def main() -> int:
    """Runs the checks that are named, or all; 0 where all have passed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checks", nargs="*", help=f"of {', '.join(CHECKS)}; all where none is named")
    parser.add_argument("--tiny", action="store_true", help="a few steps of small nets, as where there is no GPU")
    given = parser.parse_args()
    if unknown := set(given.checks) - CHECKS.keys():
        parser.error(f"there is no check {', '.join(sorted(unknown))}; checks: {', '.join(CHECKS)}")
    path, results = Path(os.environ.get("OUT") or ".").resolve() / "gpu_check.json", {}
    tiny = given.tiny
    for name in dict.fromkeys(("machine", *(given.checks or CHECKS))):
        results[name] = found = _one(name, tiny)
        tiny = tiny or results["machine"].get("figures", {}).get("device") == NO_GPU
        path.write_text(json.dumps(results, indent=1), encoding="utf-8")
        print(f"{name:<14}{found['outcome']:<10}{found['seconds']:>6} s  {found.get('figures') or found}", flush=True)
    print(path)
    return int(any(found["outcome"] != "passed" for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
