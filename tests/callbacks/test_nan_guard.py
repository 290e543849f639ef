import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from boltlab.callbacks.nan_guard import NaNGuard, NonFiniteLoss
from boltlab.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory")


def breaking(tiny_module, at_step: int, value: float):
    """A module whose loss is `value` at one step, counted from 0."""

    class Breaking(tiny_module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss * value if self.global_step == at_step else loss

    return Breaking()


def checkpoint_is_finite(path: Path) -> bool:
    state = torch.load(path, weights_only=True)["state_dict"]
    return all(bool(tensor.isfinite().all()) for tensor in state.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_run_stops_at_the_step_whose_loss_is_not_finite(make_trainer, tiny_module, tiny_data, run_dir, value):
    trainer = make_trainer("logger=none", "callbacks=[nan_guard,best,last]")
    module = breaking(tiny_module, at_step=6, value=value)
    with pytest.raises(UserError, match=rf"loss is {value} at step 7 \(epoch 1, batch 2"):
        trainer.fit(module, datamodule=tiny_data())
    assert trainer.global_step == 7
    for name in ("best", "last"):
        assert checkpoint_is_finite(run_dir / "checkpoints" / f"{name}.ckpt")
        assert torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.parametrize("every_n_steps", [3, 1000])
def test_losses_looked_at_together_are_still_seen_before_anything_is_saved(
    make_trainer, tiny_module, tiny_data, run_dir, every_n_steps
):
    class AsOnAccelerator(NaNGuard):
        def on_train_start(self, trainer, pl_module):
            super().on_train_start(trainer, pl_module)
            self._stride = self.every_n_steps

    trainer = make_trainer(callbacks=[AsOnAccelerator(every_n_steps)])
    trainer.callbacks.append(ModelCheckpoint(run_dir / "checkpoints", "last"))
    with pytest.raises(NonFiniteLoss, match=r"nan at step 2 \(epoch 0, batch 1"):
        trainer.fit(breaking(tiny_module, at_step=1, value=math.nan), datamodule=tiny_data())
    assert trainer.global_step == min(every_n_steps, 4)
    assert not (run_dir / "checkpoints").exists()


def test_weights_that_a_finite_loss_has_broken_are_not_saved(make_trainer, tiny_module, tiny_data, run_dir):
    class BadGradient(tiny_module):
        def on_before_optimizer_step(self, optimizer):
            if self.global_step == 7:  # the last step of the second epoch: no later loss shows it
                self.net[-1].bias.grad.fill_(math.inf)

    trainer = make_trainer("logger=none", "callbacks=[nan_guard,last]", "trainer.limit_val_batches=0")
    with pytest.raises(NonFiniteLoss, match="weights are not finite after step 8"):
        trainer.fit(BadGradient(), datamodule=tiny_data())
    assert checkpoint_is_finite(run_dir / "checkpoints" / "last.ckpt")


def test_the_checkpoint_of_an_exception_is_not_made_of_a_broken_model(make_trainer, tiny_module, tiny_data, run_dir):
    trainer = make_trainer("logger=none", "callbacks=[nan_guard,last,best]", "+callbacks.best.save_on_exception=true")
    with pytest.raises(NonFiniteLoss):
        trainer.fit(breaking(tiny_module, at_step=6, value=math.nan), datamodule=tiny_data())
    assert checkpoint_is_finite(run_dir / "checkpoints" / "last.ckpt")


def test_a_healthy_run_is_left_alone(make_trainer, tiny_module, tiny_data):
    torch.manual_seed(0)
    guarded, plain = tiny_module(), tiny_module()
    plain.load_state_dict(guarded.state_dict())
    for module, callbacks in ((guarded, [NaNGuard()]), (plain, [])):
        torch.manual_seed(1)
        make_trainer(callbacks=callbacks).fit(module, datamodule=tiny_data())
    for one, other in zip(guarded.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)
