"""The config groups `loss` and `metrics`, against numpy and scikit-learn."""

import lightning as L
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score
from torch.utils.data import DataLoader, TensorDataset

from boltlab.config.build import build
from boltlab.config.compose import compose
from boltlab.ground.errors import ConfigError

QUICK = ("logger=none", "trainer.accelerator=cpu", "precision=32")


def measured(overrides, x, target):
    """What `validate` logs of an untrained module in uneven batches, and the outputs in float64."""
    composed = compose("train", [*QUICK, *overrides])
    torch.manual_seed(0)
    module = build(composed.config, "model")
    loader = DataLoader(TensorDataset(x, target), batch_size=32)
    trainer = L.Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    values = trainer.validate(module, loader, verbose=False)[0]
    with torch.no_grad():
        return values, module.eval()(x).double().numpy(), composed.config


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_classifier_takes_another_loss_and_more_metrics():
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(77, 1, 28, 28, generator=generator), torch.randint(10, (77,), generator=generator)
    values, output, config = measured(
        ["loss=multi_margin", "loss.margin=0.5", "metrics=kappa", "monitor=val_kappa"], x, target
    )
    assert config.mode == "max"  # torchmetrics' own `higher_is_better`
    own = output[np.arange(77), target]
    margins = np.maximum(0, 0.5 - own[:, None] + output)
    margins[np.arange(77), target] = 0
    assert values["val_loss"] == pytest.approx((margins.sum(1) / 10).mean(), rel=1e-5)
    assert values["val_kappa"] == pytest.approx(cohen_kappa_score(target, output.argmax(1)), abs=1e-6)
    assert values["val_acc"] == pytest.approx((output.argmax(1) == target.numpy()).mean(), abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*large memory footprint")
def test_a_regressor_takes_another_loss_and_more_metrics():
    generator = torch.Generator().manual_seed(1)
    x, target = torch.randn(50, 10, generator=generator), 3 * torch.randn(50, generator=generator)
    chosen = [
        "data=diabetes",
        "model=mlp_regressor",
        "loss=huber",
        "loss.delta=2",
        "metrics=spearman",
        "monitor=val_mse",
    ]
    values, output, _ = measured(chosen, x, target)
    error = np.abs(output - target.numpy())
    huber = np.where(error < 2, error**2 / 2, 2 * (error - 1))
    assert values["val_loss"] == pytest.approx(huber.mean(), rel=1e-5)
    assert values["val_mse"] == pytest.approx((error**2).mean(), rel=1e-5)
    assert values["val_spearman"] == pytest.approx(spearmanr(output, target).statistic, abs=1e-5)


@pytest.mark.parametrize(
    ("overrides", "key", "message"),
    [
        (["loss=multi_margin", "model.label_smoothing=0.1"], "model.label_smoothing", "is an option of cross entropy"),
        (["loss=multi_margin", "model.mixup_alpha=0.2"], "model.mixup_alpha", "is an option of cross entropy"),
        (["loss=hubr"], "loss=hubr", "did you mean 'huber'"),
    ],
)
def test_a_mistake_is_named(overrides, key, message):
    with pytest.raises(ConfigError) as error:
        compose("train", [*QUICK, *overrides])
    assert [key in m.where and message in m.message for m in error.value.mistakes] == [True]


def test_a_metric_of_a_name_that_is_taken_is_refused(boltlab):
    kappa = "{_target_: torchmetrics.classification.MulticlassCohenKappa, num_classes: 10}"
    code, _, err = boltlab("train", *QUICK, f"+metrics.f1={kappa}")
    assert code == 2 and "metrics.f1" in err and "this name is taken" in err, err
