import pytest
from sklearn.metrics import accuracy_score, f1_score

import boltlab as package
from boltlab import runs
from boltlab.checkpoints import file as checkpoint_file
from boltlab.commands.eval import same_kind
from boltlab.config.build import build
from boltlab.ground.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.floats]

QUICK = ("model=linear", "trainer.max_epochs=2", "logger=csv", "data.batch_size=256", "trainer.accelerator=cpu")


@pytest.fixture
def trained(boltlab):
    assert boltlab("train", *QUICK)[0] == 0
    return next(runs.folders("logs"))


def metrics(verb="eval"):
    return runs.read_summary(next(runs.folders("logs", verb)))["test"]


def test_repeats_what_training_measured(boltlab, trained):
    summary = runs.read_summary(trained)
    code, out, err = boltlab("eval", "run=latest", "data.batch_size=100")
    assert code == 0, err
    assert "test_acc" in out and metrics() == pytest.approx(summary["test"], abs=1e-6)
    assert boltlab("eval", f"run={trained}", "split=val")[0] == 0
    assert metrics()["val_acc"] == pytest.approx(summary["best"]["val_acc"], abs=1e-6)
    assert boltlab("eval", f"run={trained.name[-6:]}", "split=train")[0] == 0
    data = build(runs.load_config(trained), "data")
    train = data.dataset("train")
    predicted = package.load(trained).predict_step((data.normalize(train.x),)).argmax(1)
    assert metrics()["train_acc"] == pytest.approx(accuracy_score(train.labels, predicted), abs=1e-6)
    assert metrics()["train_f1"] == pytest.approx(f1_score(train.labels, predicted, average="macro"), abs=1e-5)


def test_several_processes_measure_what_one_measures(boltlab, trained):
    """Through the launcher itself; tests/processes has more processes and sizes."""
    assert boltlab("eval", "run=latest", "split=val", "logger=none")[0] == 0
    expected = metrics()
    code, out, err = boltlab("eval", "run=latest", "split=val", "logger=none", "trainer.devices=2")
    assert code == 0, err
    assert "val_acc" in out and metrics() == pytest.approx(expected, rel=2e-7)
    code, _, err = boltlab("eval", "run=latest", "trainer.devices=3")
    assert code == 2 and "divided over 3 processes: take a multiple, for example 258" in err


def test_a_run_from_before_a_key_existed(boltlab, trained):
    text = (trained / "config.yaml").read_text()
    later = ("channels_last", "float32_matmul", "  folds:", "  fold:", "  max_samples:")
    kept = [line for line in text.splitlines() if not line.startswith(later)]
    assert len(kept) == len(text.splitlines()) - 5
    (trained / "config.yaml").write_text("\n".join(kept))
    code, _, err = boltlab("eval", "run=latest")
    assert code == 0, err


def test_leaves_the_run_as_it_was(boltlab, trained):
    before = {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()}
    assert boltlab("eval", "run=latest")[0] == 0
    assert {p: p.read_bytes() for p in trained.rglob("*") if p.is_file()} == before


def test_refuses_data_whose_labels_mean_something_else(boltlab, trained):
    code, _, err = boltlab("eval", "run=latest", "data=fashion_mnist")
    assert code == 1 and "0: '0' and 'T-shirt/top'" in err
    code, _, err = boltlab("eval", "run=latest", "data=cifar10")
    assert code == 1 and "[1, 28, 28]" in err and "[3, 32, 32]" in err


def test_same_kind_names_what_differs():
    run = {"input_shape": [3, 8, 8], "num_classes": 2, "class_names": ["a", "b"]}
    same_kind(run, dict(run))
    with pytest.raises(UserError, match="0: 'a' and 'b'; 1: 'b' and 'a'"):
        same_kind(run, {**run, "class_names": ["b", "a"]})
    with pytest.raises(UserError, match="number of classes of 2, this data has 3"):
        same_kind(run, {**run, "num_classes": 3})


def test_never_evaluates_random_weights(boltlab, trained):
    for path in (trained / "checkpoints").glob("*.ckpt"):
        path.unlink()
    code, out, err = boltlab("eval", "run=latest")
    assert code == 1 and "no checkpoint" in err and "test_acc" not in out


def test_a_damaged_checkpoint_is_named(boltlab, trained):
    path = trained / "checkpoints" / "best.ckpt"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))
    code, _, err = boltlab("eval", "run=latest")
    assert code == 1 and "best.ckpt is damaged" in err
    assert boltlab("eval", "run=latest", "checkpoint=last")[0] == 0


def test_a_checkpoint_of_other_code_is_refused(boltlab, trained):
    path = trained / "checkpoints" / "best.ckpt"
    content = checkpoint_file.read(path)
    content["state_dict"]["net.more.weight"] = content["state_dict"].pop("net.layers.0.weight")
    checkpoint_file.write(content, path)
    code, _, err = boltlab("eval", "run=latest")
    assert code == 1 and "net.layers.0.weight" in err and "net.more.weight" in err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "is missing: give run=…"),
        (["run=latest"], 1, "train one with `boltlab train`"),
        (["run=latest", "split=tst"], 2, "did you mean 'test'?"),
    ],
)
def test_mistakes(boltlab, arguments, code, message):
    got, _, err = boltlab("eval", *arguments)
    assert got == code and message in err


def test_a_mistake_in_the_runs_own_keys(boltlab, trained):
    code, _, err = boltlab("eval", "run=latest", "data.bach_size=3", "data.num_workers=x")
    assert code == 2 and "did you mean 'batch_size'" in err and not list(runs.folders("logs", "eval"))


@pytest.mark.parametrize("override", ["model=mlp", "model.net.dropout=0.5", "seed=3", "optimizer.lr=1", "compile=true"])
def test_what_the_training_has_settled_is_not_changed_silently(boltlab, trained, override):
    code, _, err = boltlab("eval", "run=latest", override)
    assert code == 2 and "belongs to the trained run" in err
    assert not list(runs.folders("logs", "eval"))


def test_an_evaluation_that_fails_says_so(boltlab, trained):
    assert boltlab("eval", "run=latest", "data=fashion_mnist")[0] == 1
    summary = runs.read_summary(next(runs.folders("logs", "eval")))
    assert summary["status"] == "failed" and "T-shirt" in summary["reason"] and summary["model"] == "linear"


def test_precision_and_devices_of_the_training_are_not_those_of_the_evaluation(boltlab, trained):
    path = trained / "config.yaml"
    path.write_text(path.read_text().replace("devices: 1", "devices: 2"))
    assert boltlab("eval", "run=latest", "precision=64")[0] == 0
    evaluated = runs.load_config(next(runs.folders("logs", "eval")))
    assert evaluated.trainer.devices == 1 and evaluated.trainer.precision == 64
