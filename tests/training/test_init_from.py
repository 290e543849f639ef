"""`init_from`: a new run begins with the weights of another, and with nothing else of it."""

import hashlib

import pytest
import torch
from safetensors.torch import save_file

from boltlab import load, runs
from boltlab.checkpoints import file as checkpoint_file
from boltlab.checkpoints.file import CheckpointError
from boltlab.config.build import build
from boltlab.config.compose import compose
from boltlab.config.edit import edit
from boltlab.runs import checkpoints
from boltlab.training import init_from as transfer

pytestmark = [pytest.mark.slow, pytest.mark.floats]

QUICK = ("logger=csv", "trainer.accelerator=cpu", "callbacks=[best,last]", "trainer.max_epochs=1", "test=false")
# The learning rate of nothing: what the run ends with is what it began with.
STILL = ("optimizer=sgd", "optimizer.lr=0.0", "scheduler=constant", "optimizer.weight_decay=0.0")
SEVEN = ("data.num_classes=7", "data.class_names=[a,b,c,d,e,f,g]")


@pytest.fixture
def trained(boltlab):
    """The folder of a run on digits."""
    code, _, err = boltlab("train", *QUICK, "model=lenet_bn", "seed=3")
    assert code == 0, err
    return next(iter(runs.folders("logs")))


def net_of(content):
    return {key: value for key, value in content["state_dict"].items() if key.startswith("net.")}


def made(*overrides):
    """A model as a new run gets it."""
    config = compose("train", [*QUICK, *overrides]).config
    transfer.settle(config)
    model = build(config, "model")
    transfer.initialize(model, config)
    return model


def test_a_run_begins_with_the_weights_of_another(boltlab, trained):
    source = checkpoint_file.read(trained / "checkpoints" / "best.ckpt")
    code, out, err = boltlab("train", *QUICK, *STILL, "model=lenet_bn", "init_from=latest")
    assert code == 0, err
    folder = next(iter(runs.folders("logs")))
    assert folder != trained
    found = checkpoint_file.read(folder / "checkpoints" / "last.ckpt")
    weights = dict(load(trained).net.named_parameters())
    assert weights and all(torch.equal(found["state_dict"][f"net.{name}"], p) for name, p in weights.items())
    assert found["epoch"] == 1 and found["global_step"] == source["global_step"]  # counted anew

    path = trained / "checkpoints" / "best.ckpt"
    kept = runs.read_summary(folder)["init_from"]
    assert kept == {
        "path": str(path.resolve()),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "new_head": [],
        "not_taken": [],
    }
    assert runs.load_config(folder).init_from == str(path.resolve())
    assert f"init_from  {runs.shown(path)}: {len(net_of(source))} of {len(net_of(source))} tensors\n" in out


def test_buffers_come_along_and_metrics_and_class_weights_do_not(trained):
    path = trained / "checkpoints" / "best.ckpt"
    source = checkpoint_file.read(path)
    source["state_dict"] |= {"train_metrics.samples": torch.tensor(5.0), "class_weights": torch.ones(10)}
    checkpoint_file.write(source, path)
    model = made("model=lenet_bn", f"init_from={path}", f"model.class_weights={[2.0] * 10}")
    state = model.state_dict()
    statistics = [key for key in net_of(source) if "running" in key]
    assert statistics and all(torch.equal(state[key], value) for key, value in net_of(source).items())
    assert float(model.class_weights.sum()) == 20.0
    assert float(model.train_metrics.samples) == 0.0


def test_other_classes_get_a_new_head_and_all_else_is_taken(trained, capsys, tmp_path):
    source = net_of(checkpoint_file.read(trained / "checkpoints" / "best.ckpt"))
    config = compose("train", [*QUICK, "model=lenet_bn", f"init_from={trained}", *SEVEN]).config
    transfer.settle(config)
    torch.manual_seed(1)
    model = build(config, "model")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (tmp_path / "run").mkdir()
    transfer.initialize(model, config, tmp_path / "run")
    state = model.state_dict()
    head = [key for key in source if source[key].shape[:1] == (10,)][-2:]
    assert [len(state[key]) for key in head] == [7, 7]
    assert all(torch.equal(state[key], before[key]) for key in head)
    assert all(torch.equal(state[key], source[key]) for key in source if key not in head)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("head: "))
    assert all(f"{key} [10" in line and "-> [7" in line for key in head) and line.endswith(", new")


def test_what_does_not_fit_is_named_and_listed_with_init_strict_false(boltlab, trained):
    wider = (*QUICK, "model=lenet_bn", f"init_from={trained}", "model.net.channels=[9,32]")
    source = net_of(checkpoint_file.read(checkpoints.find(trained)))
    first, old = next((key, list(value.shape)) for key, value in source.items() if value.ndim == 4)
    line = f"{first} {old} -> {[9, *old[1:]]}"
    code, _, err = boltlab("train", *wider)
    assert code == 1
    assert line in err and "init_strict=false takes what fits" in err and err.count("->") == 5

    code, out, err = boltlab("train", *wider, "init_strict=false")
    assert code == 0, err
    assert f"not taken: {line}" in " ".join(out.split())
    summary = runs.read_summary(next(iter(runs.folders("logs"))))["init_from"]
    assert line in summary["not_taken"] and not summary["new_head"]
    fits = len(source) - len(summary["not_taken"])
    assert f": {fits} of {len(source)} tensors\n" in out

    with pytest.raises(CheckpointError, match="nothing of it fits"):
        made("model=mlp", "model.net.hidden_sizes=[33]", f"init_from={trained}", "init_strict=false")


def test_a_net_s_own_safetensors_fit_a_task_too(trained, tmp_path):
    source = net_of(checkpoint_file.read(checkpoints.find(trained)))
    for prefix in ("", "net."):  # as a task names them, and as the net itself does
        path = tmp_path / "weights.safetensors"
        save_file({key.removeprefix(prefix): value.contiguous() for key, value in source.items()}, path)
        model = made("model=lenet_bn", f"init_from={path}")
        assert all(torch.equal(model.state_dict()[key], value) for key, value in source.items())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="weights.safetensors cannot be read"):
        made("model=lenet_bn", f"init_from={path}")


def test_pretrained_weights_are_not_asked_for(monkeypatch, tmp_path):
    plain = [*QUICK, "model=torchvision", "model.net.name=squeezenet1_1"]
    model = build(compose("train", plain).config, "model")
    save_file(
        {key: value.contiguous() for key, value in model.net.net.state_dict().items()}, tmp_path / "w.safetensors"
    )
    config = compose("train", [*plain, "model.net.pretrained=true", "init_from=w.safetensors"]).config
    new = build(config, "model")
    monkeypatch.setattr(type(new.net), "load_pretrained", lambda net: pytest.fail("was asked for"))
    transfer.initialize(new, config)
    new.net.load_pretrained()
    assert all(torch.equal(a, b) for a, b in zip(new.parameters(), model.parameters(), strict=True))


MISTAKES = {
    "nowhere": "there is no run yet under",
    "nowhere.ckpt": "there is no such file",
    "nowhere.safetensors": "there is no such file",
    "broken.ckpt": "is cut short",
    "http://127.0.0.1:9/a.ckpt": "cannot fetch http://127.0.0.1:9/a.ckpt",
}


@pytest.mark.parametrize("given", MISTAKES)
def test_a_mistaken_source_is_a_mistake_of_the_config(boltlab, tmp_path, given):
    (tmp_path / "broken.ckpt").write_bytes(b"PK no more")
    code, out, err = boltlab("train", *QUICK, f"init_from={given}")
    assert (code, out) == (2, "") and f"init_from={given}" in err and MISTAKES[given] in err
    assert not (tmp_path / "logs").exists()


def test_the_name_of_no_run_is_named_once(boltlab, trained):
    code, _, err = boltlab("train", *QUICK, "init_from=nowhere")
    assert code == 2 and "init_from=nowhere\n      is neither a run folder nor part of the name" in err


def test_latest_is_refused_in_a_grid(boltlab, trained):
    code, _, err = boltlab("train", "-m", *QUICK, "seed=1,2", "init_from=latest")
    assert code == 2 and "init_from=latest\n" in err and "name the run" in err


def test_a_run_stays_usable_without_the_file_that_it_began_with(trained):
    path = trained / "checkpoints" / "best.ckpt"
    config = compose("train", [*QUICK, f"init_from={path}"]).config
    path.unlink()
    assert edit(config, []).init_from is None
