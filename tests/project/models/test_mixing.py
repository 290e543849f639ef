"""Mixup and cutmix: the loss is that of both classes in their shares; at alpha 0 nothing is changed or drawn."""

import pytest
import torch
from torch import nn
from torch.optim import SGD

from project.models.classifier import Classifier

pytestmark = pytest.mark.floats


def made(**arguments):
    torch.manual_seed(1)
    return Classifier(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4)), SGD, 4, **arguments)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3, 1, 1])


PLAIN = ({}, {"label_smoothing": 0.1}, {"class_weights": [1.0, 2.0, 0.5, 3.0], "label_smoothing": 0.1})


@pytest.mark.parametrize("arguments", PLAIN)
@pytest.mark.parametrize("kind", ["mixup_alpha", "cutmix_alpha"])
def test_the_loss_is_that_of_both_classes_in_their_shares(batch, kind, arguments):
    x, y = batch
    model = made(**{kind: 1.0}, **arguments)
    for seed in range(5):
        torch.manual_seed(seed)
        drawn = model.mixers[0].make_params([x])
        if kind == "mixup_alpha":
            share, mixed = drawn["lam"], drawn["lam"] * x + (1 - drawn["lam"]) * x.roll(1, 0)
        else:
            (x1, y1, x2, y2), share = drawn["box"], drawn["lam_adjusted"]
            mixed = x.clone()
            mixed[..., y1:y2, x1:x2] = x.roll(1, 0)[..., y1:y2, x1:x2]
            assert share == pytest.approx(1 - (x2 - x1) * (y2 - y1) / 64)
        one, weight = model.criterion(model(mixed), y)
        other, _ = model.criterion(model(mixed), y.roll(1, 0))
        model.train_metrics.reset()
        torch.manual_seed(seed)
        loss = model.training_loss((x.clone(), y))
        torch.testing.assert_close(loss, share * one + (1 - share) * other)
        larger = y if share > 0.5 else y.roll(1, 0)
        found = model.train_metrics.compute()
        assert found["train_acc"] == pytest.approx(float((model(mixed).argmax(1) == larger).float().mean()), abs=1e-6)
        assert float(model.train_metrics.weight) == pytest.approx(float(weight))


def test_alpha_0_changes_and_draws_nothing(batch):
    model = made()
    expected = model.criterion(model(batch[0]), batch[1])[0]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert torch.equal(model.training_loss(batch), expected)
    assert torch.equal(torch.get_rng_state(), before)


def test_of_two_kinds_each_batch_gets_one_and_its_own_share(batch):
    model = made(mixup_alpha=0.5, cutmix_alpha=0.5)
    used = []
    for mixer in model.mixers:
        mixer.register_forward_hook(lambda module, *_: used.append(type(module).__name__))
    torch.manual_seed(0)
    losses = {float(model.training_loss(batch).detach()) for _ in range(60)}
    assert len(used) == 60 and 15 < used.count("MixUp") < 45
    assert len(losses) > 40


def test_float64_and_a_single_sample_are_taken(batch):
    x, y = batch
    model = made(mixup_alpha=1.0, class_weights=[1.0, 2.0, 0.5, 3.0]).double()
    assert model.training_loss((x.double(), y)).dtype == torch.float64
    expected = model.criterion(model(x[:1]), y[:1])[0]
    assert torch.equal(model.training_loss((x[:1], y[:1])), expected)  # nothing to mix it with


REFUSED = {
    "model.mixup_alpha=-0.1": (2, "takes float from 0"),
    "model.cutmix_alpha=1 data.num_classes=1 data.class_names=[a]": (2, "there is one only"),
    "model.cutmix_alpha=1 data.batch_size=1": (1, "data.batch_size is too small"),
    "model.mixup_alpha=1 data=synthetic model=mlp": (1, "this data holds none"),
    "model=mlp_regressor data=diabetes +model.mixup_alpha=1": (2, "Regressor takes no argument 'mixup_alpha'"),
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_cannot_be_mixed_is_refused(boltlab, overrides):
    code, message = REFUSED[overrides]
    more = ["monitor=val_loss"] * ("diabetes" in overrides)
    found, _, err = boltlab("train", "logger=csv", "trainer.accelerator=cpu", *overrides.split(), *more)
    assert found == code and message in err
