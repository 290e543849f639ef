import csv
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from boltlab.callbacks.throughput import Throughput, batch_samples


class Slow(Dataset):
    """20 ms a batch of 16."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        time.sleep(0.02 / 16)
        return torch.zeros(1, 4, 4), index % 4


def fit(make_trainer, module, data, *overrides):
    throughput = Throughput()
    trainer = make_trainer(*overrides, callbacks=[throughput])
    trainer.fit(module, datamodule=data)
    return trainer, throughput


def test_every_sample_is_counted_and_the_csv_agrees(make_trainer, tiny_module, tiny_data, run_dir):
    _, throughput = fit(make_trainer, tiny_module(), tiny_data(samples=60))
    assert (throughput.samples, throughput.steps) == (120, 8)
    assert throughput.samples_per_second == pytest.approx(120 / throughput.seconds)
    rows = list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))
    logged = [row for row in rows if row["samples_per_second"]]
    assert [row["step"] for row in logged] == ["3", "7"]
    assert all(row["val_acc"] and row["train_acc"] for row in logged)  # one row an epoch
    assert float(logged[-1]["samples_per_second"]) == pytest.approx(throughput.epoch_samples_per_second)


def test_slow_data_shows_as_waiting_and_slow_steps_do_not(make_trainer, tiny_module, tiny_data):
    class SlowData(tiny_data):
        def train_dataloader(self):
            return DataLoader(Slow(), 16)

    class SlowModule(tiny_module):
        def training_step(self, batch, batch_idx):
            time.sleep(0.05)
            return super().training_step(batch, batch_idx)

    _, waiting = fit(make_trainer, tiny_module(), SlowData(), "trainer.max_epochs=4")
    assert waiting.wait_seconds >= 16 * 0.02
    _, working = fit(make_trainer, SlowModule(), tiny_data())
    assert working.seconds >= 8 * 0.05
    assert working.data_wait_share < 0.2 < waiting.data_wait_share


def test_validation_does_not_count(make_trainer, tiny_module, tiny_data):
    class SlowValidation(tiny_module):
        def validation_step(self, batch, batch_idx):
            time.sleep(0.25)
            return super().validation_step(batch, batch_idx)

    start = time.perf_counter()
    _, throughput = fit(make_trainer, SlowValidation(), tiny_data(), "trainer.val_check_interval=2")
    total = time.perf_counter() - start
    assert throughput.seconds <= total - 16 * 0.25


def test_the_profiler_is_given_back(make_trainer, tiny_module, tiny_data):
    trainer, _ = fit(make_trainer, tiny_module(), tiny_data(), "trainer.profiler=simple")
    assert "start" not in vars(trainer.profiler)
    assert trainer.profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"]


def test_the_samples_of_a_batch():
    x = torch.zeros(5, 3)
    assert batch_samples(x) == batch_samples((x, x[0])) == batch_samples({"name": "abc", "x": [x]}) == 5
    assert batch_samples(torch.tensor(1.0)) == 1
    assert batch_samples("abc") == batch_samples([]) == 0
