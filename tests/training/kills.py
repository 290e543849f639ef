"""Where a run is killed, as Python that runs in it first."""

import signal


def at(place, signum=signal.SIGKILL):
    """`epoch.batch@hook`: in that hook of the module, before it is called; checkpoints of all before are written.

    The batch is the one that the trainer counts as its newest; at an epoch's start that is the last of the one before.
    """
    place, _, hook = place.partition("@")
    epoch, batch = place.split(".")
    return f"""
from lightning.pytorch.trainer import call
def hooks(trainer, name, *arguments, _call=call._call_lightning_module_hook, **keywords):
    loop = trainer.fit_loop
    if name == {hook or "on_train_batch_start"!r} and (trainer.current_epoch, loop.batch_idx) == ({epoch}, {batch}):
        os.kill(os.getpid(), {int(signum)})
    return _call(trainer, name, *arguments, **keywords)
call._call_lightning_module_hook = hooks
"""


def while_saving(number):
    """In the middle of writing that checkpoint: its file is there beside its target, and is not yet renamed."""
    return f"""
import boltlab.checkpoints.file as file
def fsync(number, _fsync=os.fsync):
    file.saves = getattr(file, "saves", 0) + (".ckpt." in os.readlink(f"/proc/self/fd/{{number}}"))
    if file.saves == {number}:
        os.kill(os.getpid(), {int(signal.SIGKILL)})
    _fsync(number)
file.os.fsync = fsync
"""


# As a run fails that is not killed: an exception in the step.
RAISES = """
from lightning.pytorch.trainer import call
def hooks(trainer, name, *arguments, _call=call._call_lightning_module_hook, **keywords):
    if name == "on_train_batch_start" and trainer.global_step == {step}:
        raise RuntimeError("this step fails")
    return _call(trainer, name, *arguments, **keywords)
call._call_lightning_module_hook = hooks
"""
