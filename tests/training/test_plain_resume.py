"""A plain module that was killed and resumed equals one that was not, to the bit: weights, optimizers, logged rows."""

import json
import random
import signal

import pytest
import torch
from training.kills import at, while_saving
from training.rows import KIN, MODULES, ROWS, WITHOUT_VALIDATION, WORKERS, net
from warm import at_step, differences, outcome

pytestmark = pytest.mark.floats


def assert_same(expected, found):
    assert differences(outcome(expected), outcome(found)) == []


def steps_an_epoch(folder):
    content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["completed"]


# -- without a kill


class Failed(Exception):
    pass


def fails_at(monkeypatch, step):
    """The step raises, once."""
    from zoo.modules import VAE

    steps, original = [], VAE.training_step

    def training_step(self, batch, batch_idx):
        if self.trainer.global_step == step and not steps:
            steps.append(step)
            raise Failed("this step fails")
        return original(self, batch, batch_idx)

    monkeypatch.setattr(VAE, "training_step", training_step)


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 7, 13])
def test_a_run_that_failed_in_a_step_resumes_to_the_same_bits(inside, tmp_path, monkeypatch, step):
    overrides = MODULES["VAE"]
    assert inside(*overrides, "log_dir=whole")[0] == 0
    fails_at(monkeypatch, step)
    with pytest.raises(Failed):
        inside(*overrides, "log_dir=failed")
    code, out, err = inside("train", "resume=latest", "log_dir=failed")
    assert code == 0, err
    epoch, batch = divmod(step, 7)
    middle = f", after batch {batch} of epoch {epoch + 1}" if batch else ""
    assert f"last.ckpt, step {step}, {epoch} epochs done{middle}\n" in out
    whole, failed = (next((tmp_path / name / "train").iterdir()) for name in ("whole", "failed"))
    assert_same(whole, failed)
    summary = json.loads((failed / "summary.json").read_text())
    assert summary["exact"] is True and summary["exact_reason"] is None


@pytest.mark.slow
@pytest.mark.parametrize("row", ["VAE", "the template's kind", "segmentation"])
def test_a_finished_run_is_made_longer_exactly(inside, tmp_path, row):
    assert inside(*ROWS[row], "log_dir=whole")[0] == 0
    assert inside(*ROWS[row], "log_dir=longer", "trainer.max_epochs=2")[0] == 0
    code, _, err = inside("train", "resume=latest", "log_dir=longer", "trainer.max_epochs=3")
    assert code == 0, err
    assert_same(*(next((tmp_path / name / "train").iterdir()) for name in ("whole", "longer")))


# -- killed


# Of rows that do not validate at an epoch's end, or save or end elsewhere.
KILLS = {
    "plateau by steps": ("0.4", "1.5@on_validation_start"),
    "val_check_interval": ("0.2", "1.5@on_validation_start"),
    "val_check_interval over epochs": ("0.1", "1.2@on_validation_start"),
    "accumulation, val_check_interval": ("0.4", "1.5@on_validation_epoch_end"),
    "validation every second epoch": ("0.1", "1.{last}@on_validation_start"),
    "max_steps": ("0.2", "1.5"),
    "reloaded every second epoch": ("1.2", "2.1"),
    "checkpoints at epochs' ends": ("1.0", "2.1"),
    "checkpoints every second epoch": ("2.0", "2.1"),
}


def kills_of(row):
    """Two kills, other ones for each row: one in an epoch, one at an epoch's end or in a validation."""
    if row in KILLS:
        return KILLS[row]
    ends = ["1.{last}", "1.{last}@on_train_epoch_end", "1.{last}@on_train_epoch_start", "2.0"]
    if WITHOUT_VALIDATION not in ROWS[row] and "dataloader_iter" not in row:
        ends += ["1.{last}@on_validation_start", "1.{last}@on_validation_epoch_end"]
    chance = random.Random(row)
    return f"0.{chance.choice([1, 2])}", chance.choice(ends)


def places(kills, folder):
    return [kill.format(last=steps_an_epoch(folder) - 1) for kill in kills]


@pytest.mark.faults
@pytest.mark.parametrize("row", [row for row in ROWS if row not in KIN])
def test_killed_twice_and_the_same_to_the_bit(run, row):
    _, whole = run("whole", *ROWS[row])
    first, second = places(kills_of(row), whole)
    run("killed", *ROWS[row], before=at(first), code=-signal.SIGKILL)
    run("killed", "train", "resume=latest", before=at(second), code=-signal.SIGKILL)
    _, found = run("killed", "train", "resume=latest")
    assert_same(whole, found)
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, found)]
    assert all(summary["exact"] is True for summary in summaries), summaries


@pytest.mark.faults
@pytest.mark.parametrize("row", WORKERS)
def test_another_number_of_workers_resumes_to_the_same_bits(run, row):
    overrides, after = WORKERS[row]
    _, whole = run("whole", *overrides)
    run("killed", *overrides, before=at("0.2"), code=-signal.SIGKILL)
    run("killed", "train", "resume=latest", f"data.num_workers={after}", before=at("1.3"), code=-signal.SIGKILL)
    assert_same(whole, run("killed", "train", "resume=latest")[1])


@pytest.mark.faults
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("row", ["VAE", "two optimizers, one accumulating by hand"])
def test_what_is_drawn_on_a_device_resumes_to_the_same_bits(run, row, device):
    """`torch.randn_like`, dropout: by the generator of the device."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    overrides = (*MODULES[row], f"trainer.accelerator={device}")
    _, whole = run("whole", *overrides)
    run("killed", *overrides, before=at("1.3"), code=-signal.SIGKILL)
    assert_same(whole, run("killed", "train", "resume=latest")[1])


@pytest.mark.faults
@pytest.mark.parametrize("number", [2, 7, 9])
def test_killed_while_saving(run, number):
    _, whole = run("whole", *net())
    run("killed", *net(), before=while_saving(number), code=-signal.SIGKILL)
    assert_same(whole, run("killed", "train", "resume=latest")[1])


@pytest.mark.faults
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_batch_end"])
@pytest.mark.parametrize("step", [3, 7])
def test_sigterm_saves_and_the_run_resumes_to_the_same_bits(run, hook, step):
    overrides = (*net(), "callbacks.last.every_n_train_steps=null")
    _, whole = run("whole", *overrides)
    run("stopped", *overrides, before=at_step(step, signal.SIGTERM, hook), code=128 + signal.SIGTERM)
    _, found = run("stopped", "train", "resume=latest")
    assert_same(whole, found)


def logged_in_steps(found):
    """The epoch's values of the shorter run stand beside those of its last step."""
    names = ("epoch", "step", "train_loss_step", "acc_step", "after", "odd")
    return [[row[name] for name in names] for row in found["rows"] if row.get("train_loss_step")]


@pytest.mark.faults
@pytest.mark.parametrize(("limit", "more"), [(10, 16), (7, 9), (15, 21)])
def test_a_run_that_max_steps_has_ended_is_made_longer_exactly(run, limit, more):
    """In the middle of an epoch, at its end, and behind a first one."""
    _, whole = run("whole", *net(), f"trainer.max_steps={more}")
    run("longer", *net(), f"trainer.max_steps={limit}")
    _, found = run("longer", "train", "resume=latest", f"trainer.max_steps={more}")
    expected, ours = outcome(whole), outcome(found)
    assert logged_in_steps(ours) == logged_in_steps(expected)
    assert differences(expected["state_dict"], ours["state_dict"]) == []
    assert differences(expected["optimizer_states"], ours["optimizer_states"]) == []


@pytest.mark.faults
@pytest.mark.parametrize(
    ("row", "interval"),
    [
        ("multi-label", "3"),
        ("the template's kind", "1.0"),
        ("LSTM, plateau", "1.0"),
        ("SimCLR, plateau on a training value", "3"),
    ],
)
def test_without_last_the_file_of_model_checkpoint_is_as_good(run, row, interval):
    """It is saved at the end of a validation in an epoch, or in the hooks of an epoch's end."""
    overrides = (
        *ROWS[row],
        "callbacks=[best,last]",
        "callbacks.best.save_top_k=-1",
        "callbacks.best.filename='{step}'",
    )
    overrides += (f"trainer.val_check_interval={interval}",)
    _, whole = run("whole", *overrides)
    for place in ("1.2", "2.0"):
        _, killed = run(place, *overrides, before=at(place), code=-signal.SIGKILL)
        (killed / "checkpoints" / "last.ckpt").unlink()
        child, found = run(place, "train", "resume=latest")
        assert "resumes from last" not in child.stdout
        assert_same(whole, found)


# -- every row, every kind of kill


KINDS = ("0.1", "0.{last}", "1.0", "1.{last}", "2.0", "2.{last}")
KINDS += ("0.{last}@on_train_epoch_end", "1.{last}@on_train_epoch_start", "1.2+2.0+2.1")
IN_VALIDATION = ("0.{last}@on_validation_start", "1.{last}@on_validation_batch_start")
IN_VALIDATION += ("1.{last}@on_validation_epoch_end",)


@pytest.mark.exhaustive
@pytest.mark.parametrize("row", ROWS)
def test_every_kind_of_kill(run, row):
    _, whole = run("whole", *ROWS[row])
    validates = WITHOUT_VALIDATION not in ROWS[row] and "dataloader_iter" not in row
    differing = {}
    for number, kind in enumerate(places(KINDS + (IN_VALIDATION if validates else ()), whole)):
        command = ROWS[row]
        for kill in kind.split("+"):
            child, _ = run(f"{number}", *command, before=at(kill), code=None)
            command = ("train", "resume=latest")
            if child.code != -signal.SIGKILL:
                break
        if child.code != 0:
            differing[kind] = differences(outcome(whole), outcome(run(f"{number}", *command)[1]))
    for number in (1, 3, 8):
        run(f"saving {number}", *ROWS[row], before=while_saving(number), code=None)
        child, found = run(f"saving {number}", "train", "resume=latest", code=None)
        differing[f"saving {number}"] = differences(outcome(whole), outcome(found))
    assert {kind: found[:4] for kind, found in differing.items() if found} == {}


# -- the controls: without a part of the mechanism the runs differ


CONTROLS = {
    "seeds of the steps": """
from boltlab.training.resume_state import Resume
Resume._seed_step = lambda self: None
""",
    "order": """
from boltlab.training import orders
orders.seed_all = lambda key: None
""",
    "position": """
from boltlab.training.loaders import Exact
Exact.load_state_dict = lambda self, state: None
""",
    "draws of the data": """
from boltlab.training import draws
draws._begin = lambda seeded, key: vars(seeded)["_seeded"][0]
""",
    "sums of self.log": """
from boltlab.training import lightning_private
lightning_private.restore_logged_sums = lambda *arguments: None
""",
    "state of the module": """
from boltlab.training.module_state import ModuleState
ModuleState.restore = lambda *arguments: None
""",
    "place of the checkpoint": """
from boltlab.callbacks.last import Last
from boltlab.training import resume_state
def on_fit_start(self, trainer, module):
    self.state, self._lasts = resume_state.ModuleState(module), []
def after_a_batch(self, trainer, *arguments, _marks=Last.on_train_batch_end):
    _marks(self, trainer, *arguments)
    self.between_batches(trainer)
def after_an_epoch(self, trainer, *arguments, _marks=Last.on_train_epoch_end):
    _marks(self, trainer, *arguments)
    self.save_due(trainer)
resume_state.Resume.on_fit_start = on_fit_start
Last.called, Last.on_train_batch_end, Last.on_train_epoch_end = True, after_a_batch, after_an_epoch
""",
}


SEEN_WITH = {
    "seeds of the steps": net("weighted", 1),  # without a worker, reading the batch seeds the same generators
    "place of the checkpoint": MODULES["own on_train_batch_end, frozen parts"],
}


@pytest.mark.faults
@pytest.mark.parametrize("left_out", CONTROLS)
def test_without_it_the_runs_differ(run, left_out):
    control = CONTROLS[left_out]
    overrides = SEEN_WITH.get(left_out, net("weighted"))
    _, whole = run("whole", *overrides, before=control)
    run("killed", *overrides, before=control + at("1.3"), code=-signal.SIGKILL)
    _, found = run("killed", "train", "resume=latest", before=control)
    assert differences(outcome(whole), outcome(found))
