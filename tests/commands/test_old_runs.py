"""A run folder that commit 91afdfd left, stopped in the middle of its third epoch, stays usable for good."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import boltlab as public

pytestmark = pytest.mark.floats

KEPT = Path(__file__).parent / "runs" / "91afdfd"
RUN = "2026-11-29_16-20-08_digits_mlp-d676d3"


@pytest.fixture
def old_run(tmp_path):
    folder = tmp_path / "logs" / "train" / RUN
    shutil.copytree(KEPT / "digits_mlp", folder)
    return folder


def test_it_is_small():
    assert sum(path.stat().st_size for path in KEPT.rglob("*") if path.is_file()) < 100_000


def test_it_resumes_to_the_weights_of_the_run_that_was_not_stopped(old_run, boltlab):
    code, _, err = boltlab("train", f"resume={RUN}")
    assert code == 0, err
    expected = json.loads((KEPT / "uninterrupted.json").read_text())
    weights = torch.load(old_run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, values in expected["weights"].items():
        torch.testing.assert_close(weights[name], torch.tensor(values), rtol=0, atol=1e-4)
    test = json.loads((old_run / "summary.json").read_text())["test"]
    assert test == pytest.approx(expected["test"], abs=1e-3)


def test_it_is_loaded_evaluated_and_listed(old_run, boltlab):
    model = public.load(RUN)
    saved = torch.load(old_run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(model.state_dict()["net.layers.0.weight"], saved["net.layers.0.weight"])
    code, out, err = boltlab("eval", f"run={RUN}", "split=val")
    assert code == 0 and "val_acc" in out, err
    code, out, err = boltlab("runs", "columns=run,status,seed,model")
    assert code == 0 and RUN in out and "interrupted" in out, err


def test_its_weights_begin_a_new_run(old_run, boltlab):
    overrides = json.loads((old_run / "summary.json").read_text())["start"]["overrides"]
    kept = [text for text in overrides if not text.startswith("name=")]
    code, out, err = boltlab("train", f"init_from={RUN}", *kept, "trainer.max_epochs=1", "test=false")
    assert code == 0 and "4 of 4 tensors" in out, err
