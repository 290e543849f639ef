"""Plain LightningModules and data modules (`zoo`), trained, killed and resumed by command."""

import signal
from pathlib import Path

import pytest
from warm import FORKED, differences, only_run, outcome

ZOO = f"""
import boltlab.trust
sys.path.insert(0, {str(Path(__file__).parent)!r})
boltlab.trust.PACKAGES += ("zoo",)
"""
QUICK = ("train", "logger=none", "trainer.accelerator=cpu", "trainer.max_epochs=3", "trainer.log_every_n_steps=1")
QUICK += ("trainer.enable_progress_bar=false", "monitor=val_loss", "mode=min", "test=false")
QUICK += ("~model", "~data", "~scheduler", "callbacks=[last]", "callbacks.last.every_n_train_steps=1")


def plain(model, data="tables.Table", **data_arguments):
    """Overrides that train `zoo.<model>` on `zoo.<data>`."""
    arguments = [f"+data.{key}={value}" for key, value in data_arguments.items()]
    return *QUICK, f"+model._target_=zoo.{model}", f"+data._target_=zoo.{data}", *arguments


@pytest.fixture
def run(warm, tmp_path):
    """Runs `boltlab` in a folder of its own below the test's: (the finished child, its only run folder)."""

    def go(name, *arguments, before="", code=0, two=False):
        (tmp_path / name).mkdir(exist_ok=True)
        child = warm(*arguments, folder=tmp_path / name, before=ZOO + (FORKED if two else "") + before).wait()
        assert child.code == code, (child.code, child.stdout[-1000:], child.stderr[-5000:])
        assert "Traceback" not in child.stderr
        return child, only_run(tmp_path / name / "logs")

    return go


def killed(epoch, batch, hook="on_train_batch_start"):
    """Python for `before`: the process is killed in a hook at that batch of that epoch, once all else has been called.

    It is the module's own hook, wrapped: checkpoints of the batch before are written by then.
    """
    return f"""
import lightning.pytorch as pl
from lightning.pytorch.trainer import call
def hooks(trainer, name, *arguments, _call=call._call_lightning_module_hook, **keywords):
    loop = trainer.fit_loop
    if name == {hook!r} and (trainer.current_epoch, loop.batch_idx) == ({epoch}, {batch}):
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    return _call(trainer, name, *arguments, **keywords)
call._call_lightning_module_hook = hooks
"""


def all_differences(expected, found):
    return differences(outcome(expected), outcome(found))
