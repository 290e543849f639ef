"""Two processes against one: `python benchmarks/processes.py` (ten minutes on two cores).

`boltlab train` with one global batch, in a process that has both cores, and in two that have one each and exchange
gradients through gloo. `--paper` measures nothing: it prints the estimate for GPUs that stands in docs/processes.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from common import Row, in_turns, machine, show

from boltlab.data.loader import available_cores

# With enough epochs of the 1,293 training images of the digits for some seconds.
NETS = {
    "MLP of 0.1 M weights": ["model=mlp", "trainer.max_epochs=150"],
    "LeNet, batch norm": ["model=lenet_bn", "trainer.max_epochs=20"],
    "ResNet-18 at 28×28": ["model=resnet18", "trainer.max_epochs=1"],
}
TWO = "trainer.devices=2"
CASES = {
    "one": [],
    "ddp": ["trainer=ddp", TWO],
    "compressed": ["trainer=ddp_compressed", TWO],
    "fsdp": ["trainer=fsdp", TWO],
}
QUIET = ["logger=none", "callbacks=[throughput]", "test=false", "precision=32", "data.batch_size=128"]
QUIET += ["trainer.enable_progress_bar=false", "trainer.check_val_every_n_epoch=1000"]


def samples_per_second(overrides: list[str]) -> float:
    """Of a whole `boltlab train`, as its summary has it: without start and validation."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "boltlab", "train", *QUIET, *overrides, "trainer.accelerator=cpu"]
        threads = str(available_cores() // (2 if TWO in overrides else 1))  # all of them together have each core once
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        subprocess.run([*command, f"log_dir={folder}"], check=True, capture_output=True, env=environment)
        summary = json.loads(next(Path(folder).glob("train/*/summary.json")).read_text(encoding="utf-8"))
    return float(summary["samples_per_second"])


def measure(rounds: int) -> None:
    for net, overrides in NETS.items():
        cases = {name: partial(samples_per_second, [*overrides, *more]) for name, more in CASES.items()}
        times = in_turns(cases, rounds)
        rows = [Row(f"two processes, {name} / one", times[name], times["one"]) for name in CASES if name != "one"]
        show(f"{net}, global batch 128, digits", "samples/s", rows)


# ---------------------------------------------------------------- on paper

# Dense bf16 FLOP/s (NVIDIA's data sheets) and the share of them that training reaches: an assumption.
GPUS = {"A100": 312e12, "H100": 989e12}
SHARE = {"ResNet-50": 0.2, "ViT-B/16": 0.4}
BATCHES = {"ResNet-50": 256, "ViT-B/16": 128}  # samples on each GPU
# Bytes a second in each direction, as the standards have it, of which EFFECTIVE arrive.
LINKS = {
    "NVLink 4": 450e9,
    "NVLink 3": 300e9,
    "PCIe 5 ×16": 63e9,
    "InfiniBand 400 Gbit": 50e9,
    "PCIe 4 ×16": 31.5e9,
    "InfiniBand 100 Gbit": 12.5e9,
    "Ethernet 25 Gbit": 3.125e9,
    "Ethernet 10 Gbit": 1.25e9,
}
EFFECTIVE = 0.8
# How often a step sends the size of the net, and bytes a weight.
WAYS = {"ddp": (2, 4), "ddp_compressed": (2, 2), "fsdp": (3, 4)}
BUCKET = 25 * 2**20  # bytes of gradients that DDP sends together: the last ones have nothing to hide behind


def nets() -> dict[str, tuple[int, int]]:
    """Parameters and forward FLOPs of one image of 224 pixels, counted."""
    from boltlab.callbacks.summary import summarize
    from project.models.resnet import ResNet
    from project.models.vit import ViT

    shape = (3, 224, 224)
    built = {"ResNet-50": ResNet(shape, 1000, 50), "ViT-B/16": ViT(shape, 1000, 768, 12, 12)}
    totals = {name: summarize(net, shape)[0] for name, net in built.items()}
    return {name: (total.parameters, total.flops or 0) for name, total in totals.items()}


def sent(parameters: int, way: str, processes: int) -> float:
    """Bytes that each GPU sends in a step.

    All-reduce in a ring is a reduce-scatter and an all-gather, each of (n-1)/n of all gradients. FSDP gathers the
    weights for the forward and again for the backward pass, and scatters the gradients.
    """
    passes, width = WAYS[way]
    return passes * (processes - 1) / processes * parameters * width


def efficiency(compute: float, sending: float, way: str, rate: float) -> float:
    """Share of the step that is arithmetic. `compute`, `sending`: seconds; `rate`: bytes a second.

    Sending hides behind the backward pass, two thirds of the arithmetic; with FSDP behind the forward pass too. What is
    sent last hides behind nothing. Latency is left out.
    """
    hidden = compute if way == "fsdp" else compute * 2 / 3
    left = 2 * BUCKET / rate / (2 if way == "ddp_compressed" else 1)
    return compute / (compute + max(sending - hidden, min(sending, left)))


def paper(processes: int = 8) -> None:
    print(f"\n{processes} GPUs; what each sends in a step\n")
    print("| net | parameters | GFLOPs an image, forward | ddp, MB | ddp_compressed, MB | fsdp, MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    counted = nets()
    for name, (parameters, flops) in counted.items():
        amounts = " | ".join(f"{sent(parameters, way, processes) / 1e6:.0f}" for way in WAYS)
        print(f"| {name} | {parameters / 1e6:.1f} M | {flops / 1e9:.1f} | {amounts} |")
    columns = {}
    for net, (_, flops) in counted.items():
        columns |= {(net, gpu): 3 * flops * BATCHES[net] / (peak * SHARE[net]) for gpu, peak in GPUS.items()}
    print(f"\nShare of a step that is arithmetic: {' / '.join(WAYS)}\n")
    titles = [f"{net}, {gpu}, {1000 * seconds:.0f} ms" for (net, gpu), seconds in columns.items()]
    print(f"| link | {' | '.join(titles)} |")
    print(f"| --- |{' ---: |' * len(columns)}")
    for link, nominal in LINKS.items():
        rate = nominal * EFFECTIVE
        cells = []
        for (net, _), compute in columns.items():
            shares = [efficiency(compute, sent(counted[net][0], way, processes) / rate, way, rate) for way in WAYS]
            cells.append(" / ".join(f"{100 * share:.0f}" for share in shares) + " %")
        print(f"| {link} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--paper", action="store_true", help="the estimate for GPUs, which measures nothing")
    options = parser.parse_args()
    if options.paper:
        paper()
        return
    print(machine("torch", "lightning"))
    measure(options.rounds)


if __name__ == "__main__":
    main()
