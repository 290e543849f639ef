"""Where validations do not end each epoch: each value belongs to the weights that it was measured with."""

from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau

# 0.5 comes last in either direction: the best is a value in the middle, by what is better.
LOSSES = [0.9, 0.8, 0.3, 0.7, 0.2, 0.6, 0.5]
SHORT = ["logger=none", "trainer.max_epochs=7", "trainer.num_sanity_val_steps=0"]


@pytest.fixture
def scripted(tiny_module):
    """A module that logs given values, an epoch's train_loss and a validation's val_acc, and keeps the weights that it
    has then; with `patience`, a plateau scheduler as Lightning's docs write it."""

    class Scripted(tiny_module):
        def __init__(self, monitor="val_acc", patience=None, losses=LOSSES):
            super().__init__()
            self.monitor, self.patience, self.losses = monitor, patience, losses
            self.weights, self.values, self.rates, self.validations = {}, [], [], 0

        def note(self, name, value):
            self.log(name, value)
            if name == self.monitor:
                self.values.append(value)
                self.weights[round(value, 4)] = {k: v.clone() for k, v in self.state_dict().items()}

        def on_train_epoch_end(self):
            self.note("train_loss", self.losses[self.current_epoch % 7])

        def on_validation_epoch_end(self):
            self.note("val_acc", 1 - LOSSES[self.validations % 7] - 0.01 * (self.validations // 7))
            self.validations += 1

        def on_train_batch_start(self, batch, batch_idx):
            self.rates.append(self.optimizers().param_groups[0]["lr"])

        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            if self.patience is None:
                return optimizer
            plateau = ReduceLROnPlateau(optimizer, "max", 0.5, self.patience)
            return [optimizer], [{"scheduler": plateau, "monitor": self.monitor}]

    return Scripted


SAVED = {
    "train, every second epoch": ("train_loss", "trainer.check_val_every_n_epoch=2"),
    "train, in mid-epoch": ("train_loss", "trainer.val_check_interval=0.5"),
    "train, by steps": ("train_loss", "+callbacks.best.every_n_train_steps=3"),
    "validation, by steps": ("val_acc", "+callbacks.best.every_n_train_steps=3"),
    "validation at such a step": ("val_acc", "trainer.val_check_interval=2", "+callbacks.best.every_n_train_steps=2"),
    "validation, at each end": (
        "val_acc",
        "trainer.check_val_every_n_epoch=2",
        "+callbacks.best.save_on_train_epoch_end=true",
    ),
    "validation across epochs": (
        "val_acc",
        "trainer.check_val_every_n_epoch=null",
        "trainer.val_check_interval=3",
        "+callbacks.best.save_on_train_epoch_end=true",
    ),
}


@pytest.mark.parametrize("case", SAVED)
def test_a_checkpoint_holds_the_weights_of_its_value(make_trainer, scripted, tiny_data, case):
    monitor, *given = SAVED[case]
    given += ["callbacks=[best]", "callbacks.best.save_top_k=-1", "callbacks.best.filename='best-{step}'"]
    mode = "min" if monitor == "train_loss" else "max"
    trainer = make_trainer(*SHORT, f"monitor={monitor}", f"mode={mode}", *given)
    module = scripted(monitor)
    trainer.fit(module, datamodule=tiny_data())
    found = trainer.checkpoint_callback
    if "across" not in case:  # there some values come when no checkpoint is due
        best = min(module.values) if mode == "min" else max(module.values)
        assert float(found.best_model_score) == pytest.approx(best)
    assert len(found.best_k_models) > 2
    for path, value in found.best_k_models.items():
        weights = module.weights[round(float(value), 4)]
        saved = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.equal(saved[name], weights[name]) for name in weights), Path(path).name


@pytest.mark.parametrize(
    ("monitor", "given", "epochs"),
    [
        ("train_loss", ["trainer.check_val_every_n_epoch=2"], 4),  # the second is the best
        ("train_loss", ["trainer.val_check_interval=0.5"], 4),
        (
            "val_acc",
            ["trainer.check_val_every_n_epoch=2", "+callbacks.early_stopping.check_on_train_epoch_end=true"],
            8,
        ),
        ("val_acc", ["trainer.check_val_every_n_epoch=2"], 8),
    ],
)
def test_patience_counts_values(make_trainer, scripted, tiny_data, monitor, given, epochs):
    """The values of LOSSES from its second on, which get worse for two after the best."""
    losses = [0.9, 0.3, 0.4, 0.5, 0.6, *[0.1] * 9]
    mode = "min" if monitor == "train_loss" else "max"
    trainer = make_trainer(
        *SHORT,
        "callbacks=[early_stopping]",
        "callbacks.early_stopping.patience=2",
        "callbacks.early_stopping.strict=true",
        "trainer.enable_checkpointing=false",
        "trainer.max_epochs=14",
        f"monitor={monitor}",
        f"mode={mode}",
        *given,
    )
    module = scripted(monitor, losses=losses)
    module.on_validation_epoch_end = lambda: module.note("val_acc", 1 - losses[trainer.current_epoch // 2])
    trainer.fit(module, datamodule=tiny_data())
    assert trainer.current_epoch == epochs


def plateau(values):
    """Rates after each value, by torch alone."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule, found = ReduceLROnPlateau(optimizer, "max", 0.5, 0), []
    for value in values:
        schedule.step(value)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("every", [2, 3])
def test_a_plateau_counts_validations(make_trainer, scripted, tiny_data, every):
    given = ["callbacks=none", "trainer.enable_checkpointing=false", f"trainer.check_val_every_n_epoch={every}"]
    module = scripted(patience=0)
    make_trainer(*SHORT, *given, "trainer.max_epochs=14").fit(module, datamodule=tiny_data())
    expected = [0.1, *plateau(module.values)]
    assert module.rates[::4] == pytest.approx([expected[epoch // every] for epoch in range(14)])
    assert len(set(module.rates)) > 1


def test_a_resumed_run_goes_on_counting(make_trainer, scripted, tiny_data, run_dir):
    """A validation every third step, across epochs of four: the plateau looks at one when the epoch ends."""
    given = ["callbacks=[best,last]", "trainer.check_val_every_n_epoch=null", "trainer.val_check_interval=3"]
    given += ["callbacks.last.every_n_train_steps=1", "+callbacks.best.every_n_train_steps=2", *SHORT]
    whole = scripted(patience=1)
    make_trainer(*given).fit(whole, datamodule=tiny_data())
    for steps in (7, 14, 28):
        trainer, module = make_trainer(*given, f"trainer.max_steps={steps}"), scripted(patience=1)
        path = run_dir / "checkpoints" / "last.ckpt" if steps > 7 else None
        trainer.fit(module, datamodule=tiny_data(), ckpt_path=path, weights_only=True)
    assert module.rates == whole.rates and len(set(whole.rates)) > 1
