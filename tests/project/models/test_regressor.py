import math
from functools import partial

import pytest
import torch
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score
from torch import nn

from project.models.regressor import Regressor

pytestmark = pytest.mark.floats

SGD = partial(torch.optim.SGD, lr=0.1)


class First(nn.Module):
    """Gives its first feature as the answer, [B, 1]."""

    def forward(self, x):
        return x[:, :1]


@pytest.mark.parametrize("mean", [0.0, 2000.0])
def test_epoch_metrics_equal_scikit_learn(data, trainer, mean):
    y = torch.randn(21, generator=torch.Generator().manual_seed(0)) + mean
    x = torch.stack([y + 0.3 * torch.randn(21, generator=torch.Generator().manual_seed(1)), y], dim=1)
    values = trainer().validate(Regressor(First(), SGD), datamodule=data(x, y), verbose=False)[0]
    answer = x[:, 0].double().numpy()
    truth = y.double().numpy()
    mse = mean_squared_error(truth, answer)
    expected = {"val_loss": mse, "val_mse": mse, "val_mae": mean_absolute_error(truth, answer)}
    assert values == pytest.approx(expected | {"val_r2": r2_score(truth, answer)}, rel=1e-4)


@pytest.mark.parametrize("rows", [1, 2])
def test_r2_of_one_row_is_left_out_and_named(data, trainer, rows, capsys):
    y = torch.randn(rows, generator=torch.Generator().manual_seed(0))
    x = torch.stack([y + 0.3, y], dim=1)
    values = trainer().validate(Regressor(First(), SGD), datamodule=data(x, y), verbose=False)[0]
    assert values.keys() == {"val_loss", "val_mse", "val_mae"} | ({"val_r2"} if rows > 1 else set())
    said = capsys.readouterr().out.count("val_r2 is left out: R² needs two rows at least\n")
    assert said == (rows == 1) and values["val_mse"] == pytest.approx(0.09, rel=1e-4)
    assert rows == 1 or values["val_r2"] == pytest.approx(r2_score(y.numpy(), x[:, 0].numpy()), rel=1e-4)


def test_what_is_no_number_otherwise_is_logged(data, trainer):
    y = torch.tensor([1.0, float("nan"), 2.0])
    values = trainer().validate(Regressor(First(), SGD), datamodule=data(torch.ones(3, 2), y), verbose=False)[0]
    assert math.isnan(values["val_r2"]) and math.isnan(values["val_mse"])


def test_logged_metrics_names_exactly_what_a_run_logs(data, trainer):
    x, y = torch.randn(21, 3), torch.randn(21)
    model = Regressor(nn.Linear(3, 1), SGD)
    trainer = trainer(log_every_n_steps=1)
    trainer.fit(model, datamodule=data(x, y))
    logged = set(trainer.callback_metrics)
    trainer.test(model, datamodule=data(x, y), verbose=False)
    assert logged | set(trainer.callback_metrics) == set(Regressor.logged_metrics({}))


def test_gradient_descent_finds_the_line(data, trainer):
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    weights = torch.tensor([1.0, -2.0, 0.5])
    model = Regressor(nn.Linear(3, 1), SGD)
    trainer(max_epochs=50).fit(model, datamodule=data(x, x @ weights + 4))
    assert torch.allclose(model.net.weight[0], weights, atol=1e-4)
    assert model.net.bias.item() == pytest.approx(4, abs=1e-4)


def test_values_and_targets_of_other_shapes_are_refused_instead_of_broadcast():
    model = Regressor(First(), SGD)
    assert model.predict_step(torch.randn(4, 2)).shape == (4,)
    with pytest.raises(ValueError, match=r"\(4,\) for targets \(4, 1\)"):
        model.criterion(model(torch.randn(4, 2)), torch.randn(4, 1))
