"""What can be read back from each tracker: how often it has a metric's value at a step."""

import csv
import json
import subprocess
import sys
from collections import Counter

import pytest
from warm import TIMES

RUN_ENDS = ("best/", "final/", "test/")  # what a run comes to is no row of metrics.csv
LEFT_OUT = (*TIMES, "epoch")  # which is logged beside each value of a step


def of_csv(folder):
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return Counter((k, int(r["step"]), float(v)) for r in rows for k, v in r.items() if v and k != "step")


def of_mlflow(folder):
    mlflow = pytest.importorskip("mlflow", reason="the extra boltlab[mlflow] is not installed")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder.parents[1]}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("boltlab").experiment_id])
    points = [p for key in run.data.metrics for p in client.get_metric_history(run.info.run_id, key)]
    return Counter((p.key, p.step, p.value) for p in points)


def of_tensorboard(folder):
    name = "tensorboard.backend.event_processing.event_accumulator"
    reader = pytest.importorskip(name, reason="the extra boltlab[tensorboard] is not installed")
    events = reader.EventAccumulator(str(folder / "tensorboard"), {reader.SCALARS: 0}).Reload()
    return Counter((tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag))


def of_wandb(folder):
    found = Counter()
    for part in sorted((folder / "wandb").glob("offline-run-*")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(part)]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        for row in (record["history"]["item"] for record in map(json.loads, lines) if record["type"] == "history"):
            step = row.pop("trainer/global_step", None)
            found.update((k, step, v) for k, v in row.items() if not k.startswith("_") and step is not None)
    return found


READERS = {"csv": of_csv, "mlflow": of_mlflow, "tensorboard": of_tensorboard, "wandb": of_wandb}


def comparable(points):
    """Without the times, and as exact as TensorBoard's float32."""
    kept = {(k, s, float(f"{v:.6g}")): n for (k, s, v), n in points.items() if k not in LEFT_OUT}
    return {point: n for point, n in kept.items() if not point[0].startswith(RUN_ENDS)}


def wrong(folder, expected):
    """Of each tracker, the values that it lacks, has besides, or has twice."""
    found = {name: comparable(read(folder)) for name, read in READERS.items()}
    return {
        name: [(p, has.get(p), expected.get(p)) for p in {**expected, **has} if has.get(p) != expected.get(p)]
        for name, has in found.items()
    }
