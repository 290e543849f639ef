import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from boltlab.optim.muon import Muon, orthogonalize

pytestmark = pytest.mark.floats


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    )


def train(net, optimizer, steps, scheduler=None):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x, y = torch.randn(6, 1, 4, 4, generator=generator), torch.randint(3, (6,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


@pytest.mark.parametrize("shape", [(8, 8), (4, 30), (30, 4)])
def test_orthogonalized_matrix_has_singular_values_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalize(matrix, 5).float()
    assert result.shape == shape
    singular = torch.linalg.svdvals(result)
    assert singular.min() > 0.3
    assert singular.max() < 1.4
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    assert nn.functional.cosine_similarity(result.flatten(), (u @ v).flatten(), dim=0) > 0.95


def test_hidden_weights_get_muon_and_the_rest_gets_adamw():
    optimizer = Muon(make_net().named_parameters())
    found = {name: group["muon"] for group in optimizer.param_groups for name in group["param_names"]}
    hidden = {"0.weight", "4.weight"}  # 6 is the output layer, 1 a norm
    assert found == {name: name in hidden for name, _ in make_net().named_parameters()}


@pytest.mark.parametrize("nesterov", [True, False])
def test_a_matrix_moves_as_with_torch_muon_and_the_rest_as_with_torch_adamw(nesterov):
    ours, theirs = make_net(), make_net()
    train(ours, Muon(ours.named_parameters(), 0.01, 0.1, nesterov=nesterov), 3)
    matrices = [theirs[4].weight]
    others = [p for p in theirs.parameters() if p is not matrices[0] and p is not theirs[0].weight]
    muon = torch.optim.Muon(matrices, 0.01, 0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, 0.01, weight_decay=0.1)
    # The convolution, which torch's Muon refuses, is one as a matrix.
    kernel = nn.Parameter(theirs[0].weight.detach().flatten(1))
    convolution = torch.optim.Muon([kernel], 0.01, 0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw")

    class All:
        def zero_grad(self):
            theirs.zero_grad()

        def step(self):
            kernel.grad = theirs[0].weight.grad.flatten(1)
            for optimizer in (muon, adamw, convolution):
                optimizer.step()
            with torch.no_grad():
                theirs[0].weight.copy_(kernel.view_as(theirs[0].weight))

    train(theirs, All(), 3)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6), name


@pytest.mark.parametrize("copied", ["state dict", "deepcopy"])
def test_a_restored_optimizer_goes_on_bit_by_bit(copied):
    net = make_net()
    optimizer = Muon(net.named_parameters(), 0.01)
    train(net, optimizer, 2)
    if copied == "deepcopy":
        other, restored = copy.deepcopy((net, optimizer))
    else:
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        other = copy.deepcopy(net)
        restored = Muon(other.named_parameters(), 0.5)
        restored.load_state_dict(torch.load(file, weights_only=True))
    assert restored.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    train(net, optimizer, 3)
    train(other, restored, 3)
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_learning_rate_schedules_reach_both_parts():
    net = make_net()
    optimizer = Muon(net.named_parameters(), 0.01)
    scheduler = LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    train(net, optimizer, 1, scheduler)
    before = copy.deepcopy(list(net.parameters()))
    train(net, optimizer, 2, scheduler)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_groups_keep_their_own_options():
    net = make_net()
    named = list(net.named_parameters())
    weights = {"params": [(n, p) for n, p in named if p.ndim > 1]}
    rest = {"params": [(n, p) for n, p in named if p.ndim == 1], "weight_decay": 0.0}
    optimizer = Muon([weights, rest], 0.01, 0.3)
    decay = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert decay == {name: 0.3 if p.ndim > 1 else 0.0 for name, p in named}


def test_a_linear_model_is_all_adamw():
    net = nn.Linear(4, 3)
    optimizer = Muon(net.named_parameters())
    assert [group["muon"] for group in optimizer.param_groups] == [False]
    net(torch.randn(2, 4)).sum().backward()
    optimizer.step()


def test_memory_layout_does_not_matter():
    nets = [make_net(), make_net().to(memory_format=torch.channels_last)]
    for net in nets:
        train(net, Muon(net.named_parameters(), 0.01), 2)
    assert torch.allclose(nets[0][0].weight, nets[1][0].weight, atol=1e-6)


def test_parameters_need_names():
    with pytest.raises(ValueError, match=r"pass net\.named_parameters\(\)"):
        Muon(make_net().parameters())
