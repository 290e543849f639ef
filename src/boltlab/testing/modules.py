"""The tests of a LightningModule, by short trainings in this process."""

import difflib
import os
import shlex
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

import boltlab
from boltlab import runs
from boltlab.commands import train
from boltlab.config import auto as machine
from boltlab.config.build import build
from boltlab.config.compose import compose
from boltlab.config.sources import groups
from boltlab.ground import credentials
from boltlab.testing.base import ConfigTests, differing, digests
from boltlab.training import fit, plain, probe

STEPS = 50  # in which the loss of one batch halves
_COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")  # of checkpoints
_DEVICES: dict[str, Any] = {"cuda": torch.cuda, "mps": torch.backends.mps}


class ModuleTests(ConfigTests):
    """Tests of the LightningModule of a config. A small net and few data make them quick: some seconds altogether.

    overfit: overrides for `test_the_loss_halves_on_one_batch` alone, such as a larger learning rate.
    """

    overfit: ClassVar[str] = ""

    def test_builds_from_its_config(self) -> None:
        """The config has no mistake, and describes a LightningModule."""
        assert isinstance(build(self.composed(), "model"), pl.LightningModule)

    def test_its_config_is_golden(self, request: pytest.FixtureRequest) -> None:
        """The resolved config equals the text in `golden/`, beside the test file, so that a changed default is seen.

        `BOLTLAB_UPDATE_GOLDEN=1 pytest` writes it. Where a machine chooses it holds `auto`, and references to the
        environment stay.
        """
        given = [*shlex.split(self.config), *(["local=null"] if "local" in groups() else [])]
        config, unsettled = compose("train", given).config, compose("train", given, check=False).config
        config.update({key: unsettled[key] for key in machine.KEYS} | {"run_dir": "run"})
        text = yaml.safe_dump(credentials.with_references(config), sort_keys=False, allow_unicode=True)
        path = request.path.parent / "golden" / f"{request.path.stem}.{type(self).__name__}.yaml"
        how = f"BOLTLAB_UPDATE_GOLDEN=1 pytest {request.path.name} -k {type(self).__name__}"
        if os.environ.get("BOLTLAB_UPDATE_GOLDEN"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        if not path.is_file():
            pytest.fail(f"there is no {path}; to write it: {how}")
        before, now = path.read_text(encoding="utf-8").splitlines(), text.splitlines()
        if changes := list(difflib.unified_diff(before, now, str(path), "now", lineterm="", n=2)):
            pytest.fail("\n".join(["the config has changed", *changes, f"if that is meant: {how}"]))

    def test_a_step_is_deterministic(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        """Two builds from the same seed have the same batches, losses and gradients, to the bit."""
        for one, other in zip_longest(*(self._trained(tmp_path_factory, number)[1].seen for number in (0, 1))):
            found = differing(one or {}, other or {})
            assert not found, f"two trainings from the same seed differ first in {', '.join(found[:8])}"

    def test_resumes_to_the_bit(self, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
        """A training that is interrupted in mid-epoch and resumed equals one that is not: weights and optimizers."""
        whole, watch = self._trained(tmp_path_factory)
        at = max(2, -(-3 * watch.batches // 4))
        with pytest.raises(_Interrupted):
            _train(self.overrides(f"log_dir={tmp_path}"), _Watch(at))
        folder = next(runs.folders(tmp_path))
        _train([f"resume={folder}"])
        if found := differing(_state(whole), _state(folder)):
            if differing(_state(whole), _state(self._trained(tmp_path_factory, 1)[0])):
                pytest.skip("two trainings differ without an interruption: see test_a_step_is_deterministic")
            reason = runs.read_summary(folder).get("exact_reason") or "is a state kept in an object of its own?"
            where = f"interrupted before batch {at}, after the resume"
            pytest.fail(f"{where} these differ: {', '.join(found[:8])}; {reason}")

    def test_its_checkpoint_loads(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        """torch loads the checkpoint with `weights_only=True`, `boltlab.load` builds a module with the same weights."""
        folder = self._trained(tmp_path_factory)[0]
        content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        saved = {name.replace("_orig_mod.", ""): value for name, value in content["state_dict"].items()}
        model = boltlab.load(folder, "last")
        weights = dict(model.named_parameters()) | {k: v for k, v in model.named_buffers() if k in saved}
        found = differing(digests(weights), digests({name: saved.get(name) for name in weights}))
        assert not found, f"these weights are not loaded as they were saved: {', '.join(found[:8])}"

    @pytest.mark.parametrize("device", ["cpu", *_DEVICES])
    def test_runs_on(self, device: str, tmp_path: Path) -> None:
        """The module trains, validates and is tested on the device."""
        if device in _DEVICES and not _DEVICES[device].is_available():
            pytest.skip(f"this machine has no {device}")
        where = (f"trainer.accelerator={device}", f"log_dir={tmp_path}")
        _train(self.overrides("trainer.max_epochs=1", "test=true", *where))

    def test_the_loss_halves_on_one_batch(self, tmp_path: Path) -> None:
        """Trained on one batch alone, the loss halves within 50 steps: the gradients reach the weights."""
        config = probe.quiet(self.composed(*shlex.split(self.overfit)), str(tmp_path))
        pl.seed_everything(config.seed, verbose=False)
        data, model, watch = build(config, "data"), build(config, "model"), _Watch(STEPS + 1)
        if not model.automatic_optimization:
            pytest.skip(f"{type(model).__name__} optimizes manually: training_step need not return a loss")
        own = (data if plain.has(data, "train_dataloader") else model).train_dataloader
        data.train_dataloader = lambda: _repeated(own())
        trainer = fit.make_trainer(config)
        trainer.callbacks.append(watch)
        with suppress(_Interrupted):
            trainer.fit(model, datamodule=data)
        if not watch.losses or watch.losses[0] <= 0:
            pytest.skip(f"training_step gives no loss above 0: {watch.losses[:1]}")
        first, best = watch.losses[0], min(watch.losses)
        cure = 'a larger learning rate for this test alone: overfit = "optimizer.lr=0.01"'
        assert best <= first / 2, f"in {STEPS} steps on one batch the loss fell from {first:.4g} to {best:.4g}; {cure}"

    def _trained(self, folders: pytest.TempPathFactory, number: int = 0) -> "tuple[Path, _Watch]":
        """One of the class's two uninterrupted trainings, which its tests share: its run folder and what was seen."""
        known = vars(type(self)).get("_known", {})
        if number not in known:
            watch, log_dir = _Watch(), folders.mktemp("trained")
            _train(self.overrides(f"log_dir={log_dir}"), watch)
            type(self)._known = known | {number: (next(runs.folders(log_dir)), watch)}  # type: ignore[attr-defined]
        return vars(type(self))["_known"][number]


class _Interrupted(Exception):
    pass


class _Watch(pl.Callback):
    """Notes what each batch is and gives; raises before the batch number `interrupt_at`, from 1."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.interrupt_at, self.batches = interrupt_at, 0
        self.seen: list[dict[str, str]] = []
        self.losses: list[float] = []

    def _see(self, what: str, value: Any) -> None:
        self.seen.append({f"{what}{path} of step {self.batches}": found for path, found in digests(value).items()})

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batches += 1
        if self.batches == self.interrupt_at:
            raise _Interrupted
        self._see("the batch", batch)

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self._see("the gradient", {name: p.grad for name, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self._see("the output", outputs)
        if isinstance(outputs, dict) and "loss" in outputs:
            self.losses.append(float(outputs["loss"]))


def _repeated(loaders: Any) -> Any:
    """A loader that gives the first batch again and again; it has one more than are trained on, for an epoch's end
    could ask for a validation."""
    combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "max_size_cycle")
    batches: Any = [next(iter(combined))[0]] * (STEPS + 1)
    return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)


def _train(overrides: list[str], *callbacks: pl.Callback) -> None:
    """`boltlab train` in this process, with more callbacks."""

    def make_trainer(*arguments: Any, _make: Any = fit.make_trainer, **keywords: Any) -> Any:
        trainer = _make(*arguments, **keywords)
        trainer.callbacks.extend(callbacks)
        return trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "make_trainer", make_trainer)
        patch.delenv("PYTEST_CURRENT_TEST", raising=False)  # else what was composed before is composed again
        train.main(overrides)


def _state(folder: Path) -> dict[str, str]:
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return digests({key: content[key] for key in _COMPARED})
