#!/usr/bin/env python3
"""Whether two commits train the same: weights, optimizer states and rows of metrics.csv, to the bit.

    .venv/bin/python scripts/compare_commits.py main~3         # against the working tree
    .venv/bin/python scripts/compare_commits.py v0.1.0 main

Trains every shipped experiment for three steps, by the code and configs of each commit, on this machine and on data
that needs no download. Exits with 1 where anything differs.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.append(str(REPOSITORY / "tests"))

from stand_in import SHORT, STAND_IN, make_images  # type: ignore[import-not-found]  # noqa: E402
from warm import differences, outcome  # type: ignore[import-not-found]  # noqa: E402

# In one process for each commit: eleven seconds of imports once.
TRAIN = """
import json, sys
from boltlab.__main__ import main
for name, overrides in json.loads(sys.argv[1]).items():
    code = main(["train", f"experiment={name}", f"log_dir=runs/{name}", *overrides])
    print(name, "exit code", code, flush=True)
"""


def train(tree: Path, place: Path, experiments: list[str]) -> None:
    (place / "examples").symlink_to(tree / "examples")
    make_images(place)
    trusted = ["trusted=[project]"] if (tree / "src" / "project").is_dir() else []
    given = {name: [*SHORT, "trainer.accelerator=cpu", *trusted, *STAND_IN.get(name, [])] for name in experiments}
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    environment["BOLTLAB_PROJECT"] = str(tree)
    with (place / "output.txt").open("w") as file:
        command = [sys.executable, "-W", "ignore", "-c", TRAIN, json.dumps(given)]
        subprocess.run(command, cwd=place, env=environment, stdout=file, stderr=file, check=True)


def run_of(place: Path, name: str) -> Path:
    found = list((place / "runs" / name).glob("train/*/checkpoints/last.ckpt"))
    if len(found) != 1:
        sys.exit(f"{name} has no checkpoint in {place}:\n{(place / 'output.txt').read_text()[-3000:]}")
    return found[0].parents[1]


def trained(run: Path) -> dict[str, Any]:
    """What a run has come to, without where a version keeps what its metrics have counted."""
    found: dict[str, Any] = outcome(run)
    weights = {name: value for name, value in found["state_dict"].items() if "_metrics." not in name}
    return {**found, "state_dict": weights, "others": None}


def main(commits: list[str]) -> int:
    git = ["git", "-C", str(REPOSITORY)]
    experiments = sorted(path.stem for path in (REPOSITORY / "configs" / "experiment").glob("*.yaml"))
    with tempfile.TemporaryDirectory() as folder:
        places, trees = [], []
        for number, commit in enumerate(commits):
            tree = Path(folder) / f"tree{number}"
            subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(tree), commit], check=True)
            trees.append(tree)
        try:
            for number, tree in enumerate([*trees, REPOSITORY][:2]):
                places.append(Path(folder) / f"place{number}")
                places[-1].mkdir()
                train(tree, places[-1], experiments)
        finally:
            for tree in trees:
                subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=True)
        found = {name: differences(*(trained(run_of(place, name)) for place in places)) for name in experiments}
    for name, different in found.items():
        print(f"{name:24}{'equal' if not different else f'{len(different)} differ: {different[0]}'}")
    return int(any(found.values()))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1:]))
