import csv

import torch

from boltlab.callbacks.lr_monitor import LRMonitor


def logged(run_dir):
    with (run_dir / "metrics.csv").open() as file:
        return {int(row["step"]): row for row in csv.DictReader(file) if row.get("lr")}


def test_the_rate_that_each_logged_step_used(make_trainer, tiny_module, tiny_data, run_dir):
    class Scheduled(tiny_module):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
            return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    make_trainer(callbacks=[LRMonitor()]).fit(Scheduled(lr=1.0), datamodule=tiny_data())
    rows = logged(run_dir)
    assert list(rows) == [1, 3, 5, 7]
    for step, row in rows.items():
        assert float(row["lr"]) == 1 / (step + 1)
        assert row["train_loss_step"]  # beside the loss of the same step


def test_groups_of_one_rate_are_one_curve(make_trainer, tiny_module, tiny_data, run_dir):
    class Groups(tiny_module):
        def configure_optimizers(self):
            rates = (0.1, 0.1, 0.01)
            layers = (self.net[0], self.net[1], self.net[4])
            groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in zip(layers, rates, strict=True)]
            return torch.optim.SGD(groups)

    make_trainer(callbacks=[LRMonitor()]).fit(Groups(), datamodule=tiny_data())
    row = logged(run_dir)[1]
    assert (float(row["lr"]), float(row["lr_1"])) == (0.1, 0.01)
    assert "lr_2" not in row


def test_accumulated_batches_log_once(make_trainer, tiny_module, tiny_data, run_dir):
    calls = []
    trainer = make_trainer("trainer.accumulate_grad_batches=2", callbacks=[LRMonitor()])
    trainer.logger.log_metrics = lambda metrics, step: calls.append(step) if "lr" in metrics else None
    trainer.fit(tiny_module(), datamodule=tiny_data())
    assert calls == [1, 3]
