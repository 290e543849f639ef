import pytest
import torch

from boltlab.callbacks import Last
from boltlab.ground.errors import UserError

pytestmark = pytest.mark.floats


def files(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def steps_of(run_dir, *names):
    return [torch.load(run_dir / "checkpoints" / f"{n}.ckpt", weights_only=True)["global_step"] for n in names]


@pytest.mark.parametrize(("mode", "best"), [("max", 2), ("min", 6)])
def test_last_is_the_newest_and_best_the_best(make_trainer, tiny_module, tiny_data, run_dir, mode, best):
    trainer = make_trainer(
        f"mode={mode}", "logger=none", "callbacks=[best,last]", "trainer.max_epochs=3", "trainer.limit_train_batches=2"
    )
    trainer.fit(tiny_module(val_metric=lambda epoch: -float(epoch)), datamodule=tiny_data())
    assert files(run_dir) == ["best.ckpt", "last.ckpt"]
    assert steps_of(run_dir, "last", "best") == [6, best]  # two steps an epoch


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
def test_going_on_overwrites_in_place_and_keeps_the_best(make_trainer, tiny_module, tiny_data, run_dir):
    overrides = ["logger=none", "callbacks=[best,last]", "trainer.limit_train_batches=2"]
    make_trainer(*overrides).fit(tiny_module(val_metric=lambda epoch: -float(epoch)), datamodule=tiny_data())
    trainer = make_trainer(*overrides, "trainer.max_epochs=4")
    trainer.fit(
        tiny_module(val_metric=lambda epoch: -float(epoch)),
        datamodule=tiny_data(),
        ckpt_path=run_dir / "checkpoints" / "last.ckpt",
        weights_only=True,
    )
    assert files(run_dir) == ["best.ckpt", "last.ckpt"]
    assert steps_of(run_dir, "last", "best") == [8, 2]


def test_last_in_mid_epoch_and_those_before(make_trainer, tiny_module, tiny_data, run_dir):
    every = ("callbacks.last.every_n_train_steps=3", "callbacks.last.keep_last=3")
    trainer = make_trainer("logger=none", "callbacks=[last]", *every, "trainer.max_epochs=2")
    trainer.fit(tiny_module(), datamodule=tiny_data())
    assert steps_of(run_dir, "last", "last-1", "last-2") == [8, 6, 4]  # both epochs' ends, and the sixth
    assert len(files(run_dir)) == 3


def test_last_refuses_a_trainer_that_would_not_save(make_trainer, tiny_module, tiny_data, run_dir):
    trainer = make_trainer("trainer.enable_checkpointing=true", callbacks=[Last(run_dir)])
    with pytest.raises(UserError, match="Trainer of boltlab train"):
        trainer.fit(tiny_module(), datamodule=tiny_data())
