"""Sweeps: 32 short trials against Hydra's own joblib launcher, what a trial costs beside its training, and pruning.

    python benchmarks/sweeps.py start                 # 32 one-epoch trials; needs `pip install hydra-joblib-launcher`
    python benchmarks/sweeps.py overhead              # CPU seconds a trial, less those of the same training in a loop
    python benchmarks/sweeps.py pruning DATA_DIR      # 40 trials of LeNet on 4,000 images of MNIST, pruned and not

The peer of `start` is a Hydra project: `@hydra.main`, `hydra/launcher=joblib`, `-m`, with the same training inside.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

from common import Row, in_turns, machine, show

BOLTLAB = [sys.executable, "-m", "boltlab"]
SHORT = ["data=digits", "model=mlp", "logger=csv", "trainer.max_epochs=1", "test=false", "callbacks=[best,last]"]
SHORT += ["trainer.enable_progress_bar=false"]
RATES = [f"{0.001 * 1.1**i:.6f}" for i in range(32)]

# The same training, with the same libraries and checks, in the task of a Hydra program.
PEER = """
import sys
import hydra
from omegaconf import DictConfig

@hydra.main(version_base="1.3", config_path=None, config_name=None)
def main(config: DictConfig) -> None:
    from pathlib import Path
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.global_hydra import GlobalHydra
    import torch
    torch.set_num_threads(1)
    kept = GlobalHydra.instance().hydra
    from boltlab.training import start as train
    from boltlab.config.compose import compose
    folder = Path(HydraConfig.get().runtime.output_dir) / "run"
    job = compose("train", SHORT + [f"optimizer.lr={config.lr}"])
    train.run(job, folder)

SHORT = SHORT_HERE
main()
"""


def seconds(command: list[str], cwd: str) -> float:
    """Wall-clock seconds of a command; what it prints goes to a file beside it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    with open(Path(cwd) / "output.txt", "a") as output:
        begin = time.perf_counter()
        subprocess.run(command, cwd=cwd, env=environment, stdout=output, stderr=output, check=True)
        return time.perf_counter() - begin


def start(rounds: int) -> None:
    """32 trials of one epoch each, two at a time, or all in one stack."""

    def ours(how: str) -> float:
        with tempfile.TemporaryDirectory() as folder:
            space = [f"optimizer.lr={','.join(RATES)}", "sampler=grid", "pruner=none", how]
            return seconds([*BOLTLAB, "sweep", *SHORT, *space], folder)

    def peer() -> float:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "peer.py").write_text(PEER.replace("SHORT_HERE", repr(SHORT)))
            options = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"+lr={','.join(RATES)}"]
            return seconds([sys.executable, "peer.py", "-m", *options], folder)

    ways = {"processes": "workers=2", "a stack": "sweep.engine=vectorized"}
    measured = in_turns({name: partial(ours, how) for name, how in ways.items()} | {"peer": peer}, rounds)
    rows = [Row(f"wall-clock time, {name}", measured[name], measured["peer"], "at most 0.35") for name in ways]
    show("32 trials of one epoch of digits", "s", rows)


LOOP = """
import sys
from pathlib import Path
from boltlab import runs
from boltlab.training import start as train
from boltlab.config.compose import compose
for number in range(int(sys.argv[1])):
    train.run(compose("train", sys.argv[2:]), runs.new_folder("logs", "train", "loop"))
    print(f"trial {number} finished", flush=True)
"""


def cpu_of_tree(pid: int) -> float:
    """CPU seconds of a process and of all below it, those that have ended and were waited for included (Linux)."""
    total, open_pids = 0.0, [pid]
    while open_pids:
        of = Path("/proc") / str(open_pids.pop())
        with suppress(OSError):
            total += sum(map(int, (of / "stat").read_text().rpartition(")")[2].split()[11:15]))
            for thread in (of / "task").iterdir():
                open_pids += map(int, (thread / "children").read_text().split())
    return total / os.sysconf("SC_CLK_TCK")


def overhead(rounds: int) -> None:
    """Between the end of one trial and that of a later one, so that what a command costs once is left out."""
    first, last = 4, 28

    def slope(command: list[str]) -> float:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        with tempfile.TemporaryDirectory() as folder:
            pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            with subprocess.Popen(command, cwd=folder, env=environment, **pipe) as process:
                of_two = re.compile(rf"trial ({first}|{last}) finished")
                at = [cpu_of_tree(process.pid) for line in process.stdout if of_two.search(line)]
            assert process.returncode == 0 and len(at) == 2, (process.returncode, at)
        return (at[1] - at[0]) / (last - first)

    space = ["optimizer.lr=tag(log,interval(1e-3,1e-1))", "sampler=tpe", "pruner=none", "workers=1"]
    sweep = [*BOLTLAB, "sweep", *SHORT, *space, f"sweep.trials={last + 1}"]
    loop = [sys.executable, "-c", LOOP, str(last + 1), *SHORT]
    measured = in_turns({"sweep": lambda: slope(sweep), "loop": lambda: slope(loop)}, rounds)
    show("A trial's CPU time", "s", [Row("trial, one of a loop in one process", measured["sweep"], measured["loop"])])
    extra = sorted(a - b for a, b in zip(measured["sweep"], measured["loop"], strict=True))
    middle = statistics.median(extra)
    print(f"\na sweep adds {middle:.2f} s of CPU to a trial ({extra[0]:.2f} to {extra[-1]:.2f}; goal: below 0.3)")


def pruning(data_dir: str, trials: int, seed: int, kept: str | None) -> None:
    """A sweep without a pruner; and one with each, of as many trials as begin in half of its time: when each has
    reached the best value of the one without."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = kept or scratch
        common = ["sweep=mnist_lenet", "workers=2", "logger=csv", f"seed={seed}"]
        common += [f"data.data_dir={data_dir}", "data.max_samples=4000", "data.val_fraction=1000"]
        common += ["trainer.max_epochs=8"]
        found = {}
        for pruner in ("none", "median", "asha"):
            length = [f"sweep.trials={trials}"]
            if found:
                length = [f"sweep.trials={20 * trials}", f"sweep.timeout_minutes={found['none'][0] / 120:.3f}"]
            took = seconds([*BOLTLAB, "sweep", *common, *length, f"pruner={pruner}", f"name=p_{pruner}"], folder)
            (top,) = Path(folder).glob(f"logs/train/*_p_{pruner}-*")
            found[pruner] = (took, history(top))
        best = max(value for _, value in found["none"][1])
        print(f"\n### {trials} trials of LeNet on 4,000 images of MNIST, 8 epochs, seed {seed}\n")
        print("| pruner | finished | best val_acc | unpruned best after, s | whole, s | of the unpruned time |")
        print("| --- | ---: | ---: | ---: | ---: | ---: |")
        whole = found["none"][0]
        for pruner, (took, values) in found.items():
            reached = next((when for when, value in values if value >= best), None)
            shown = "never" if reached is None else f"{reached:.0f}"
            share = "" if reached is None else f"{reached / whole:.2f}"
            print(f"| {pruner} | {len(values)} | {max(v for _, v in values):.4f} | {shown} | {took:.0f} | {share} |")


def history(top: Path) -> list[tuple[float, float]]:
    """(seconds since the sweep began, value) of the trials that came to their end."""
    import optuna

    study = optuna.load_study(study_name=None, storage=f"sqlite:///{top}/study.db")
    begun = json.loads((top / "sweep.json").read_text())["started"]
    done = [t for t in study.get_trials() if t.state.name == "COMPLETE"]
    return sorted((t.datetime_complete.timestamp() - begun, t.value) for t in done)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["start", "overhead", "pruning"])
    parser.add_argument("data_dir", nargs="?", help="holds MNIST/raw")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", help="a folder for the sweeps of `pruning`")
    arguments = parser.parse_args()
    print(machine("torch", "lightning", "hydra-core", "optuna"))
    if arguments.what == "start":
        start(arguments.rounds)
    elif arguments.what == "overhead":
        overhead(arguments.rounds)
    else:
        pruning(str(Path(arguments.data_dir).resolve()), arguments.trials, arguments.seed, arguments.keep)


if __name__ == "__main__":
    main()
