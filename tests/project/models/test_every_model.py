"""Every YAML of configs/model on every shape of the shipped data, with every optimizer and schedule."""

from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

pytestmark = [pytest.mark.slow, pytest.mark.floats]

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
IMAGES = [(1, 28, 28), (1, 8, 8), (3, 32, 32), (3, 64, 64), (3, 224, 224)]


def choices(group):
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml") if not file.stem.startswith("_"))


MODELS = choices("model")
CLASSIFIERS = [name for name in MODELS if not name.endswith("_regressor")]
OWN = [name for name in CLASSIFIERS if name not in ("torchvision", "timm")]


def config(model, shape, *overrides):
    data = f"++data={{input_shape:{list(shape)},num_classes:10}}"
    root = ["++monitor=val_acc", "++mode=max"]
    groups = [f"+model={model}", "+optimizer=sgd", "+scheduler=cosine"]
    chosen = {o.lstrip("+").partition("=")[0] for o in overrides}
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        kept = [g for g in groups if g.lstrip("+").partition("=")[0] not in chosen]
        composed = compose(None, [*kept, data, *root, *overrides])
    return OmegaConf.merge({"loss": None, "metrics": None}, composed)


def build_net(model, shape, device):
    with torch.device(device):
        return instantiate(config(model, shape).model.net, _convert_="all")


@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize("model", CLASSIFIERS)
def test_every_net_takes_every_image_forward_and_backward(model, shape):
    net = build_net(model, shape, "meta")
    output = net(torch.empty(2, *shape, device="meta"))
    assert output.shape == (2, 10)
    output.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("model", MODELS)
def test_every_model_steps(model, data, trainer):
    torch.manual_seed(0)
    # The largest net is stepped in small; its full size is in the test above.
    overrides = ["model.net.depth=10", "model.net.width_factor=1"] if model == "wide_resnet" else []
    shape = (8,) if model.endswith("_regressor") else (3, 16, 16)
    module = instantiate(config(model, shape, "+optimizer=adamw", *overrides).model, _convert_="all")
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    y = torch.randn(4) if model.endswith("_regressor") else torch.arange(4)
    # Two steps: in the first, residual branches stand behind a norm whose weight is 0. AdamW moves even what has a tiny
    # gradient by more than the rounding of a weight of 1.
    trainer(max_epochs=2, limit_val_batches=0).fit(module, datamodule=data(torch.randn(4, *shape), y, batch_size=4))
    assert [name for name, p in module.named_parameters() if torch.equal(p, before[name])] == []
    assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("scheduler", choices("scheduler"))
@pytest.mark.parametrize("optimizer", choices("optimizer"))
def test_every_optimizer_steps_with_every_schedule(optimizer, scheduler, data, trainer):
    torch.manual_seed(0)
    chosen = [f"+optimizer={optimizer}", f"+scheduler={scheduler}", "scheduler.warmup_epochs=1"]
    module = instantiate(config("lenet", (1, 8, 8), *chosen).model, _convert_="all")
    runner = trainer(max_epochs=3)
    runner.fit(module, datamodule=data(torch.randn(12, 1, 8, 8), torch.arange(12) % 10, batch_size=4))
    assert runner.global_step == 9
    assert all(p.isfinite().all() for p in module.parameters())
    # All that a checkpoint holds are tensors and plain values.
    runner.save_checkpoint("x.ckpt")
    torch.load("x.ckpt", weights_only=True)


@pytest.mark.parametrize("model", [name for name in MODELS if name.endswith("_regressor")])
def test_regressors_choose_what_to_monitor(model):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        alone = compose(None, [f"+model={model}"])
    assert alone.monitor == "val_mse"


@pytest.mark.parametrize("model", OWN)
def test_no_module_runs_twice_and_nothing_is_changed_in_place(model):
    net = build_net(model, (3, 32, 32), "meta")
    calls: Counter[str] = Counter()
    changed = []

    def count(name, module, inputs, output):
        calls[name] += 1
        changed.extend(name for x in inputs if x._version != versions[name].pop(0))

    versions = {}

    def remember(name, module, inputs):
        versions[name] = [x._version for x in inputs]

    for name, module in net.named_modules():
        if not list(module.children()):
            module.register_forward_pre_hook(partial(remember, name))
            module.register_forward_hook(partial(count, name))
    net(torch.empty(2, 3, 32, 32, device="meta"))
    leaves = {name for name, module in net.named_modules() if not list(module.children())}
    assert calls == dict.fromkeys(leaves, 1)
    assert not changed
    assert not any(getattr(module, "inplace", False) for module in net.modules())


@pytest.mark.parametrize("model", ["cnn", "lenet", "mlp", "resnet18", "vit_tiny", "wide_resnet"])
def test_nets_export_with_any_batch_size(model):
    torch.manual_seed(0)
    overrides = {"wide_resnet": ["model.net.depth=10", "model.net.width_factor=1"], "vit_tiny": ["model.net.depth=2"]}
    net = instantiate(config(model, (1, 28, 28), *overrides.get(model, [])).model.net, _convert_="all").eval()
    dimensions = {"x": {0: torch.export.Dim("batch")}}
    exported = torch.export.export(net, (torch.randn(2, 1, 28, 28),), dynamic_shapes=dimensions).module()
    x = torch.randn(5, 1, 28, 28)
    assert torch.allclose(exported(x), net(x), atol=1e-5)


@pytest.mark.parametrize("model", OWN)
def test_seeded_nets_are_equal_and_begin_near_chance(model):
    if model in ("wide_resnet", "resnet50", "vit_small"):
        overrides = {"wide_resnet": ["model.net.width_factor=1"]}.get(model, ["model.net.depth=18"])
        overrides = ["model.net.depth=2"] if model == "vit_small" else overrides
    else:
        overrides = []
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(instantiate(config(model, (1, 28, 28), *overrides).model.net, _convert_="all"))
    assert all(torch.equal(p, q) for p, q in zip(nets[0].parameters(), nets[1].parameters(), strict=True))
    loss = nn.functional.cross_entropy(nets[0](torch.randn(16, 1, 28, 28)), torch.arange(16) % 10)
    assert abs(loss.item() - 2.303) < 0.7
