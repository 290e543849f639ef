"""Each check of `boltlab.testing` passes for what is right, and a mistake fails exactly the check that looks for it."""

import pytest

pytestmark = pytest.mark.floats
BUILDS, GOLDEN, DETERMINISTIC, RESUMES = (
    f"test_{name}"
    for name in ("builds_from_its_config", "its_config_is_golden", "a_step_is_deterministic", "resumes_to_the_bit")
)
LOADS, RUNS, HALVES = "test_its_checkpoint_loads", "test_runs_on[cpu]", "test_the_loss_halves_on_one_batch"
ALL = {BUILDS, GOLDEN, DETERMINISTIC, RESUMES, LOADS, RUNS, HALVES}
SETUPS, WORKERS = "test_two_setups_give_equal_batches", "test_workers_do_not_change_the_batches"
OVERLAP = "test_splits_do_not_overlap"
OF_DATA = {SETUPS, WORKERS, OVERLAP, *(f"test_gives_batches[{split}]" for split in ("train", "val", "test"))}

# A module → the check that fails and a part of its message, then those that are skipped.
MODULES = {
    "Entropy": ((DETERMINISTIC, "differ first in the gradient"), {RESUMES}),
    "Clock": ((DETERMINISTIC, "differ first in the gradient"), {RESUMES}),
    "CountedInTheClass": ((DETERMINISTIC, "differ first in the gradient"), {RESUMES}),
    "OwnGenerator": ((RESUMES, "before batch 6, after the resume these differ: ['state_dict']"), set()),
    "OwnRandom": ((RESUMES, "is a state kept in an object of its own?"), set()),
    "OwnObject": ((RESUMES, "['state_dict']['body.0.weight']"), set()),
    "MadeInSetup": ((LOADS, "does not fit the code of its model"), set()),
    "WidenedInPrepare": ((LOADS, "scale"), set()),
    "Detached": ((HALVES, "the loss fell from"), set()),
    "WrongParameters": ((HALVES, 'overfit = "optimizer.lr=0.01"'), set()),
    "TestFails": ((RUNS, "no attribute 'no_such_metric'"), set()),
    "NoLoss": (None, {HALVES}),
    "Negative": (None, {HALVES}),
    "Noted": (None, set()),
}
DATA = {
    "SetupDraws": ((SETUPS, "batches: train batch 0 of loader 0: ['past']"), {WORKERS}),
    "SetupCounts": ((SETUPS, "two setups with the same seed give other batches"), {WORKERS}),
    "WorkerAugments": ((WORKERS, "two workers give other batches than none: train batch 0"), set()),
    "WorkerCollates": ((WORKERS, "two workers give other batches than none: train batch 0"), set()),
    "ValInTrain": ((OVERLAP, "5 samples of val stand in train too"), set()),
    "TestInVal": ((OVERLAP, "1 samples of test stand in val too"), set()),
    "SubsetsOverlap": ((OVERLAP, "2 samples of val stand in train too"), set()),
    "EmptyTest": (("test_gives_batches[test]", "test_dataloader gives no batch"), set()),
    "Repeated": (None, {OVERLAP}),
    "WithoutVal": (None, {"test_gives_batches[val]"}),
    "Persistent": (None, set()),
    "Data": (None, set()),
}


QUICK = ("OwnGenerator", "WorkerAugments", "ValInTrain")


def marked(cases):
    """Each case trains or reads several times: all but the quick ones are left to `make test-all`."""
    return [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in cases]


def of(found, outcome):
    return {name for name, (how, _) in found.items() if how == outcome}


def assert_fails_exactly(found, everything, failing, skipped):
    others = {name for name in found if name.startswith("test_runs_on")} - {RUNS}
    assert set(found) - others == everything
    assert of(found, "failed") == ({failing[0]} if failing else set()), found
    assert of(found, "skipped") - others == skipped, found
    if failing:
        assert failing[1] in found[failing[0]][1]


@pytest.mark.slow
@pytest.mark.parametrize("model", marked(MODULES))
def test_a_mistake_of_a_module_fails_exactly_its_check(checks, model):
    failing, skipped = MODULES[model]
    found = checks("TestModule", f"cells.broken.{model}", BOLTLAB_UPDATE_GOLDEN="1")
    assert_fails_exactly(found, ALL, failing, skipped)


@pytest.mark.slow
@pytest.mark.parametrize("data", marked(DATA))
def test_a_mistake_of_a_data_module_fails_exactly_its_check(checks, data):
    found = checks("TestData", data=f"cells.broken.{data}")
    assert_fails_exactly(found, OF_DATA, *DATA[data])


@pytest.mark.slow
def test_manual_optimization_has_all_checks_but_that_of_the_loss(checks):
    found = checks("TestModule", "cells.models.GAN", "cells.data.Digits", BOLTLAB_UPDATE_GOLDEN="1")
    assert_fails_exactly(found, ALL, None, {HALVES})
    assert "GAN optimizes manually" in found[HALVES][1]


@pytest.mark.slow
def test_the_golden_text_is_written_on_demand_only_and_holds_what_the_config_says(checks, cells):
    only = f"TestModule::{GOLDEN}"
    ((outcome, message),) = checks(only).values()
    golden = cells / "tests" / "golden" / "test_cells.TestModule.yaml"
    assert outcome == "failed" and not golden.exists()
    assert "to write it: BOLTLAB_UPDATE_GOLDEN=1 pytest test_cells.py -k TestModule" in message
    assert checks(only, BOLTLAB_UPDATE_GOLDEN="1")[GOLDEN][0] == "passed"
    text = golden.read_text()
    assert "_target_: cells.models.Forecaster" in text and "precision: auto" in text and str(cells) not in text
    assert checks(only)[GOLDEN][0] == "passed"
    changes = {"seed=1": "+seed: 1", "+model.lr=0.5": "+  lr: 0.5", "trainer.max_epochs=7": "+  max_epochs: 7"}
    for override, line in changes.items():
        ((outcome, message),) = checks(only, more=override).values()
        assert outcome == "failed" and line in message
    golden.write_text(text.replace("seed: 0", "seed: 4"))
    assert "-seed: 4" in checks(only)[GOLDEN][1]


def test_a_mistake_in_the_config_is_said_by_the_check_that_builds(checks):
    ((outcome, message),) = checks(f"TestModule::{BUILDS}", more="+model.depht=3").values()
    assert outcome == "failed" and "model.depht=3" in message
