"""Nets trained in a stack are the nets that `boltlab train` trains one by one."""

import csv

import pytest
import torch

from boltlab import runs
from boltlab.checkpoints import file as checkpoint_file
from boltlab.config.compose import compose
from boltlab.sweeps.stack import Stack
from boltlab.training import start as train

pytestmark = [pytest.mark.slow, pytest.mark.floats]

FIXED = ["logger=csv", "callbacks=[best,last]", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
FIXED += ["trainer.max_epochs=2", "data.max_samples=120", "precision=64"]
# Between them: each rule, schedules that move, one order of samples and several, augmentation, batch norm with its
# statistics, weights that do not decay, a loss with weights of its own, a regression.
CASES = {
    "sgd": ("optimizer=sgd", "optimizer.nesterov=false", "scheduler=constant", "model=mlp"),
    "nesterov": ("optimizer=sgd", "scheduler=cosine", "model=lenet_bn", "augment=basic", "model.label_smoothing=0.1"),
    "adam": (
        "optimizer=adam",
        "scheduler=one_cycle",
        "model=mlp",
        "model.l1=1e-2",
        "model.decay_norms_and_biases=true",
    ),
    "adamw": ("optimizer=adamw", "scheduler=step", "model=mlp", f"model.class_weights={[1.0, 2.0] * 5}"),
    "regression": ("optimizer=adam", "data=diabetes", "model=mlp_regressor", "monitor=val_loss", "mode=min"),
}


def composed(case, number, *more):
    own = [f"optimizer.lr={0.01 * 1.5**number}", f"optimizer.weight_decay={0.02 * number}"]
    if case in ("sgd", "nesterov"):
        own += [f"optimizer.momentum={0.5 + 0.1 * number}"]
    else:
        own += [f"optimizer.betas=[{0.8 + 0.05 * number},0.99]"]
    own += [] if case == "sgd" else [f"seed={number // 2}"]
    return compose("train", [*FIXED, *CASES[case], *own, *more])


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row.get("val_loss")]


def stacked(configs):
    stack = Stack(configs, torch.device("cpu"))
    stack.load()
    return stack


@pytest.mark.parametrize("case", CASES)
def test_a_stack_trains_what_boltlab_train_trains(case, tmp_path):
    jobs = [composed(case, number, "test=false") for number in range(3)]
    stack = stacked([job.config for job in jobs])
    assert len(stack.seeds) == (1 if case == "sgd" else 2)
    measured = []
    for epoch in range(2):
        trained = stack.train_epoch(epoch, lambda: None)
        measured.append([{**one, **two} for one, two in zip(trained, stack.evaluate("val"), strict=True)])
    for place in (0, 2):  # of the other, `seed` is that of the first
        folder = runs.new_folder(tmp_path, "train", "alone")
        train.run(jobs[place], folder)
        state, alone = stack.state_dict(place), checkpoint_file.read(folder / "checkpoints/last.ckpt")["state_dict"]
        for name in (name for name in alone if name.startswith("net.")):
            torch.testing.assert_close(state[name], alone[name], rtol=1e-9, atol=1e-11, msg=f"{case} {place} {name}")
        for epoch, row in enumerate(rows(folder)):
            mine = measured[epoch][place]
            assert mine == pytest.approx({name: float(row[name]) for name in mine}, rel=1e-5), (case, place, epoch)
            assert {"train_loss", "val_loss"} < mine.keys()


def test_float32_and_bf16_stay_close(tmp_path):
    for precision, near in (("32", 1e-5), ("bf16-mixed", 1e-2)):
        job = composed("sgd", 1, "test=false", f"precision={precision}")
        stack = stacked([composed("sgd", 0, f"precision={precision}").config, job.config])
        for epoch in range(2):
            stack.train_epoch(epoch, lambda: None)
        folder = runs.new_folder(tmp_path, "train", "alone")
        train.run(job, folder)
        state, alone = stack.state_dict(1), checkpoint_file.read(folder / "checkpoints/last.ckpt")["state_dict"]
        for name in (name for name in alone if name.startswith("net.")):
            assert state[name].dtype == alone[name].dtype == torch.float32
            assert (state[name] - alone[name]).norm() < near * alone[name].norm(), (precision, name)


def test_the_others_do_not_see_who_leaves():
    jobs = [composed("nesterov", number, "data.max_samples=64", "precision=32") for number in range(4)]
    whole, thinned = (stacked([job.config for job in jobs]) for _ in range(2))
    for stack in (whole, thinned):
        stack.train_epoch(0, lambda: None)
    thinned.is_best(3)
    best = thinned.state_dict(3)
    thinned.keep([1, 3])
    for stack in (whole, thinned):
        stack.train_epoch(1, lambda: None)
    for ours, theirs in ((0, 1), (1, 3)):
        for name, value in thinned.state_dict(ours).items():
            torch.testing.assert_close(value, whole.state_dict(theirs)[name], rtol=1e-4, atol=1e-5)
    for name, value in thinned.state_dict(1, best=True).items():
        assert torch.equal(value, best[name])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_a_recorded_step_is_the_step(case):
    jobs = [composed(case, number, "data.max_samples=300") for number in range(3)]
    stacks = [Stack([job.config for job in jobs], torch.device(name)) for name in ("cuda", "cpu")]
    for stack in stacks:
        stack.load()
        for epoch in range(2):
            stack.train_epoch(epoch, lambda: None)
    assert stacks[0]._graph is not None
    for place in range(3):
        there, here = (stack.state_dict(place) for stack in stacks)
        for name in here:
            torch.testing.assert_close(there[name], here[name], rtol=1e-8, atol=1e-10)
