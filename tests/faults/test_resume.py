"""A run that was killed or stopped goes on to the same bits as one that was not (FAULTS 1–3, 5–9, 11–13)."""

import json
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from warm import at_step, differences, only_run, outcome

from boltlab.checkpoints import file as checkpoint_file

# 1,293 training images of digits: 11 batches an epoch, the last of 13.
pytestmark = [pytest.mark.floats, pytest.mark.faults]

QUICK = ("train", "logger=none", "model=mlp", "callbacks=[best,last]", "data.batch_size=128", "trainer.max_epochs=4")
QUICK += ("trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "trainer.log_every_n_steps=1")
EVERY_3 = "callbacks.last.every_n_train_steps=3"
DROPOUT = "model.net.dropout=0.3"

CASES = {
    "mid-epoch, dropout": [DROPOUT, EVERY_3],
    "end of an epoch only": [DROPOUT],
    "augmentation, mixup, EMA, cosine, early stopping, best two": [
        *("augment=basic", "model.mixup_alpha=0.4", "scheduler=cosine", DROPOUT, EVERY_3),
        *("callbacks=[best,last,ema,early_stopping]", "callbacks.early_stopping.patience=2"),
        *("callbacks.best.save_top_k=2", "callbacks.best.filename='best-{epoch}'", "test=false"),
    ],
    "worker processes": ["augment=randaugment", "data.num_workers=2", EVERY_3],
    "plateau, a validation every second epoch": [
        *("scheduler=plateau", "scheduler.patience_epochs=0", "trainer.check_val_every_n_epoch=2", EVERY_3),
    ],
    "plateau at every epoch": ["scheduler=plateau", "scheduler.patience_epochs=0"],
    "accumulated batches": ["trainer.accumulate_grad_batches=3", "callbacks.last.every_n_train_steps=1"],
    "several validations an epoch": ["trainer.val_check_interval=0.25", "callbacks.last.every_n_train_steps=1"],
    "max_steps alone": ["trainer.max_epochs=-1", "trainer.max_steps=30", EVERY_3],
    "max_steps in mid-epoch": ["trainer.max_steps=30"],
    "bf16, muon, clipping": ["precision=bf16-mixed", "optimizer=muon", "trainer.gradient_clip_val=0.1", EVERY_3],
    "balanced classes": ["data.sampler=balanced", EVERY_3],
    "freezing": ["callbacks=[best,last,freeze]", "callbacks.freeze.train_from=[[0,last_layer],[2,'*']]", EVERY_3],
}


@pytest.fixture
def run(warm, tmp_path):
    """Runs `boltlab` in a folder of its own below the test's: (the finished child, its only run folder)."""

    def go(name, *arguments, code=0, **options):
        (tmp_path / name).mkdir(exist_ok=True)
        child = warm(*arguments, folder=tmp_path / name, **options).wait()
        assert child.code == code, (child.code, child.stdout[-1000:], child.stderr[-3000:])
        return child, only_run(tmp_path / name / "logs")

    return go


def assert_same(expected, found):
    assert differences(outcome(expected), outcome(found)) == []


@pytest.mark.parametrize("case", CASES)
def test_killed_twice_and_the_same_to_the_bit(run, case):
    overrides = (*QUICK, *CASES[case])
    _, expected = run("whole", *overrides)
    steps = int(outcome(expected)["global_step"])
    first, second = sorted(random.Random(case).sample(range(1, steps - 1), 2))
    run("killed", *overrides, before=at_step(first), code=-signal.SIGKILL)
    run("killed", "train", "resume=latest", before=at_step(second), code=-signal.SIGKILL)
    child, found = run("killed", "train", "resume=latest")
    assert_same(expected, found)
    assert "Traceback" not in child.stderr
    assert json.loads((found / "summary.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (1, 3)])
def test_another_number_of_workers_goes_on_to_the_same_bits(run, before, after):
    overrides = (*QUICK, "augment=randaugment", EVERY_3, "trainer.max_epochs=2")
    _, expected = run("whole", *overrides)
    run("a", *overrides, f"data.num_workers={before}", before=at_step(5), code=-signal.SIGKILL)
    assert_same(expected, run("a", "train", "resume=latest", f"data.num_workers={after}")[1])


@pytest.mark.parametrize("reading", ["cache=memory", "cache=disk", "decode=fast"])
def test_photographs_however_they_are_read(run, tmp_path, reading):
    random_bytes = random.Random(0).randbytes
    for split, count in (("train", 20), ("val", 5), ("test", 5)):
        for label in "ab":
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                Image.frombytes("RGB", (20, 16), random_bytes(960)).resize((60, 50)).save(folder / f"{i}.jpg")
    overrides = (*QUICK, "data=image_folder", f"data.root={tmp_path}/photos", "data.input_shape=[3,24,24]")
    overrides += (f"data.{reading}", "data.num_workers=2", "data.batch_size=8", EVERY_3, "augment=imagenet")
    if "disk" in reading:
        overrides += (f"data.cache_dir={tmp_path}/cache",)
    _, expected = run("whole", *overrides)
    run("killed", *overrides, before=at_step(8), code=-signal.SIGKILL)
    child, found = run("killed", "train", "resume=latest", "data.num_workers=0")
    assert "after batch 1 of epoch 2" in child.stdout
    assert_same(expected, found)


@pytest.mark.parametrize(
    ("step", "overrides"),
    [(5, [DROPOUT]), (11, []), (13, ["trainer.accumulate_grad_batches=2"])]
    + [(step, ["trainer.val_check_interval=0.25"]) for step in (2, 4, 11)],
)
def test_sigterm_saves_at_its_step_and_the_run_goes_on_to_the_same_bits(run, step, overrides):
    _, expected = run("whole", *QUICK, *overrides)
    child, found = run("stopped", *QUICK, *overrides, before=at_step(step, signal.SIGTERM), code=143)
    saved = torch.load(found / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    summary = json.loads((found / "summary.json").read_text())
    assert summary["status"] == "interrupted" and summary["steps"] == saved >= step
    # Within the step, unless a part of an accumulated batch or a validation had to come first.
    assert saved <= step + 1
    assert f"boltlab train resume={found.relative_to(found.parents[2])}" in child.stderr
    child, found = run("stopped", "train", f"resume={found.name}")
    assert f"resumes from last.ckpt, step {saved}," in child.stdout
    assert_same(expected, found)


def test_stopped_in_the_middle_of_a_validation(run):
    """The validation is run again from its start; nothing of it counts twice."""
    overrides = (*QUICK, "callbacks=[best,last,ema]", "data.batch_size=32", "trainer.max_epochs=2")
    _, expected = run("whole", *overrides)
    before = at_step(41, signal.SIGTERM, hook="on_validation_batch_end")
    _, found = run("stopped", *overrides, before=before, code=143)
    child, found = run("stopped", "train", "resume=latest")
    assert "after batch 41 of epoch 1" in child.stdout
    assert_same(expected, found)


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 138), (signal.SIGTERM, 143)]
)
def test_every_stopping_signal_saves_and_has_its_exit_code(run, signum, code):
    child, found = run("a", *QUICK, before=at_step(4, signum), code=code)
    assert torch.load(found / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5
    assert child.stderr.strip().endswith(f"boltlab train: stopped by {signal.Signals(signum).name}")


def test_sigusr2_saves_and_trains_on(run):
    before = at_step(4, signal.SIGUSR2) + at_step(8).replace('"sent"', '"killed"').replace("Last.sent", "Last.killed")
    run("a", *QUICK, before=before, code=-signal.SIGKILL)
    child, _ = run("a", "train", "resume=latest")
    assert "resumes from last.ckpt, step 5," in child.stdout


def test_the_second_ctrl_c_ends_at_once(warm, tmp_path):
    before = """
import time, types
from boltlab.ground import signals
from project.models.classifier import Classifier
def slow(self, *arguments):
    open("started", "w").close()
    while True:
        time.sleep(0.01)
Classifier.training_step = slow
signals.time = types.SimpleNamespace(monotonic=lambda: float(open("clock").read()))
"""
    (tmp_path / "clock").write_text("10.0")
    child = warm(*QUICK, before=before)
    child.wait_for(tmp_path / "started")
    child.send(signal.SIGINT)
    child.pause(0.2)
    child.send(signal.SIGINT)  # the terminal's and the launcher's are one
    child.pause(0.4)
    assert child.running()
    (tmp_path / "clock").write_text("10.6")
    child.send(signal.SIGINT)
    assert child.wait().code == 130
    assert "again: ended at once" in child.stderr
    assert json.loads((only_run(tmp_path / "logs") / "summary.json").read_text())["status"] == "interrupted"


CONTROLS = {
    "where the epoch stands": "from boltlab.data.loader import Loader\nLoader.load_state_dict = lambda *a: None",
    "what a step draws": "from boltlab.training.resume_state import Resume\nResume._seed_step = lambda self: None",
}


@pytest.mark.parametrize("left_out", CONTROLS)
def test_without_restoring_the_weights_differ(run, left_out):
    """The control: equal bits above are no accident (FAULTS 6)."""
    overrides = (*QUICK, DROPOUT, EVERY_3, "trainer.max_epochs=2")
    control = CONTROLS[left_out]
    _, expected = run("whole", *overrides, before=control)
    run("killed", *overrides, before=control + at_step(8), code=-signal.SIGKILL)
    _, found = run("killed", "train", "resume=latest", before=control)
    assert any("state_dict" in difference for difference in differences(outcome(expected), outcome(found)))


def test_killed_before_its_first_checkpoint_a_run_begins_again(run):
    _, expected = run("whole", *QUICK)
    run("killed", *QUICK, before=at_step(3), code=-signal.SIGKILL)
    child, found = run("killed", "train", "resume=latest")
    assert "has no checkpoint yet: it begins again" in child.stdout
    assert_same(expected, found)


@pytest.mark.parametrize("stopping", [[], ["callbacks=[best,last,early_stopping]", "optimizer.lr=0.0"]])
def test_killed_while_it_is_tested_a_run_is_only_tested_again(run, stopping):
    overrides = (*QUICK, *stopping, *(["callbacks.early_stopping.patience=1"] if stopping else []))
    die = "import lightning.pytorch as pl\npl.Trainer.test = lambda *a, **k: os.kill(os.getpid(), 9)"
    _, found = run("a", *overrides, before=die, code=-signal.SIGKILL)
    before = outcome(found)
    _, found = run("a", "train", "resume=latest")
    assert differences(before["state_dict"], outcome(found)["state_dict"]) == []
    summary = json.loads((found / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["test"] and summary["final"] and summary["best"]
    assert summary["steps"] == before["global_step"] == (22 if stopping else 44)


def test_a_finished_run_says_so_and_is_made_longer(run, warm, tmp_path):
    overrides = (*QUICK, "scheduler=constant", DROPOUT, "test=false")
    _, expected = run("whole", *overrides)
    run("a", *overrides, "trainer.max_epochs=2")
    child, found = run("a", "train", "resume=latest", code=1)
    assert child.stderr.strip() == (
        f"boltlab train: {found.relative_to(found.parents[2])} is finished, after 2 epochs (22 steps);"
        " trainer.max_epochs=… with a larger number extends it"
    )
    assert warm(*overrides, folder=tmp_path / "a", before=at_step(13)).wait().code == -signal.SIGKILL
    broken = next(p for p in (tmp_path / "a" / "logs" / "train").iterdir() if p.name != found.name)
    child = warm("train", f"resume={found.name}", folder=tmp_path / "a").wait()
    assert child.stderr.strip().endswith(f"extends it. The newest run that is not finished: resume={broken.name}")
    shutil.rmtree(broken)
    _, found = run("a", "train", "resume=latest", "trainer.max_epochs=4")
    assert_same(expected, found)
    (record,) = json.loads((found / "summary.json").read_text())["resumed"]
    assert record["overrides"] == ["trainer.max_epochs=4"] and record["changed"] == []


def test_a_run_that_was_moved_goes_on_with_its_best(run, tmp_path):
    overrides = (
        *QUICK,
        "monitor=val_loss",
        "+optimizer.maximize=true",  # each epoch is worse than the one before
        "callbacks.best.save_top_k=2",
        "callbacks.best.filename='best-{epoch}'",
        "test=false",
    )
    _, expected = run("whole", *overrides)
    _, found = run("a", *overrides, before=at_step(25), code=-signal.SIGKILL)
    elsewhere = tmp_path / "b" / "logs" / "train" / found.name
    elsewhere.parent.mkdir(parents=True)
    shutil.move(found, elsewhere)
    _, found = run("b", "train", f"resume={elsewhere}")
    assert_same(expected, found)
    assert sorted(p.name for p in (found / "checkpoints").iterdir()) == sorted(
        p.name for p in (expected / "checkpoints").iterdir()
    )


CHANGES = {
    "data.batch_size=64": "data.batch_size was 128, is now 64",
    "data.val_fraction=0.2": "data.val_fraction was 0.1, is now 0.2",
    "trainer.accumulate_grad_batches=2": "trainer.accumulate_grad_batches was 1, is now 2",
    "seed=5": "seed was 0, is now 5",
    "precision=bf16-mixed": "precision was '32', is now 'bf16-mixed'",
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_that_breaks_exactness_is_named_and_may_restart_the_epoch(run, change):
    run("a", *QUICK, EVERY_3, before=at_step(16), code=-signal.SIGKILL)
    child, found = run("a", "train", "resume=latest", change, code=1)
    assert CHANGES[change] in child.stderr and "resume_changed=restart_epoch" in child.stderr
    assert len(child.stderr.splitlines()) == 1
    child, found = run("a", "train", "resume=latest", change, "resume_changed=restart_epoch")
    rows = outcome(found)["rows"]
    assert [row["epoch"] for row in rows if row["train_loss"]] == ["0", "1", "2", "3"]
    assert all(torch.isfinite(t).all() for t in outcome(found)["state_dict"].values())
    epochs = {"data.batch_size=64": 21, "data.val_fraction=0.2": 9, "trainer.accumulate_grad_batches=2": 6}
    assert outcome(found)["global_step"] == 15 + 3 * epochs.get(change, 11)


@pytest.mark.parametrize("change", ["optimizer.lr=0.1", "model.net.dropout=0.5", "scheduler=cosine"])
def test_what_a_checkpoint_restores_is_not_changed_in_silence(run, change):
    run("a", *QUICK, EVERY_3, before=at_step(16), code=-signal.SIGKILL)
    child, _ = run("a", "train", "resume=latest", change, "resume_changed=restart_epoch", code=1)
    assert change.partition("=")[0] in child.stderr and "init_from=" in child.stderr


def test_a_fold_goes_on_with_its_own_samples(run):
    fold = (*QUICK, EVERY_3, "data.folds=5", "data.fold=1", "data.max_samples=1000")
    _, expected = run("whole", *fold)
    run("a", *fold, before=at_step(16), code=-signal.SIGKILL)
    for change in ("data.fold=2", "data.folds=4", "data.max_samples=900"):
        child, _ = run("a", "train", "resume=latest", change, code=1)
        key, _, now = change.partition("=")
        assert re.search(rf"{key} was \d+, is now {now}: .* resume_changed=restart_epoch", child.stderr)
    _, found = run("a", "train", "resume=latest")
    assert_same(expected, found)


def test_other_data_are_noticed(run, tmp_path):
    def table(rows):
        lines = ["a,b,y", *(f"{i % 7},{i % 5},{i % 3}" for i in range(rows))]
        (tmp_path / "table.csv").write_text("\n".join(lines), encoding="utf-8")

    table(300)
    data = (
        "data=csv",
        f"data.path={tmp_path}/table.csv",
        "data.target=y",
        "data.task=classification",
        "data.batch_size=16",
        EVERY_3,
    )
    run("a", *QUICK, *data, before=at_step(20), code=-signal.SIGKILL)
    table(400)
    child, folder = run("a", "train", "resume=latest", code=1)
    assert re.search(r"the train split is not what \S+ was trained on \(\d+ samples, now \d+", child.stderr)
    assert "resume_changed=restart_epoch" in child.stderr
    (folder / "data.json").unlink()  # of a run from before there were any, the checkpoint tells
    child, _ = run("a", "train", "resume=latest", code=1)
    assert re.search(r"trained on \d+ training samples, now there are \d+: resume_changed=restart_epoch", child.stderr)
    run("a", "train", "resume=latest", "resume_changed=restart_epoch")


def test_a_damaged_last_is_passed_over_with_one_line(run):
    _, expected = run("whole", *QUICK)
    _, found = run("a", *QUICK, "callbacks.last.keep_last=2", before=at_step(30), code=-signal.SIGKILL)
    last = found / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-500])
    child, found = run("a", "train", "resume=latest")
    assert "resumes from last-1.ckpt, step 11," in child.stdout
    assert child.stderr.count("last.ckpt") == 1 and "last-1.ckpt is taken instead" in child.stderr
    assert_same(expected, found)


def test_a_stale_file_of_lightnings_requeue_is_not_taken(run):
    """FAULTS 30: under Slurm, Lightning takes hpc_ckpt_N.ckpt before anything else."""
    overrides = (*QUICK, EVERY_3)
    _, expected = run("whole", *overrides)
    _, found = run("a", *overrides, before=at_step(16), code=-signal.SIGKILL)
    shutil.copy(expected / "checkpoints" / "last.ckpt", found / "hpc_ckpt_1.ckpt")
    slurm = {"SLURM_NTASKS": "1", "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    child, found = run("a", "train", "resume=latest", **slurm, SLURM_JOB_NAME="job", SLURM_NTASKS_PER_NODE="1")
    assert "resumes from last.ckpt, step 15," in child.stdout
    assert_same(expected, found)


def test_a_run_that_goes_on_twice_stays_one_run(run):
    """Folder, config, files and W&B run (FAULTS 13)."""
    overrides = (*QUICK, EVERY_3, "logger=wandb")
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    slow = """
import time
from pathlib import Path
from boltlab.training.resume_state import Resume
def seed(self, _seed=Resume._seed_step):
    for _ in range(12000):  # the W&B run starts meanwhile
        began = [len(list(Path("logs").rglob(name))) for name in (".wandb-id", "offline-run-*")]
        if (self.seam.trainer.global_step != 20 or began[0]) and (self.seam.trainer.global_step != 38 or began[1] > 1):
            break
        time.sleep(0.05)
    _seed(self)
Resume._seed_step = seed
"""
    _, found = run("a", *overrides, before=slow + at_step(30), code=-signal.SIGKILL, **environment)
    config, number = (found / "config.yaml").read_text(), (found / ".wandb-id").read_text()
    run("a", "train", "resume=latest", before=slow + at_step(41), code=-signal.SIGKILL, **environment)
    _, again = run("a", "train", "resume=latest", **environment)
    assert again == found and (found / "config.yaml").read_text() == config
    assert sorted(p.name for p in (found / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    parts = [p.name for p in (found / "wandb").glob("offline-run-*")]
    assert len(parts) == 3 and all(name.endswith(f"-{number}") for name in parts)
    assert [path.name for path in found.glob(".*-*[0-9a-f]")] == [".wandb-id"]
    assert not list((found / "checkpoints").glob(".*"))


def test_a_running_run_is_not_gone_on_with(warm, tmp_path, boltlab):
    slow = "import time\nfrom boltlab.training.resume_state import Resume\n"
    slow += "Resume._seed_step = lambda *a: time.sleep(0.2)"
    child = warm(*QUICK, before=slow)
    child.wait_for(tmp_path / "logs" / "train", pattern="*/config.yaml")
    code, _, err = boltlab("train", "resume=latest")
    child.send(signal.SIGTERM)
    assert child.wait().code == 143
    assert code == 1 and f"is being written by another process (process {child.pid}" in err


def test_a_stopped_grid_ends_and_its_job_goes_on(run, warm, tmp_path):
    grid = (*QUICK, "-m", "seed=1,2")
    (tmp_path / "a").mkdir()
    child = warm(*grid, folder=tmp_path / "a", before=at_step(15, signal.SIGTERM)).wait()
    assert child.code == 143, child.stderr
    assert "interrupted" in child.stdout and "not started" in child.stdout
    child = warm(*grid, folder=tmp_path / "a").wait()
    assert child.code == 0, child.stderr
    assert "resumes from last.ckpt, step 16," in child.stdout
    _, expected = run("whole", *QUICK, "seed=1")
    (top,) = Path(tmp_path, "a", "logs", "train").iterdir()
    assert sorted(p.name for p in top.iterdir() if p.is_dir()) == ["0", "1"]
    assert_same(expected, top / "0")


def test_nothing_to_go_on_with_is_said(boltlab):
    code, _, err = boltlab("train", "resume=latest")
    assert code == 1 and "there is no run yet" in err
    code, _, err = boltlab("train", "-m", "resume=latest", "seed=1,2")
    assert code == 2 and "\n  resume=latest\n      resumes one run: without -m, and as resume=…" in err


def test_the_state_of_a_gradient_scaler_survives(tmp_path):
    """16-mixed scales on GPUs only; its scaler's state is plain, and is what Lightning gives back to it."""
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=7)
    scaler.scale(torch.ones(1))
    state = MixedPrecision("16-mixed", "cpu", scaler).state_dict()
    checkpoint_file.write({"state_dict": {}, "MixedPrecision": state}, tmp_path / "a.ckpt")
    other = torch.amp.GradScaler("cpu")
    MixedPrecision("16-mixed", "cpu", other).load_state_dict(
        checkpoint_file.read(tmp_path / "a.ckpt")["MixedPrecision"]
    )
    assert other.get_scale() == 512.0 and other.state_dict() == scaler.state_dict()


# ---------------------------------------------------------------- what reviews found


def test_metrics_of_before_the_first_resume_are_still_known_after_the_second(run):
    """A plateau that looks at a validation of three checkpoints ago."""
    overrides = (
        *QUICK,
        "scheduler=plateau",
        "scheduler.patience_epochs=0",
        "trainer.check_val_every_n_epoch=4",
        EVERY_3,
    )
    _, expected = run("whole", *overrides, "trainer.max_epochs=8")
    run("a", *overrides, "trainer.max_epochs=8", before=at_step(48), code=-signal.SIGKILL)
    for step in (59, 70):
        run("a", "train", "resume=latest", before=at_step(step), code=-signal.SIGKILL)
    _, found = run("a", "train", "resume=latest")
    assert_same(expected, found)
    final = [json.loads((folder / "summary.json").read_text())["final"] for folder in (expected, found)]
    assert final[0] == final[1] and "val_acc" in final[0]


def test_float64_weights_are_not_rounded(run):
    _, expected = run("whole", *QUICK, "precision=64", EVERY_3)
    run("a", *QUICK, "precision=64", EVERY_3, before=at_step(8), code=-signal.SIGKILL)
    assert_same(expected, run("a", "train", "resume=latest")[1])


def test_a_checkpoint_within_accumulated_batches_is_not_gone_on_from(run):
    overrides = (*QUICK, "trainer.accumulate_grad_batches=3", "trainer.val_check_interval=4")
    _, expected = run("whole", *overrides)
    _, found = run("a", *overrides, before=at_step(2), code=-signal.SIGKILL)
    assert [p.name for p in (found / "checkpoints").iterdir()] == ["best.ckpt"]
    child, found = run("a", "train", "resume=latest")
    assert "has no checkpoint yet" in child.stdout
    assert_same(expected, found)


def test_weights_only_are_no_damage(run):
    overrides = (*QUICK, "callbacks.best.save_weights_only=true")
    die = "from boltlab.callbacks.last import Last\nLast._save = lambda *a, **k: os.kill(os.getpid(), 9)"
    run("a", *overrides, before=die, code=-signal.SIGKILL)
    child, _ = run("a", "train", "resume=latest")
    assert "has no checkpoint yet" in child.stdout


@pytest.mark.parametrize("epoch", [1, 4])
def test_killed_right_after_the_checkpoint_of_an_epoch_no_row_is_lost(run, epoch):
    die = f"""
from boltlab.callbacks.last import Last
def save(self, trainer, *a, _save=Last._save, **k):
    _save(self, trainer, *a, **k)
    if trainer.fit_loop.epoch_progress.current.processed == {epoch}:
        os.kill(os.getpid(), 9)
Last._save = save
"""
    _, expected = run("whole", *QUICK)
    run("a", *QUICK, before=die, code=-signal.SIGKILL)
    _, found = run("a", "train", "resume=latest")
    assert_same(expected, found)
    final = [json.loads((folder / "summary.json").read_text())["final"] for folder in (expected, found)]
    assert final[0] == final[1]


def test_killed_between_its_last_two_files(run):
    overrides = (*QUICK, "callbacks.last.every_n_epochs=9", "callbacks.best.save_top_k=-1", "test=false")
    overrides += ("callbacks.best.filename='best-{epoch}'",)
    die = "from boltlab.callbacks.last import Last\nLast._save = lambda *a, **k: os.kill(os.getpid(), 9)"
    _, expected = run("whole", *overrides)
    run("a", *overrides, before=die, code=-signal.SIGKILL)
    child, found = run("a", "train", "resume=latest")
    assert "resumes from best-3.ckpt" in child.stdout
    assert differences(outcome(expected)["state_dict"], outcome(found)["state_dict"]) == []


def test_what_was_allowed_once_is_not_allowed_for_good(run):
    run("a", *QUICK, EVERY_3, before=at_step(5), code=-signal.SIGKILL)
    changed = ("data.batch_size=64", "resume_changed=restart_epoch")
    run("a", "train", "resume=latest", *changed, before=at_step(20), code=-signal.SIGKILL)
    child, _ = run("a", "train", "resume=latest", "seed=7", code=1)
    assert "seed was 0, is now 7" in child.stderr


@pytest.mark.parametrize("wrong", ["trainer.profiler=bogus", "trainer.max_epochs=1"])
def test_an_override_that_cannot_start_does_not_stand_in_the_way(run, wrong):
    run("a", *QUICK, before=at_step(25), code=-signal.SIGKILL)
    child, _ = run("a", "train", "resume=latest", wrong, code=2 if "bogus" in wrong else 1)
    assert "Traceback" not in child.stderr
    assert wrong.partition("=")[0].rpartition(".")[2] in child.stderr
    run("a", "train", "resume=latest")


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_while_it_searches_its_learning_rate(run, signum):
    overrides = (*QUICK, "optimizer.lr=auto", "test=false", "trainer.max_epochs=1")
    die = f"""
from boltlab.training import probe
from boltlab.training import search as tune
def search(config): os.kill(os.getpid(), {int(signum)})
tune.search = search
"""
    code = -signum if signum == signal.SIGKILL else 143
    child, found = run("a", *overrides, before=die, code=code)
    if signum == signal.SIGTERM:
        assert "to resume: boltlab train" in child.stderr
        assert json.loads((found / "summary.json").read_text())["status"] == "interrupted"
    run(
        "a",
        "train",
        "resume=latest",
        before="from boltlab.training import search as tune\ntune.search = lambda c: (\n"
        "  c.optimizer.__setitem__('lr', 0.01), c.model.optimizer.__setitem__('lr', 0.01), {'optimizer.lr': 0.01})[2]",
    )


def test_what_ended_a_run_early_is_named_and_may_be_changed(run):
    early = (*QUICK, "callbacks=[best,last,early_stopping]", "optimizer.lr=0.0", "callbacks.early_stopping.patience=1")
    run("a", *early)
    child, _ = run("a", "train", "resume=latest", "trainer.max_epochs=9", code=1)
    assert "after 2 epochs (22 steps); early stopping or a time limit ended it: callbacks.early_stopping.patience=" in (
        child.stderr
    )
    _, found = run("a", "train", "resume=latest", "callbacks.early_stopping.patience=2")
    assert outcome(found)["global_step"] == 33


def test_an_evaluation_is_not_trained(run, boltlab, tmp_path, monkeypatch):
    _, found = run("a", *QUICK)
    monkeypatch.chdir(tmp_path / "a")
    code, _, err = boltlab("eval", "run=latest")
    assert code == 0, err
    (evaluation,) = Path("logs/eval").iterdir()
    before = {path: path.read_bytes() for path in evaluation.rglob("*") if path.is_file()}
    code, _, err = boltlab("train", f"resume={evaluation}")
    assert code == 1, err
    assert f"is an evaluation, no training: resume={found.name}" in err
    assert before == {path: path.read_bytes() for path in evaluation.rglob("*") if path.is_file()}


def test_what_belongs_to_a_new_run_is_refused(run):
    run("a", *QUICK, before=at_step(25), code=-signal.SIGKILL)
    for wrong in ("init_from=latest", "experiment=mnist_mlp"):
        child, _ = run("a", "train", "resume=latest", wrong, code=2)
        assert f"  {wrong}\n      belongs to a new run" in child.stderr


@pytest.mark.parametrize("link", ["config.yaml", ".lock-holder", "confusion_matrix.csv", "checkpoints/last.ckpt"])
def test_a_link_in_a_run_folder_is_not_followed(run, tmp_path, link):
    _, found = run("a", *QUICK, before=at_step(25), code=-signal.SIGKILL)
    victim = tmp_path / "victim"
    if (found / link).exists():
        shutil.move(found / link, victim)
    else:
        victim.write_text("mine")
    (found / link).symlink_to(victim)
    before = victim.read_bytes()
    child, _ = run("a", "train", "resume=latest", code=1)
    assert f"{link} is a link to {victim}" in child.stderr
    assert victim.read_bytes() == before


def test_a_summary_of_odd_values_ends_nothing(run):
    _, found = run("a", *QUICK, before=at_step(25), code=-signal.SIGKILL)
    odd = {"resumed": 5, "seconds": "x", "fit_seconds": [], "best": {"val_acc": "abc"}, "epochs": 10**400, "pid": "1"}
    (found / "summary.json").write_text(json.dumps(odd))
    _, found = run("a", "train", "resume=latest")
    assert json.loads((found / "summary.json").read_text())["status"] == "finished"


def test_killed_while_the_config_is_written_it_stays_whole(run):
    run("a", *QUICK, before=at_step(25), code=-signal.SIGKILL)
    die = """
from boltlab.runs import record
def write(path, text, **options):
    path.with_name("." + path.stem + "-123456").write_text(text[: len(text) // 2])
    os.kill(os.getpid(), 9)
record.write_whole = write
"""
    run("a", "train", "resume=latest", before=die, code=-signal.SIGKILL)
    _, found = run("a", "train", "resume=latest")
    assert not list(found.glob(".config-*"))


def test_a_longer_run_says_what_becomes_of_its_learning_rate(run):
    run("a", *QUICK, before=at_step(25), code=-signal.SIGKILL)
    child, _ = run("a", "train", "resume=latest", "trainer.max_epochs=5")
    assert "2 epochs done; the learning rate follows the schedule of the new length" in child.stdout


def test_a_stopped_w_and_b_run_is_closed(run):
    """Its file ends with the run's exit (FAULTS 8)."""
    before = """
import time
from pathlib import Path
from boltlab.training.resume_state import Resume
def seed(self, _seed=Resume._seed_step):
    for _ in range(12000):
        if self.seam.trainer.global_step != 20 or list(Path("logs").rglob(".wandb-id")):
            break
        time.sleep(0.05)
    _seed(self)
Resume._seed_step = seed
"""
    before += at_step(25, signal.SIGTERM)
    environment = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    _, found = run("a", *QUICK, "logger=wandb", before=before, code=143, **environment)
    (path,) = found.rglob("*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path.parent)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "exit" in [json.loads(line)["type"] for line in lines[-3:]]
