"""The table of the runs, of thousands of them: `boltlab runs` cold (no index) and warm, and what it is made of.

    python benchmarks/runs.py runs=10000 rounds=5

The runs are made in a folder that is gone afterwards. Their configs are composed here, as training would, for five
recipes, and then differ in seed, learning rate and batch size; three seeds of each; every tenth run failed.
"""

import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import machine
from omegaconf import OmegaConf

from boltlab.config.compose import compose

RECIPES = (
    ("digits", "linear"),
    ("digits", "lenet_bn"),
    ("mnist", "mlp"),
    ("mnist", "lenet"),
    ("cifar10", "resnet18"),
)


def make_runs(log_dir: Path, count: int) -> None:
    """Run folders as training leaves them, with the files that a table reads."""
    draw = random.Random(0)
    texts = {}
    for data, model in RECIPES:
        config = compose("train", [f"data={data}", f"model={model}", "logger=csv"], check=False).config
        config.run_dir = "@"
        texts[data, model] = OmegaConf.to_yaml(config, resolve=True).replace("@", "${run_dir}")
    started = 1.7e9
    for number in range(count):
        if number % 3 == 0:
            data, model = draw.choice(RECIPES)
            lr, batch_size = round(10 ** draw.uniform(-4, -1), 6), draw.choice((32, 64, 128, 256))
        started += draw.uniform(60, 4000)
        folder = log_dir / "train" / f"{time.strftime('%Y-%m-%d_%H-%M-%S', time.gmtime(started))}_{data}-{number:06x}"
        folder.mkdir(parents=True)
        text = texts[data, model].replace("lr: 0.003", f"lr: {lr}")
        text = text.replace("batch_size: 64", f"batch_size: {batch_size}")
        text = re.sub(r"^( *)seed: 0$", rf"\1seed: {number % 3}", text, flags=re.MULTILINE)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        names = [f"val_{name}" for name in ("acc", "f1", "loss", "precision", "recall", "top5")]
        summary = {"status": "failed" if number % 10 == 9 else "finished", "started": started, "pid": 1, "host": "one"}
        summary |= {"start": {"of": "", "overrides": [f"data={data}", f"model={model}", f"optimizer.lr={lr}"]}}
        summary |= {"name": f"{data}_{model}", "data": data, "model": model, "fit_seconds": draw.uniform(10, 4000)}
        if summary["status"] == "finished":
            metrics = {name: draw.random() for name in names}
            summary |= {"epochs": 10, "steps": 4690, "best": {"val_acc": metrics["val_acc"]}}
            summary |= {"final": {**metrics, "train_loss": draw.random(), "train_acc": draw.random()}}
            summary |= {"samples_per_second": draw.uniform(100, 9000), "data_wait_share": draw.random()}
            summary |= {"test": {name.replace("val", "test"): draw.random() for name in names}}
        summary |= {"skipped_steps": 0, "ended": started + 50, "seconds": draw.uniform(10, 4000)}
        (folder / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        (folder / "checkpoints").mkdir()


def timed(*words: str) -> tuple[float, float]:
    """Seconds of a whole command: wall, and of processors."""
    before, begun = os.times(), time.perf_counter()
    subprocess.run([sys.executable, "-m", "boltlab", *words], check=True, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - begun, os.times()
    return wall, after.children_user + after.children_system - before.children_user - before.children_system


def main(count: int, rounds: int) -> None:
    """Prints seconds, the median and the least of the rounds, in a Markdown table."""
    cases = {
        "no run at all": ["verb=eval"],
        "cold, without an index": [],
        "warm": [],
        "warm, filtered and sorted": ["optimizer.lr<0.01", "data=mnist", "sort=test_acc"],
        "warm, means over seeds": ["seeds=true"],
        "warm, all as csv": ["format=csv"],
    }
    with tempfile.TemporaryDirectory() as temporary:
        logs = Path(temporary) / "logs"
        make_runs(logs, count)
        times: dict[str, list[tuple[float, float]]] = {case: [] for case in cases}
        for _ in range(rounds):
            for case, words in cases.items():
                if case.startswith("cold"):
                    (logs / ".index-train.json").unlink(missing_ok=True)
                times[case].append(timed("runs", f"log_dir={logs}", *words))
        size = (logs / ".index-train.json").stat().st_size
    print(f"{machine()}\n\n| boltlab runs, {count} runs | wall s, median (least) | CPU s, median (least) |")
    print("| --- | ---: | ---: |")
    for case, pairs in times.items():
        cells = [f"{statistics.median(values):.2f} ({min(values):.2f})" for values in zip(*pairs, strict=True)]
        print(f"| {case} | {' | '.join(cells)} |")
    print(f"\nThe index has {size / 1e6:.1f} MB.")


if __name__ == "__main__":
    options = dict(argument.split("=", 1) for argument in sys.argv[1:])
    main(int(options.get("runs", 10_000)), int(options.get("rounds", 5)))
