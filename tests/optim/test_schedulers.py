import io
import math

import pytest
import torch
from torch.optim import lr_scheduler

from boltlab.ground.errors import UserError
from boltlab.optim.schedulers import Constant, Cosine, Exponential, MultiStep, OneCycle, Plateau, Schedule, Step

pytestmark = pytest.mark.floats

TOTAL, PER_EPOCH, LR = 40, 8, 0.5


def make_optimizer():
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)


def rates(scheduler, optimizer, steps=TOTAL):
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def curve(schedule, total=TOTAL, per_epoch=PER_EPOCH, steps=TOTAL):
    optimizer = make_optimizer()
    (config,) = schedule.build(optimizer, total, per_epoch)
    assert config["interval"] == "step"
    return rates(config["scheduler"], optimizer, steps)


def reference(make):
    optimizer = make_optimizer()
    return rates(make(optimizer), optimizer)


FORMULAS = {
    "constant": (Constant(), lambda s: 1.0),
    "step": (Step(gamma=0.5, every_epochs=1.5), lambda s: 0.5 ** (s // 12)),
    "step_default": (Step(), lambda s: 0.1 ** (s // 14)),
    "multistep": (MultiStep(gamma=0.5, milestones_steps=[10, 30]), lambda s: 0.5 ** ((s >= 10) + (s >= 30))),
    "multistep_epochs": (MultiStep(milestones_epochs=[1, 2.5]), lambda s: 0.1 ** ((s >= 8) + (s >= 20))),
    "multistep_default": (MultiStep(), lambda s: 0.1 ** ((s >= 20) + (s >= 30))),
    "exponential": (Exponential(0.8), lambda s: 0.8 ** (s / 8)),
    "cosine": (Cosine(), lambda s: (1 + math.cos(math.pi * s / 40)) / 2),
    "cosine_final": (Cosine(final_factor=0.2), lambda s: 0.2 + 0.8 * (1 + math.cos(math.pi * s / 40)) / 2),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_curve_is_the_closed_formula(name):
    schedule, formula = FORMULAS[name]
    assert curve(schedule) == pytest.approx([LR * formula(s) for s in range(TOTAL)])


@pytest.mark.parametrize("name", [n for n in FORMULAS if not n.startswith("cosine")])
def test_warmup_multiplies_the_curve(name):
    schedule, formula = FORMULAS[name]
    schedule = type(schedule)(**{**vars(schedule), "warmup_epochs": 0.5})
    assert curve(schedule) == pytest.approx([LR * formula(s) * min(1, (s + 1) / 5) for s in range(TOTAL)])


def test_cosine_with_warmup_takes_the_steps_that_are_left():
    expected = [(s + 1) / 5 if s < 4 else (1 + math.cos(math.pi * (s - 4) / 36)) / 2 for s in range(TOTAL)]
    assert curve(Cosine(warmup_steps=4)) == pytest.approx([LR * e for e in expected])
    assert curve(Cosine(), steps=TOTAL + 1)[-1] == 0


def test_curves_are_those_of_torch():
    assert curve(Cosine()) == pytest.approx(reference(lambda o: lr_scheduler.CosineAnnealingLR(o, TOTAL)))
    assert curve(Step(every_steps=7)) == pytest.approx(reference(lambda o: lr_scheduler.StepLR(o, 7, 0.1)))
    milestones = [5, 11]
    expected = reference(lambda o: lr_scheduler.MultiStepLR(o, milestones, 0.1))
    assert curve(MultiStep(milestones_steps=milestones)) == pytest.approx(expected)
    expected = reference(lambda o: lr_scheduler.ExponentialLR(o, 0.9 ** (1 / PER_EPOCH)))
    assert curve(Exponential(0.9)) == pytest.approx(expected)


@pytest.mark.parametrize(("warmup", "rise"), [({}, 12), ({"warmup_steps": 5}, 5), ({"warmup_epochs": 2}, 16)])
def test_one_cycle_is_that_of_torch(warmup, rise):
    # torch counts the rise to the step before pct_start * total_steps
    part = (rise + 1) / TOTAL
    expected = reference(lambda o: lr_scheduler.OneCycleLR(o, LR, TOTAL, pct_start=part, cycle_momentum=False))
    found = curve(OneCycle(**warmup))
    assert found == pytest.approx(expected)
    assert max(found) == found[rise] == LR
    assert found[-1] == pytest.approx(LR / 25 / 1e4)


def test_plateau_waits_for_the_metric_and_warms_up_by_steps():
    optimizer = make_optimizer()
    schedule = Plateau("val_acc", "max", gamma=0.1, patience_epochs=1, minimum_lr=0.01, warmup_steps=3)
    plateau, warmup = schedule.build(optimizer, TOTAL, PER_EPOCH)
    assert (plateau["interval"], plateau["monitor"], warmup["interval"]) == ("epoch", "val_acc", "step")
    assert rates(warmup["scheduler"], optimizer, 5) == pytest.approx([LR * f for f in (0.25, 0.5, 0.75, 1, 1)])
    found = []
    for accuracy in (0.5, 0.6, 0.6, 0.6, 0.7, 0.6, 0.6, 0.6):
        plateau["scheduler"].step(torch.tensor(accuracy))
        found += rates(warmup["scheduler"], optimizer, 2)[1:]
    assert found == pytest.approx([LR, LR, LR, LR * 0.1, LR * 0.1, LR * 0.1, 0.01, 0.01])
    assert len(Plateau("val_acc", "max").build(make_optimizer(), TOTAL, PER_EPOCH)) == 1


@pytest.mark.parametrize("schedule", [Constant(), Step(), MultiStep(), Exponential(), Cosine(), OneCycle()])
def test_state_is_plain_and_goes_on_where_it_stopped(schedule):
    whole = curve(schedule)
    optimizer = make_optimizer()
    scheduler = schedule.build(optimizer, TOTAL, PER_EPOCH)[0]["scheduler"]
    first = rates(scheduler, optimizer, 17)
    file = io.BytesIO()
    torch.save([scheduler.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    optimizer = make_optimizer()
    scheduler = schedule.build(optimizer, TOTAL, PER_EPOCH)[0]["scheduler"]
    optimizer.load_state_dict(states[1])
    scheduler.load_state_dict(states[0])
    assert first + rates(scheduler, optimizer, TOTAL - 17) == whole


def test_plateau_state_is_plain():
    for config in Plateau("val_loss", "min", warmup_steps=2).build(make_optimizer(), TOTAL, PER_EPOCH):
        file = io.BytesIO()
        torch.save(config["scheduler"].state_dict(), file)
        file.seek(0)
        torch.load(file, weights_only=True)


def test_a_longer_run_follows_its_own_curve():
    optimizer = make_optimizer()
    scheduler = Cosine().build(optimizer, TOTAL, PER_EPOCH)[0]["scheduler"]
    rates(scheduler, optimizer, TOTAL)
    longer = make_optimizer()
    resumed = Cosine().build(longer, 2 * TOTAL, PER_EPOCH)[0]["scheduler"]
    longer.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    longer.step()
    resumed.step()
    assert longer.param_groups[0]["lr"] == pytest.approx(curve(Cosine(), total=2 * TOTAL, steps=42)[-1])


@pytest.mark.parametrize(
    ("schedule", "steps", "epochs"),
    [(s, "warmup_steps", "warmup_epochs") for s in (Constant, Step, MultiStep, Exponential, Cosine, OneCycle, Plateau)]
    + [(Step, "every_steps", "every_epochs"), (MultiStep, "milestones_steps", "milestones_epochs")],
)
def test_a_length_is_given_once(schedule, steps, epochs):
    values = [[1], [2]] if "milestones" in steps else [1, 2]
    arguments = dict(zip((steps, epochs), values, strict=True))
    message = f"gives the same length as {steps}: set one of the two to null"
    assert schedule.check_arguments(arguments) == [(epochs, message)]
    assert schedule.check_arguments({**arguments, steps: None}) == []
    required = {"monitor": "val_loss", "mode": "min"} if schedule is Plateau else {}
    with pytest.raises(ValueError, match=f"{epochs} {message}"):
        schedule(**required, **arguments)


@pytest.mark.parametrize("schedule", [Cosine(), OneCycle(), Step(), MultiStep()])
def test_an_endless_run_has_no_such_schedule(schedule):
    with pytest.raises(UserError, match=r"needs the length of the run: set trainer\.max_epochs"):
        schedule.build(make_optimizer(), math.inf, PER_EPOCH)


@pytest.mark.parametrize("schedule", [Cosine(warmup_epochs=1), Exponential()])
def test_epochs_of_unknown_length_are_named(schedule: Schedule):
    with pytest.raises(UserError, match="needs the length of an epoch"):
        schedule.build(make_optimizer(), TOTAL, math.inf)
