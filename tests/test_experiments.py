"""Every shipped recipe takes real steps; the linear regression arrives at the closed-form solution."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from stand_in import SHORT, STAND_IN, make_images

import boltlab as package
from boltlab import runs
from boltlab.config.build import build
from boltlab.config.compose import compose
from boltlab.config.sources import groups

pytestmark = [pytest.mark.slow, pytest.mark.floats]


@pytest.fixture(autouse=True)
def examples(tmp_path):
    (tmp_path / "examples").symlink_to(Path(__file__).parents[1] / "examples")


@pytest.fixture
def images(tmp_path):
    make_images(tmp_path)


@pytest.mark.parametrize("experiment", groups()["experiment"])
@pytest.mark.parametrize("compiled", [False, True])
def test_an_experiment_runs_and_its_checkpoints_load(experiment, compiled, boltlab, images, monkeypatch):
    compile, calls = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda *a, **k: calls.append(k) or compile(*a, **k, backend="eager"))
    more = [*SHORT, *STAND_IN.get(experiment, []), *(["compile=true", "test=false"] if compiled else [])]
    code, _, err = boltlab("train", f"experiment={experiment}", *more)
    assert code == 0, err
    folder = next(runs.folders("logs"))
    summary = runs.read_summary(folder)
    assert summary["status"] == "finished" and bool(summary["test"]) != compiled and experiment in folder.name
    assert bool(calls) == compiled
    shape = runs.load_config(folder).data.input_shape
    for name in ("best", "last"):
        content = torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert not [key for key in content["state_dict"] if "_orig_mod" in key]
        model = package.load(folder, checkpoint=name)
        assert all(
            torch.equal(value, content["state_dict"][f"net.{key}"]) for key, value in model.net.state_dict().items()
        )
        with torch.inference_mode():
            assert model(torch.zeros(2, *shape)).isfinite().all()


def test_the_recipes_say_what_their_names_mean():
    mlp = compose("train", ["experiment=mnist_mlp"]).config
    assert list(mlp.model.net.hidden_sizes) == [128] and mlp.data.batch_size == 64 and mlp.trainer.max_epochs == 10
    assert (mlp.optimizer.lr, mlp.optimizer.momentum, mlp.optimizer.weight_decay) == (0.01, 0.9, 0)
    plain = compose("train", ["experiment=mnist_mlp_plain_sgd"]).config
    assert plain.optimizer.momentum == 0 and plain.model == {**mlp.model, "optimizer": plain.optimizer}
    cifar = compose("train", ["experiment=cifar10_net"]).config
    assert (cifar.data.batch_size, cifar.optimizer.lr, cifar.trainer.max_epochs) == (4, 0.001, 2)
    parameters = {
        name: sum(p.numel() for p in build(compose("train", [f"experiment={name}"]).config, "model").net.parameters())
        for name in ("mnist_mlp", "mnist_lenet", "cifar10_net", "dense_64")
    }
    assert parameters == {"mnist_mlp": 101_770, "mnist_lenet": 61_706, "cifar10_net": 62_006, "dense_64": 11_274}


def test_make_train_is_the_quickstart():
    default, quickstart = (compose("train", given).config for given in ([], ["experiment=digits_quickstart"]))
    assert default == quickstart


@pytest.mark.parametrize(("data", "epochs"), [("houses", 500), ("diabetes", 3000)])
def test_gradient_descent_arrives_at_the_closed_form(data, epochs, boltlab):
    quiet = (
        "callbacks=last",
        "logger=csv",
        "test=false",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
    )
    length = (f"trainer.max_epochs={epochs}", f"trainer.check_val_every_n_epoch={epochs}")
    code, _, err = boltlab("train", "experiment=linear_regression", f"data={data}", *quiet, *length)
    assert code == 0, err
    folder = next(runs.folders("logs"))
    module = build(runs.load_config(folder), "data")
    train, test = module.dataset("train"), module.dataset("test")
    closed = LinearRegression().fit(train.x.double().numpy(), train.labels.double().numpy())
    model = package.load(folder, checkpoint="last")
    with torch.inference_mode():
        ours = model.predict_step((test.x,)).flatten().double().numpy()
    exact = closed.predict(test.x.double().numpy())
    # Within a thousandth of the spread of the exact predictions.
    assert np.abs(ours - exact).max() < 1e-3 * exact.std()
