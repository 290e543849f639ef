import copy

import pytest
import torch
from torch import nn

from boltlab.callbacks.summary import ModelSummary, human, summarize


def test_flops_are_those_of_the_formulas():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 10))
    layers = {layer.name: layer for layer in summarize(net, (3, 6, 6))}
    assert layers["0"].flops == 2 * 6 * 6 * 8 * 3 * 3 * 3
    assert layers["3"].flops == 2 * 8 * 6 * 6 * 10
    assert layers[""].flops == layers["0"].flops + layers["3"].flops
    assert layers[""].parameters == sum(p.numel() for p in net.parameters())
    assert (layers["0"].shape, layers["3"].shape) == ((8, 6, 6), (10,))


def test_a_training_run_is_the_same_with_and_without_it(make_trainer, tiny_module, tiny_data, capsys):
    torch.manual_seed(0)
    module = tiny_module()
    twin = copy.deepcopy(module)
    for each, callbacks in ((module, [ModelSummary()]), (twin, [])):
        torch.manual_seed(1)
        make_trainer(callbacks=callbacks).fit(each, datamodule=tiny_data())
    for name, value in module.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    assert "total" in capsys.readouterr().out


def test_nothing_of_the_model_is_touched():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten(), nn.Linear(16, 2))
    net[1].eval()
    state, random_state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    assert summarize(net, (1, 4, 4))[0].flops == 2 * (4 * 4 * 9 + 16 * 2)  # a multiplication and an addition each
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in net] == [True, False, True, True, True]
    assert all(p.grad is None and p.device.type == "cpu" and p.requires_grad for p in net.parameters())
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert not net[0]._forward_hooks


class Unusual(nn.Module):
    """Looks at its input's values, which a copy without storage cannot."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 2)

    def forward(self, x):
        return self.inner(x) if x.sum().item() >= 0 else x


def test_a_net_that_cannot_be_counted_keeps_its_table(make_trainer, tiny_module, tiny_data, capsys):
    layers = summarize(Unusual(), (4,))
    assert [(layer.name, layer.parameters, layer.flops) for layer in layers] == [("", 10, None), ("inner", 10, None)]

    class Module(tiny_module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), Unusual(), nn.Linear(16, 4))

    summary = ModelSummary()
    trainer = make_trainer(callbacks=[summary])
    summary.setup(_with_data(trainer, tiny_data()), Module(), "fit")
    assert summary.flops_per_sample is None
    assert summary.parameters == 10 + 68
    assert "?" in capsys.readouterr().out


def _with_data(trainer, data):
    trainer.datamodule = data
    return trainer


def test_a_compiled_net_is_counted_without_compiling_it():
    net = nn.Sequential(nn.Linear(4, 2))

    def backend(graph, inputs):
        raise AssertionError("compiled")

    net.compile(backend=backend)
    assert summarize(net, (4,))[0].flops == 2 * 4 * 2


def test_frozen_parameters_and_depth(make_trainer, tiny_module, tiny_data, capsys):
    module = tiny_module()
    module.net[0].requires_grad_(False)
    module.net = nn.Sequential(nn.Sequential(*module.net))
    summary = ModelSummary(max_depth=1)
    summary.setup(_with_data(make_trainer(callbacks=[]), tiny_data()), module, "fit")
    shallow = capsys.readouterr().out
    assert "40 frozen" in shallow
    assert summary.trainable_parameters == summary.parameters - 40
    assert "Conv2d" not in shallow
    summary.max_depth = 2
    summary.setup(_with_data(make_trainer(callbacks=[]), tiny_data()), module, "fit")
    assert "Conv2d" in capsys.readouterr().out


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (999, "999"), (1234567, "1.23 M"), (4.1e9, "4.1 G")])
def test_human(number, text):
    assert human(number) == text
