"""Every verb on plain LightningModules with plain data modules: the values are those of Lightning's own Trainer."""

import csv
import io
import itertools
import json
import shutil
from pathlib import Path

import lightning as L
import pytest
import torch
from PIL import Image
from plain.conftest import KINDS, QUICK, overrides
from safetensors.torch import load_file, save_file
from sklearn.metrics import confusion_matrix

import boltlab as package
from boltlab import runs
from boltlab.checkpoints import file as checkpoint_file
from boltlab.config import project
from boltlab.config.compose import compose
from boltlab.config.sources import CONFIG_DIR
from boltlab.ground.errors import ConfigError
from boltlab.runs import checkpoints

pytestmark = [
    pytest.mark.floats,
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance"),  # as the template has it
]
NO_TEST = {"gan"}


def data_of(kind):
    import cells.data

    data = {"digits": "Digits", "labels": "MultiLabelData", "sequences": "Sequences", "series": "Series"}
    return getattr(cells.data, data[KINDS[kind][0]])(batch_size=16)


def with_lightning(run, kind, verb, **arguments):
    """What a Trainer of Lightning alone gives for the loaded module."""
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(**quiet)
    found = getattr(trainer, verb)(package.load(run), **(arguments or {"datamodule": data_of(kind)}))
    return found if verb == "predict" else {key: float(value) for key, value in trainer.callback_metrics.items()}


def evaluated(boltlab, *arguments):
    code, _, err = boltlab("eval", "logger=none", *arguments)
    assert code == 0, err
    return runs.read_summary(next(runs.folders("logs", "eval")))["test"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_plain_module_trains_unedited_and_loads_with_the_best_weights(inside, trained, kind):
    run = trained(kind)
    summary = runs.read_summary(run)
    assert summary["status"] == "finished" and KINDS[kind][2] in summary["best"]
    assert bool(summary["test"]) == (kind not in NO_TEST)
    model, saved = package.load(run), torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert type(model).__module__ == "cells.models" and not model.training
    assert model.state_dict().keys() == saved["state_dict"].keys()
    assert all(torch.equal(value, saved["state_dict"][key]) for key, value in model.state_dict().items())
    environment = json.loads((run / "environment.json").read_text())
    assert environment["project"] == {"name": "cells", "package": "cells", "version": "0.3"}


@pytest.mark.parametrize("kind", sorted({*KINDS} - NO_TEST))
def test_eval_equals_the_test_of_lightning(boltlab, inside, trained, kind):
    run = trained(kind)
    expected = with_lightning(run, kind, "test")
    assert expected and evaluated(boltlab, f"run={run}") == expected
    assert runs.read_summary(run)["test"] == pytest.approx(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_eval_of_val_equals_the_validation_of_lightning(boltlab, inside, trained, kind):
    run = trained(kind)
    expected = with_lightning(run, kind, "validate")
    found = evaluated(boltlab, f"run={run}", "split=val")
    assert expected and found == expected
    if kind not in NO_TEST:
        assert list(found.values()) != list(evaluated(boltlab, f"run={run}").values())


def test_eval_of_train_takes_each_training_sample_once_in_order(boltlab, inside, trained):
    run, data = trained("vae"), data_of("vae")
    data.setup("fit")
    loader = torch.utils.data.DataLoader(data.parts["train"], batch_size=16)
    expected = with_lightning(run, "vae", "validate", dataloaders=loader)
    found = evaluated(boltlab, f"run={run}", "split=train")
    assert found == {f"train_{key.removeprefix('val_')}": value for key, value in expected.items()}
    assert "train_interval_kl" in found  # only the first word of a name is the split's


def test_eval_of_another_batch_size_gives_the_data_module_its_state(boltlab, inside, trained):
    run = trained("labels")
    content = checkpoint_file.read(run / "checkpoints" / "best.ckpt")
    assert content["MultiLabelData"]["mean"].shape == (6,)
    content["MultiLabelData"]["mean"] = content["MultiLabelData"]["mean"] + 1
    other = Path("shifted") / "checkpoints" / "best.ckpt"
    other.parent.mkdir(parents=True)
    for name in ("config.yaml", "summary.json"):
        (other.parents[1] / name).write_bytes((run / name).read_bytes())
    checkpoint_file.write(content, other)
    data = data_of("labels")
    data.load_state_dict(content["MultiLabelData"])
    expected = with_lightning(other.parents[1], "labels", "test", datamodule=data)
    assert evaluated(boltlab, "run=shifted") == expected != with_lightning(run, "labels", "test")


@pytest.mark.parametrize("arguments", [("eval",), ("predict",)])
def test_a_module_without_the_step_is_told_what_it_needs(boltlab, inside, trained, arguments):
    step = {"eval": "test_step", "predict": "predict_step"}[arguments[0]]
    code, _, err = boltlab(*arguments, f"run={trained('gan')}")
    assert code == 1 and err.count("\n") == 1 and f"GAN has no {step}" in err


def test_predict_writes_tensors_as_lightning_predicts_them(boltlab, inside, trained):
    run, data = trained("vae"), data_of("vae")
    data.setup("test")
    expected = torch.cat(with_lightning(run, "vae", "predict", dataloaders=data.test_dataloader()))
    code, out, err = boltlab("predict", f"run={run}", "output=out/images.pt")
    assert code == 0 and "31 samples" in out, err
    assert torch.equal(torch.load("out/images.pt", weights_only=True), expected)
    code, _, err = boltlab("predict", f"run={run}", "output=out/images.csv")
    assert code == 2 and "float32 [16, 1, 8, 8]" in err and "output=images.pt" in err


@pytest.mark.parametrize("kind", ["lstm", "forecaster", "lit"])
def test_predict_writes_a_row_of_each_sample(boltlab, inside, trained, kind):
    run, data = trained(kind), data_of(kind)
    data.setup("test")
    expected = torch.cat(with_lightning(run, kind, "predict", dataloaders=data.test_dataloader())).tolist()
    code, out, err = boltlab("predict", f"run={run}")
    assert code == 0, err
    rows = list(csv.reader(io.StringIO(out)))[1:]
    assert [int(row[0]) for row in rows] == list(range(len(expected)))
    given = [[float(value) for value in row[1:]] for row in rows]
    assert given == [value if isinstance(value, list) else [float(value)] for value in expected]


def test_predict_names_the_columns_of_a_dict(boltlab, inside, trained):
    run = trained("labels")
    batches = with_lightning(run, "labels", "predict", dataloaders=_test_loader("labels", run))
    assert boltlab("predict", f"run={run}", "output=p.json")[0] == 0
    rows = json.loads(Path("p.json").read_text())
    expected = torch.cat([batch["probability"] for batch in batches]).tolist()
    assert [[row[f"probability_{i}"] for i in range(3)] for row in rows] == expected
    assert [row["count"] for row in rows] == torch.cat([batch["count"] for batch in batches]).tolist()
    code, _, err = boltlab("predict", f"run={run}", "top_k=2", "batch_size=4")
    assert code == 2 and "top_k" in err and "data.batch_size" in err


def _test_loader(kind, run):
    data = data_of(kind)
    data.load_state_dict(checkpoint_file.read(run / "checkpoints" / "best.ckpt").get(type(data).__qualname__, {}))
    data.setup("test")
    return data.test_dataloader()


def test_only_classes_and_logits_make_a_confusion_matrix(inside, trained):
    run = trained("lstm")
    model, pairs = package.load(run), []
    for tokens, lengths, labels in _test_loader("lstm", run):
        pairs += zip(labels.tolist(), model(tokens, lengths).argmax(1).tolist(), strict=True)
    with (run / "confusion_matrix.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header[1:] == ["first", "middle", "last"]
    expected = confusion_matrix(*zip(*pairs, strict=True), labels=range(3)).tolist()
    assert [[int(number) for number in row[1:]] for row in rows] == expected
    wrong = json.loads((run / "mistakes.json").read_text())
    assert wrong["mistakes"] == sum(true != predicted for true, predicted in pairs)
    for kind in ("vae", "labels", "forecaster", "lit"):
        assert not (trained(kind) / "confusion_matrix.csv").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bench_measures_the_training_step_or_says_what_it_needs(boltlab, inside, kind):
    code, _, err = boltlab("bench", *overrides(kind), "seconds=0.02", "output=bench.json")
    if kind == "gan":
        assert code == 1 and err.count("\n") == 1 and "GAN optimizes manually" in err
        return
    assert code == 0, err
    found = json.loads(Path("bench.json").read_text())
    assert found["batch_size"] == 16 and min(found[part] for part in ("loader", "step", "loop", "whole")) > 0


def test_a_measured_step_is_the_training_step_and_its_flops_those_of_torch(inside):
    from torch.utils.flop_counter import FlopCounterMode

    from boltlab.config.compose import compose
    from boltlab.training import probe

    config = compose("train", overrides("forecaster")).config
    found = {}

    def parts(trainer, model, loader):
        batch = probe.to_device(trainer, next(probe.endless(loader)))
        step = probe.Step(trainer, model)
        before = [p.detach().clone() for p in model.parameters()]
        found["loss"] = (float(step(batch)), float(model._loss(batch).detach()))
        found["moved"] = any(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
        with FlopCounterMode(display=False) as counter:
            model._loss(batch).backward()
        found["flops"] = (step.flops(batch), counter.get_total_flops())
        yield from ()

    probe.fit(config, parts)
    assert found["loss"][0] == found["loss"][1] and not found["moved"]  # the learning rate is 0
    assert found["flops"][0] == found["flops"][1] > 0


def test_a_measured_fit_leaves_the_weights_of_a_module_with_a_schedule(inside):
    from boltlab.config.compose import compose
    from boltlab.training import probe

    moved = []

    def parts(trainer, model, loader):
        before = [p.detach().clone() for p in model.parameters()]
        yield from itertools.islice(probe.endless(loader), 4)
        moved.extend(not torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))

    probe.fit(compose("train", overrides("labels")).config, parts)
    assert moved and not any(moved)


def test_a_batch_size_is_found_for_batches_of_any_kind(boltlab, inside, monkeypatch):
    monkeypatch.setattr("boltlab.training.search.SECONDS_PER_SIZE", 0.01)
    for kind in ("forecaster", "lstm"):
        code, out, err = boltlab(
            "train", *overrides(kind), "data.batch_size=auto", "trainer.max_epochs=1", "test=false"
        )
        assert code == 0, err
        size = int(out.partition("data.batch_size=")[2].split()[0])
        assert size in (16, 32, 64) and runs.load_config(next(runs.folders("logs"))).data.batch_size == size


def test_show_draws_images_and_says_what_a_batch_is(boltlab, inside):
    code, out, err = boltlab("show", "data=cells_digits", "count=8", "split=val", "output=val.png")
    assert code == 0 and "val split: 33 samples" in out, err
    with Image.open("val.png") as picture:
        assert min(picture.size) > 100 and len(set(picture.convert("L").tobytes())) > 20
    code, _, err = boltlab("show", "data=cells_sequences")
    assert code == 1 and err.count("\n") == 1 and "Sequences gives int64 [16, " in err


def test_doctor_and_checkpoint_serve_plain_modules(boltlab, inside, trained):
    code, out, _ = boltlab("doctor", "data=cells_series")
    assert "cells.data.Series" in out and "Traceback" not in out and code in (0, 1)
    path = trained("vae") / "checkpoints" / "best.ckpt"
    assert boltlab("checkpoint", "verify", str(path))[0] == 0
    code, out, _ = boltlab("checkpoint", "show", str(path))
    assert code == 0 and "cells.models.VAE" in out
    assert boltlab("checkpoint", "export", str(path), "output=vae.safetensors")[0] == 0
    exported, state = load_file("vae.safetensors"), checkpoint_file.read(path)["state_dict"]
    assert exported.keys() == state.keys() and all(torch.equal(exported[key], state[key]) for key in state)
    Path("vae.safetensors").unlink()


@pytest.mark.parametrize("form", ["run", "checkpoint", "state dict", "safetensors"])
@pytest.mark.parametrize("kind", ["vae", "gan", "lit"])
def test_init_from_takes_every_tensor_of_any_module(boltlab, inside, trained, kind, form, tmp_path):
    run = trained(kind)
    state = checkpoint_file.read(checkpoints.find(run))["state_dict"]
    source = {"run": run, "checkpoint": checkpoints.find(run)}.get(form, tmp_path / "weights.pt")
    if form == "state dict":
        torch.save(state, source)
    elif form == "safetensors":
        source = tmp_path / "weights.safetensors"
        save_file({key: value.contiguous() for key, value in state.items()}, source)
    still = ("model.optimizer.lr=0.0",) if kind == "lit" else ("model.lr=0.0",)
    none = ("callbacks=[last]", "test=false", "trainer.max_epochs=1", "trainer.limit_train_batches=1")
    code, out, err = boltlab("train", *overrides(kind), *still, *none, f"init_from={source}")
    assert code == 0, err
    found = checkpoint_file.read(next(runs.folders("logs")) / "checkpoints" / "last.ckpt")["state_dict"]
    moving = {key for key in state if "running_" in key or "num_batches" in key}  # a norm's statistics follow the data
    assert all(torch.equal(found[key], state[key]) for key in state.keys() - moving)
    assert f"{len(state)} of {len(state)} tensors" in out


def test_init_from_reports_what_is_reshaped_missing_and_unexpected(boltlab, inside, trained, tmp_path):
    state = checkpoint_file.read(checkpoints.find(trained("lstm")))["state_dict"]
    state["extra.weight"] = torch.zeros(2)
    del state["embedding.weight"]
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    rest = ("callbacks=none", "test=false", "trainer.max_epochs=1", f"init_from={tmp_path / 'w.pt'}")
    code, _, err = boltlab("train", *overrides("lstm"), *rest, "+model.hidden=5")
    assert code == 1 and "lstm.weight_ih_l0 [32, 6] -> [20, 6]" in err and "init_strict=false" in err, err
    code, out, err = boltlab("train", *overrides("lstm"), *rest, "+model.hidden=5", "init_strict=false")
    assert code == 0, err
    text = " ".join(out.split())
    kept = runs.read_summary(next(runs.folders("logs")))["init_from"]["not_taken"]
    for line in (
        "lstm.weight_ih_l0 [32, 6] -> [20, 6]",
        "embedding.weight is only in the model",
        "extra.weight is only",
    ):
        assert line in text and any(line in entry for entry in kept)
    assert "1 of 7 tensors" in text  # the bias of the head


def test_ema_guard_and_throughput_serve_manual_optimization(boltlab, inside):
    more = ("callbacks=[default,ema,lr_monitor]", "trainer.max_epochs=1", "trainer.log_every_n_steps=1")
    code, _, err = boltlab("train", *overrides("gan"), *more)
    assert code == 0, err
    run = next(runs.folders("logs"))
    content = checkpoint_file.read(run / "checkpoints" / "last.ckpt")
    weight = "generator.0.weight"
    assert not torch.equal(content["state_dict"][weight], content["current_model_state"][weight])
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"lr", "optimizer1_lr", "g_loss", "d_loss"} <= rows[0].keys()
    (rate,) = [float(row["samples_per_second"]) for row in rows if row["samples_per_second"]]
    assert runs.read_summary(run)["samples_per_second"] == pytest.approx(rate, rel=0.01)


UNUSED = {"optimizer=sgd": "optimizer", "optimizer.lr=0.1": "optimizer", "scheduler=constant": "scheduler"}
UNUSED |= {"loss=huber": "loss", "metrics=kappa": "metrics"}


@pytest.fixture
def grouped(inside, tmp_path, monkeypatch):
    """The project with groups of optimizers and schedules, and a choice of each by default."""
    folder, shipped = tmp_path / "groups", Path(__file__).parents[2] / "configs"
    for group in ("optimizer", "scheduler"):
        shutil.copytree(shipped / group, folder / group)
    text = (CONFIG_DIR / "train.yaml").read_text()
    text = text.replace("optimizer: null", "optimizer: adamw").replace("scheduler: null", "scheduler: one_cycle")
    (folder / "train.yaml").write_text(text)
    monkeypatch.setattr(project, "config_dirs", lambda: [folder, inside / "configs"])


@pytest.mark.parametrize("given", UNUSED)
@pytest.mark.parametrize("kind", ["vae", "lit"])
def test_a_group_that_the_model_does_not_use_is_refused_where_it_is_given(boltlab, grouped, kind, given):
    code, out, err = boltlab("train", *overrides(kind), given)
    assert code == 2 and not out and f"  {given}\n" in err and f"makes its own {UNUSED[given]}" in err


# What a file of a group says: the group that it sets, without effect where the model has none.
FILES = {
    ("experiment", "optimizer: {lr: 100}"): "optimizer",
    ("local", "scheduler: {warmup_steps: 3}"): "scheduler",
    ("debug", "defaults: [{override /optimizer: sgd}]"): "optimizer",
    ("experiment", "defaults: [more, _self_]"): "optimizer",
    ("experiment", "defaults: [{override /model: cells_lit}]\noptimizer: {lr: 100}"): "optimizer",
}


@pytest.mark.parametrize(("group", "text"), FILES)
def test_a_group_that_the_model_does_not_use_is_refused_where_a_file_sets_it(grouped, tmp_path, group, text):
    folder, unused = tmp_path / "groups" / group, FILES[group, text]
    folder.mkdir()
    (folder / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    (folder / "more.yaml").write_text("# @package _global_\noptimizer: {lr: 100}\n")
    model = [] if "cells_lit" in text else ["model=cells_vae"]
    given = ["data=cells_digits", "monitor=val_loss", *QUICK, *model, f"{group}=mine"]
    with pytest.raises(ConfigError) as caught:
        compose("train", given)
    (mistake,) = caught.value.mistakes
    assert mistake.where == f"{group}=mine" and f"sets {unused}, which has no effect: cells.models" in mistake.message
    assert compose("train", [*given, f"~{unused}"]).config.get(unused) is None
    if text == next(iter(FILES))[1]:  # a file that sets something else
        (folder / "mine.yaml").write_text("# @package _global_\nseed: 7\n")
        assert compose("train", given).config.seed == 7


def test_a_group_that_the_model_does_not_use_is_not_recorded(boltlab, grouped):
    short = ("test=false", "callbacks=none", "trainer.max_epochs=1")
    code, out, _ = boltlab("train", *overrides("vae"), *short)
    assert code == 0 and "not used" not in out
    config = runs.load_config(next(runs.folders("logs")))
    assert config.optimizer is None and config.scheduler is None


def test_nets_and_partials_of_a_module_stay_out_of_its_checkpoints(inside, trained):
    content = torch.load(trained("lit") / "checkpoints" / "last.ckpt", weights_only=True)
    assert content["hyper_parameters"] == {"compile": False}
    assert content["config"]["model"]["net"]["hidden"] == 16


def test_a_module_that_compiles_its_net_loads_under_the_names_of_the_net(inside, trained, tmp_path):
    run = trained("lit")
    content = checkpoint_file.read(run / "checkpoints" / "best.ckpt")
    state = content["state_dict"]
    content["state_dict"] = {key.replace("net.", "net._orig_mod.", 1): value for key, value in state.items()}
    checkpoint_file.write(content, tmp_path / "compiled.ckpt")
    loaded = package.load(tmp_path / "compiled.ckpt").state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)


def test_a_metric_that_nothing_logs_is_one_line(boltlab, inside):
    rest = ("monitor=val_accuracy", "trainer.max_epochs=1")
    code, _, err = boltlab("train", *[o for o in overrides("vae") if "monitor" not in o], *rest)
    assert code == 1 and err.count("\n") == 1 and "val_accuracy" in err and "val_interval_kl" in err
