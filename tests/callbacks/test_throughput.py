import csv

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from boltlab.callbacks import overhead, throughput
from boltlab.callbacks.throughput import Throughput, batch_samples


@pytest.fixture
def clock(monkeypatch):
    """The time that the callback reads: it passes where a test says so, and nowhere else."""

    class Clock:
        now = 100.0

        def perf_counter(self):
            return self.now

        def pass_by(self, seconds):
            self.now += seconds

    found = Clock()
    for module in (throughput, overhead):
        monkeypatch.setattr(module, "time", found)
    return found


def fit(make_trainer, module, data, *overrides):
    callback = Throughput()
    trainer = make_trainer(*overrides, callbacks=[callback])
    trainer.fit(module, datamodule=data)
    return trainer, callback


def test_every_sample_is_counted_and_the_csv_agrees(make_trainer, tiny_module, tiny_data, run_dir):
    _, counted = fit(make_trainer, tiny_module(), tiny_data(samples=60))
    assert (counted.samples, counted.steps) == (120, 8)
    assert counted.samples_per_second == pytest.approx(120 / counted.seconds)
    rows = list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))
    logged = [row for row in rows if row["samples_per_second"]]
    assert [row["step"] for row in logged] == ["3", "7"]
    assert all(row["val_acc"] and row["train_acc"] for row in logged)  # one row an epoch
    assert float(logged[-1]["samples_per_second"]) == pytest.approx(counted.epoch_samples_per_second)


def test_slow_data_shows_as_waiting_slow_steps_do_not_and_validation_does_not_count(
    make_trainer, tiny_module, tiny_data, clock
):
    class Slow(Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, index):
            clock.pass_by(1 / 16)
            return torch.zeros(1, 4, 4), index % 4

    class SlowData(tiny_data):
        def train_dataloader(self):
            return DataLoader(Slow(), 16)

    class SlowModule(tiny_module):
        def training_step(self, batch, batch_idx):
            clock.pass_by(3.0)
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            clock.pass_by(50.0)
            return super().validation_step(batch, batch_idx)

    _, waiting = fit(make_trainer, SlowModule(), SlowData(), "trainer.val_check_interval=2")  # 8 steps of 2 epochs
    assert (waiting.wait_seconds, waiting.seconds, waiting.data_wait_share) == pytest.approx((8.0, 32.0, 0.25))
    _, working = fit(make_trainer, SlowModule(), tiny_data())
    assert (working.wait_seconds, working.seconds, working.data_wait_share) == (0.0, 24.0, 0.0)


def test_the_profiler_is_given_back(make_trainer, tiny_module, tiny_data):
    trainer, _ = fit(make_trainer, tiny_module(), tiny_data(), "trainer.profiler=simple")
    assert "start" not in vars(trainer.profiler)
    assert len(trainer.profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"]) == 2 * 4


def test_the_samples_of_a_batch():
    x = torch.zeros(5, 3)
    assert batch_samples(x) == batch_samples((x, x[0])) == batch_samples({"name": "abc", "x": [x]}) == 5
    assert batch_samples(torch.tensor(1.0)) == 1
    assert batch_samples("abc") == batch_samples([]) == 0
