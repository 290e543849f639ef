"""For the tests that stop runs: at a step, a run says that it is there, and waits until it is told to stop; no more
once there is a file `go` where it runs."""

SOURCE = """
import os, time
from pathlib import Path
from lightning.pytorch import Callback
from boltlab.ground import signals

class Pause(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        folder = Path(trainer.default_root_dir)
        if trainer.global_step == self.step and not (folder / "paused").exists() and not Path("go").exists():
            (folder / "pausing").write_text(str(os.getpid()))
            (folder / "pausing").rename(folder / "paused")  # nobody reads it half-written
            end = time.monotonic() + 3600  # longer than any test waits
            while not signals.inbox.stop and time.monotonic() < end:
                time.sleep(0.02)
"""


def pause(folder, step):
    """Overrides that let a run wait at a step; `folder` is where it runs."""
    (folder / "pausing_callback.py").write_text(SOURCE, encoding="utf-8")
    return ("+callbacks.pause._target_=pausing_callback.Pause", f"+callbacks.pause.step={step}")
