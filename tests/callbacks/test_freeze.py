"""What is frozen stays as it is to the bit, also in the optimizer; the rest is trained; resumed, the same again."""

import pytest
import torch
from safetensors.torch import save_file

from boltlab import runs
from boltlab.checkpoints import file as checkpoint_file
from boltlab.config.build import build
from boltlab.config.compose import compose
from boltlab.ground.errors import UserError
from boltlab.training.trainer import make_trainer

pytestmark = [pytest.mark.slow, pytest.mark.floats]

QUICK = ("logger=csv", "test=false", "trainer.accelerator=cpu", "data.batch_size=400", "callbacks=[freeze,last]")
STAGES = '[[0,last_layer],[1,"classifier.[34]"],[2,"*"]]'


def fit(folder, *overrides, epochs, ckpt_path=None):
    """The model before and after, and its trainer."""
    config = compose("train", [*QUICK, f"trainer.max_epochs={epochs}", *overrides]).config
    config.run_dir = str(folder)
    torch.manual_seed(0)
    data, model = build(config, "data"), build(config, "model")
    before = {key: value.clone() for key, value in model.net.state_dict().items()}
    trainer = make_trainer(config)
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return before, model.net.state_dict(), trainer


def changed(before, after):
    return {name for name, value in after.items() if not torch.equal(before[name], value)}


OPTIMIZERS = {
    "sgd": ("optimizer.momentum=0.9", "optimizer.weight_decay=0.1"),
    "adamw": ("optimizer.weight_decay=0.1", "optimizer.fused=true"),
    "adam": ("optimizer.weight_decay=0.1", "optimizer.fused=false"),
    "muon": ("optimizer.weight_decay=0.1",),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_frozen_weights_do_not_move_under_any_optimizer(tmp_path, optimizer):
    chosen = (f"optimizer={optimizer}", *OPTIMIZERS[optimizer], "trainer.gradient_clip_val=1.0", "model.l1=1e-4")
    head = {"classifier.6.weight", "classifier.6.bias"}
    stages = f"callbacks.freeze.train_from={STAGES}"
    before, after, trainer = fit(tmp_path / "a", *chosen, stages, epochs=1)
    assert changed(before, after) == head  # neither weight decay nor a batch norm's statistics
    (ours,) = trainer.optimizers
    assert len(ours.state) == 2 and sum(len(g["params"]) for g in ours.param_groups) == len(
        list(trainer.model.net.parameters())
    )

    _, after, _ = fit(tmp_path / "b", *chosen, stages, epochs=2)
    second = changed(before, after)
    assert head < second and all(name.startswith(("classifier.3", "classifier.4", "classifier.6")) for name in second)

    _, after, _ = fit(tmp_path / "c", *chosen, stages, epochs=3)
    assert changed(before, after) == set(before)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_resumed_it_is_the_same_to_the_bit(tmp_path):
    stages = f"callbacks.freeze.train_from={STAGES}"
    _, whole, _ = fit(tmp_path / "whole", stages, epochs=3)
    every = ("callbacks.last.keep_last=3", stages)
    fit(tmp_path / "whole2", *every, epochs=3)
    for epoch in (0, 1):
        first = tmp_path / "whole2" / "checkpoints" / f"last-{2 - epoch}.ckpt"
        _, after, trainer = fit(tmp_path / f"resumed{epoch}", *every, epochs=3, ckpt_path=str(first))
        assert trainer.current_epoch == 3 and not changed(whole, after)


def test_statistics_of_frozen_norms_move_if_they_are_to(tmp_path):
    before, after, _ = fit(tmp_path, "callbacks.freeze.norms_in_eval=false", epochs=1)
    moved = changed(before, after)
    assert {name for name in moved if "running" in name} == {name for name in before if "running" in name}
    assert not {name for name in moved if name.startswith("features") and name.endswith(("weight", "bias"))}


def test_a_pattern_without_a_match_is_named(tmp_path):
    with pytest.raises(UserError, match=r"'clasifier' matches no .* there are: classifier, "):
        fit(tmp_path, "callbacks.freeze.train_from=[[0,clasifier]]", epochs=1)


@pytest.mark.parametrize("stages", ["[]", "[[1,fc]]"])
def test_something_is_trained_in_the_first_epoch(boltlab, stages):
    code, _, err = boltlab("train", *QUICK, f"callbacks.freeze.train_from={stages}")
    assert code == 2 and "begins with epoch 0" in err


def test_two_processes_train_as_one_does(boltlab_process, tmp_path):
    stages = 'callbacks.freeze.train_from=[[0,last_layer],[1,"*"]]'
    every = ("callbacks.last.keep_last=2",)
    run = (stages, "model=lenet", "optimizer=sgd", "optimizer.weight_decay=0.1", *every)
    before, one, _ = fit(tmp_path / "one", *run, epochs=2)
    two = ("trainer=ddp", "trainer.devices=2", "trainer.max_epochs=2", "init_from=start.safetensors")
    save_file({key: value.contiguous() for key, value in before.items()}, tmp_path / "start.safetensors")
    done = boltlab_process("train", *two, *QUICK, *run)
    assert done.returncode == 0, done.stderr
    folder = next(iter(runs.folders("logs"))) / "checkpoints"
    first, second = (
        {name: checkpoint_file.read(folder / file)["state_dict"][f"net.{name}"] for name in before}
        for file in ("last-1.ckpt", "last.ckpt")
    )
    assert {name.split(".")[1] for name in changed(before, first)} == {"4"}
    assert changed(first, second) == set(before)
    for name in before:
        torch.testing.assert_close(one[name], second[name], rtol=1e-4, atol=1e-5)
