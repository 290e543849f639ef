"""Shared by the tests of modules and of data modules."""

import hashlib
import shlex
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from torch.utils._pytree import keystr, tree_flatten_with_path

from boltlab.callbacks.last import Last
from boltlab.config import project
from boltlab.config.compose import compose

# Warnings about the machine, those that no user can mend, and those about what the checks say themselves.
_NOISE = "does not have many workers|.PU available but not used|MPS available but not used|The `srun` command"
_NOISE += "|`isinstance.treespec, LeafSpec|This process .* is multi-threaded|`training_step` returned `None`"
_NOISE += "|Total length of `DataLoader` across ranks is zero|You defined a `validation_step` but have no"
# Two epochs of four steps in float32, with a checkpoint at each step.
SHORT = f"""logger=csv compile=false precision=32 test=false init_from=null trainer.accelerator=cpu trainer.devices=1
trainer.num_nodes=1 trainer.strategy=auto trainer.enable_progress_bar=false trainer.max_epochs=2 trainer.min_epochs=null
trainer.max_steps=-1 trainer.min_steps=null trainer.accumulate_grad_batches=1 trainer.overfit_batches=0
trainer.limit_train_batches=4 trainer.limit_val_batches=2 trainer.limit_test_batches=2 trainer.val_check_interval=null
trainer.check_val_every_n_epoch=1 ++callbacks.last._target_={Last.__module__}.Last
++callbacks.last.dirpath=${{run_dir}}/checkpoints ++callbacks.last.every_n_train_steps=1"""


class ConfigTests:
    """A class of tests that names a config; they run in the folder of the project that the test file belongs to.

    config: overrides that compose a training, as `boltlab train` takes them.
    """

    config: ClassVar[str] = ""
    pytestmark = pytest.mark.filterwarnings(f"ignore:.*({_NOISE})")

    @pytest.fixture(autouse=True)
    def _in_the_project(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        if found := project.find(request.path.parent):
            monkeypatch.chdir(found.root)

    def overrides(self, *more: str) -> list[str]:
        """Those of the class, those that make its training short, and `more`."""
        return [*shlex.split(self.config), *SHORT.split(), *more]

    def composed(self, *more: str) -> DictConfig:
        """The checked config of a short training."""
        return compose("train", self.overrides(*more)).config


def digests(value: Any) -> dict[str, str]:
    """The path of each tensor, array, number and text in a nested value → what is equal where all its bits are."""
    return {keystr(path): _digest(leaf) for path, leaf in tree_flatten_with_path(value)[0]}


def _digest(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        leaf = leaf.detach().to_dense().cpu().contiguous()
        bits = leaf.reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{leaf.dtype}{list(leaf.shape)}{hashlib.sha256(bits).hexdigest()}"
    if isinstance(leaf, np.ndarray | np.generic):
        return f"{leaf.dtype}{leaf.shape}{hashlib.sha256(leaf.tobytes()).hexdigest()}"
    plain = isinstance(leaf, bool | int | float | complex | str | bytes | None)
    return repr(leaf) if plain else type(leaf).__name__


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    """The paths at which two `digests` are not equal."""
    return [path for path in one | other if one.get(path) != other.get(path)]
