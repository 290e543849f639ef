import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from boltlab.commands.bench import verdict
from boltlab.config.compose import compose
from boltlab.training import probe, speed
from boltlab.training.speed import Figures, candidates

pytestmark = pytest.mark.slow

FIGURES = Figures(
    device="cpu",
    batch_size=64,
    workers=2,
    loader=9000.0,
    step=1000.0,
    loop=800.0,
    whole=400.0,
    data_wait_share=0.5,
    weights=4,
    gradients=4,
    optimizer=8,
    activations=100,
    peak_memory=None,
    free_memory=None,
    flops=10,
    peak_flops_per_second=100_000.0,
)
QUICK = ("seconds=0.05", "model=linear", "data.batch_size=256", "trainer.accelerator=cpu")


def test_bench_prints_all_parts_and_leaves_nothing(boltlab):
    code, out, err = boltlab("bench", *QUICK, "output=figures.json", "trainer.max_epochs=1", "trainer.max_steps=1")
    assert code == 0, err
    for text in ("loader alone", "step alone", "with the loop", "with the loader", "memory", "FLOP/s", "limit"):
        assert text in out
    assert [path.name for path in Path().iterdir()] == ["figures.json"]
    figures = json.loads(Path("figures.json").read_text())
    assert min(figures[part] for part in ("loader", "step", "loop", "whole")) > 0
    assert sum(figures["shares"].values()) == pytest.approx(1)
    assert 0 <= figures["data_wait_share"] <= 1
    # 28*28 inputs, 10 outputs and biases, of 4 bytes; AdamW keeps two numbers for each, and a step count.
    assert figures["weights"] == figures["gradients"] == 4 * (784 * 10 + 10)
    assert figures["optimizer"] == 2 * figures["weights"] + 2 * 4
    assert figures["flops"] == 2 * 2 * 784 * 10  # forward, and the weights' gradient; the input needs none


@pytest.mark.parametrize(
    "overrides",
    [
        ("data=diabetes", "model=linear_regressor", "scheduler=plateau"),
        ("debug=overfit", "callbacks=[default,early_stopping]", "model.class_weights=balanced"),
        ("callbacks=none", "logger=none", "trainer.fast_dev_run=true", "test=false", "precision=bf16-mixed"),
    ],
)
def test_bench_takes_what_train_takes(overrides, boltlab, monkeypatch):
    monkeypatch.setattr(speed, "candidates", lambda *_, **__: [])
    quick = [given for given in QUICK if given.split("=")[0] not in [o.split("=")[0] for o in overrides]]
    code, _, err = boltlab("bench", *quick, *overrides)
    assert code == 0, err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seconds=0", "takes float above 0"),
        ("secs=1", "did you mean 'seconds'?"),
        ("optimizer.lrr=1", "did you mean 'lr'?"),
        ("trainer.devices=2", "take trainer.devices=1"),
        ("optimizer.lr=auto", "AdamW takes float"),
    ],
)
def test_bench_refuses_what_train_refuses(override, message, boltlab):
    code, out, err = boltlab("bench", *QUICK, override)
    assert (code, out) == (2, "") and message in err


def test_help_shows_the_keys_and_groups_of_train(boltlab):
    _, out, _ = boltlab("bench", "--help")
    for text in ("resnet18", "mnist_mlp", "seconds=2.0", "monitor=", "output=null"):
        assert text in out


def test_shares_are_the_differences_of_the_times():
    assert FIGURES.shares() == pytest.approx({"step": 0.4, "loop": 0.1, "data": 0.5})
    # A loop that was measured as faster than its own step takes nothing.
    assert replace(FIGURES, loop=1600.0).shares() == pytest.approx({"step": 0.25, "loop": 0, "data": 0.75})
    # Without workers, data costs no more than it was waited for.
    alone = replace(FIGURES, workers=0, data_wait_share=0.1)
    assert alone.shares() == pytest.approx({"step": 0.72, "loop": 0.18, "data": 0.1})


def test_the_verdict_names_the_largest_part():
    assert "waits for the loader" in verdict(FIGURES)
    assert "takes the processor" in verdict(replace(FIGURES, data_wait_share=0.1))
    assert "Python of the loop" in verdict(replace(FIGURES, step=8000.0, whole=790.0))
    bare = replace(FIGURES, loop=990.0, whole=980.0)
    assert "memory traffic" in verdict(bare)
    assert "arithmetic: 49%" in verdict(replace(bare, flops=50))
    assert "not known" in verdict(replace(bare, flops=None))


def test_only_what_could_help_is_tried_and_only_what_helped_is_advised():
    config = compose("train", ["precision=32"]).config
    tries = candidates(config, FIGURES, samples=1000, in_memory=False, image=True)
    assert tries == ["data.num_workers=0", "precision=bf16-mixed channels_last=true", "data.batch_size=128"]
    assert "data.num_workers=0" not in candidates(config, FIGURES, samples=1000, in_memory=True, image=True)
    slow_step = replace(FIGURES, loop=990.0, whole=980.0)
    # As large a batch as that is more than there are samples.
    assert candidates(config, slow_step, 100, False, False) == ["precision=bf16-mixed"]
    config.compile = True
    assert candidates(config, FIGURES, 1000, False, True) == []
    assert replace(FIGURES, tried={"a": 1.2, "b": 1.5}).best_change() == "b"
    assert replace(FIGURES, tried={"a": 1.05}).best_change() is None


@pytest.mark.parametrize(("slow", "part"), [("loader", "data"), ("callback", "loop"), ("net", "step")])
def test_the_part_that_was_made_slow_is_found(slow, part, monkeypatch):
    """By a clock that each look moves on by 10 µs, and the slow part by 20 ms: no machine's speed decides."""
    import time

    from boltlab.callbacks.throughput import Throughput
    from boltlab.data.base import Loader
    from project.models.mlp import MLP

    now = 0.0

    def moved(seconds):
        nonlocal now
        now += seconds
        return now

    def slower(function):
        return lambda *arguments, **named: (moved(0.02), function(*arguments, **named))[1]

    monkeypatch.setattr(time, "perf_counter", lambda: moved(1e-5))
    if slow == "loader":
        original = Loader.__iter__
        monkeypatch.setattr(Loader, "__iter__", lambda self: (x for x in original(self) if moved(0.02)))
    elif slow == "callback":
        monkeypatch.setattr(Throughput, "on_train_batch_end", slower(Throughput.on_train_batch_end))
    else:
        monkeypatch.setattr(MLP, "forward", slower(MLP.forward))
    monkeypatch.setattr(speed, "candidates", lambda *_, **__: [])
    figures = speed.measure(compose("train", ["model=mlp", "logger=csv", "precision=32"]).config, 0.1)
    shares = figures.shares()
    assert max(shares, key=lambda name: shares[name]) == part


def test_kept_bytes_are_those_of_the_tensors_that_backward_needs():
    class Model:
        def __init__(self):
            self.net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Sigmoid(), torch.nn.Linear(16, 2))

        def parameters(self):
            return self.net.parameters()

    step = probe.Step.__new__(probe.Step)
    step.model = Model()
    step.loss = lambda batch: step.model.net(batch[0]).sum()
    # The input [4, 8], and once the output [4, 16] of the sigmoid, which it shares with what comes next; no weights.
    assert step.activation_bytes((torch.zeros(4, 8), None)) == 4 * (4 * 8 + 4 * 16)


def test_the_bare_step_is_the_step_of_a_training():
    found = []

    def batches(trainer, model, loader):
        step = probe.Step(trainer, model)
        for group in step.optimizer.param_groups:
            group["lr"] = 0.1
        batch = probe.to_device(trainer, next(iter(loader)))
        before = {name: p.detach().clone() for name, p in model.net.named_parameters()}
        step(batch)
        bare = [p.detach().clone() for p in model.net.parameters()]
        model.net.load_state_dict(before)
        yield batch
        found.extend(zip(bare, (p.detach().clone() for p in model.net.parameters()), before.values(), strict=True))

    plain = ["optimizer=sgd", "optimizer.momentum=0", "optimizer.nesterov=false", "scheduler=constant"]
    probe.fit(compose("train", [*plain, "model=linear", "trainer.gradient_clip_val=0.1"]).config, batches)
    for bare, trained, before in found:
        assert torch.equal(bare, trained) and not torch.equal(bare, before)
    assert found
