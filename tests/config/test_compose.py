import json
import math
import os
import shutil
import subprocess
import sys
import typing
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch
import yaml
from annotated_types import Ge, Gt, Lt, MultipleOf
from omegaconf import OmegaConf
from pydantic import ConfigDict, TypeAdapter

from boltlab.config import overrides as command_line
from boltlab.config import roots, sources, words
from boltlab.config.compose import _hydra_compose, compose
from boltlab.config.edit import edit
from boltlab.config.locate import locate
from boltlab.config.types import _fits, type_problem
from boltlab.ground import credentials
from boltlab.ground.errors import ConfigError

ROOT_KEYS = (
    "seed, monitor, mode, test, precision, channels_last, float32_matmul_precision, compile, "
    "timeout_seconds, max_restarts, init_from, init_strict, name, tags, project, log_dir, data_dir, run_dir, resume, "
    "resume_changed, data_fingerprint, augment, data, optimizer, scheduler, loss, metrics, model, "
    "trainer, callbacks, logger, launcher"
)
ADAMW = "params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused"
SCHEDULES = "constant, cosine, exponential, multistep, one_cycle, plateau, step"
LENET = "_target_, input_shape, num_outputs, channels, hidden_sizes, activation, dropout, batch_norm"
QUOTE = "quote it for the shell and for Hydra:"

# What is typed → the key path and the message. Every one ends with exit code 2 before anything is built.
MISTAKES = {
    # unknown root keys, groups and choices
    "sed=3": ("sed=3", f"there is no key 'sed': did you mean 'seed'? keys: {ROOT_KEYS}"),
    "hydra=1": ("hydra=1", f"there is no key 'hydra'; keys: {ROOT_KEYS}"),
    "modle=cnn": ("modle=cnn", f"there is no key 'modle': did you mean 'model'? keys: {ROOT_KEYS}"),
    "optimizer=sdg": (
        "optimizer=sdg",
        "optimizer has no 'sdg': did you mean 'sgd'? choices: adam, adamw, muon, rmsprop, sgd",
    ),
    "scheduler=null": ("scheduler=null", f"is no choice; choices: {SCHEDULES}"),
    # unknown arguments: in the YAML's keys, and behind a plus
    "optimizer.lrr=0.1": (
        "optimizer.lrr=0.1",
        "optimizer has no 'lrr': did you mean 'lr'? keys: _target_, _partial_, lr, betas, weight_decay, "
        "fused; another argument of torch.optim.AdamW: +optimizer.lrr=…",
    ),
    "+optimizer.esp=0.1": (
        "optimizer.esp=0.1",
        f"AdamW takes no argument 'esp': did you mean 'eps'? it takes: {ADAMW}",
    ),
    "model.net.hiden_sizes=[3]": (
        "model.net.hiden_sizes=[3]",
        f"model.net has no 'hiden_sizes': did you mean 'hidden_sizes'? keys: {LENET}; "
        "another argument of project.models.lenet.LeNet: +model.net.hiden_sizes=…",
    ),
    "+callbacks.best.save_topk=1": (
        "callbacks.best.save_topk=1",
        "ModelCheckpoint takes no argument 'save_topk': did you mean 'save_top_k'? it takes: dirpath, filename, "
        "monitor, verbose, save_last, save_top_k, save_on_exception, save_weights_only, mode, auto_insert_metric_name, "
        "every_n_train_steps, train_time_interval, every_n_epochs, save_on_train_epoch_end, enable_version_counter",
    ),
    # wrong types and values
    "trainer.max_epochs=ten": ("trainer.max_epochs=ten", "Trainer takes int, null"),
    "optimizer.lr=fast": ("optimizer.lr=fast", "AdamW takes float"),
    "optimizer.lr='0.1'": ("optimizer.lr=0.1", "AdamW takes float; a number in quotes is text: drop the quotes"),
    "optimizer.lr=-1": ("optimizer.lr=-1", "AdamW: Invalid learning rate: -1"),
    "optimizer.lr=": ("optimizer.lr=", "is empty: give a value, or optimizer.lr=null for none"),
    "data.batch_size=32.5": ("data.batch_size=32.5", "Digits takes int"),
    "seed=abc": ("seed=abc", "takes int from 0 below 4294967296"),
    "precision=bf15-mixed": (
        "precision=bf15-mixed",
        "takes one of auto, 32, bf16-mixed, 16-mixed, bf16-true, 16-true, 64, 16: did you mean 'bf16-mixed'?",
    ),
    "data.sampler=balance": ("data.sampler=balance", "Digits takes one of shuffle, balanced: did you mean 'balanced'?"),
    # _target_ and missing arguments
    "optimizer._target_=torch.optim.SDG": (
        "optimizer._target_=torch.optim.SDG",
        "torch.optim has no 'SDG': did you mean 'SGD'? check the spelling",
    ),
    "model.net._target_=nopackage.Net": (
        "model.net._target_=nopackage.Net",
        "there is no package 'nopackage'; is it installed?",
    ),
    "~trainer._target_": ("trainer", "names no class: its `_target_` is missing"),
    "~model.net.num_outputs": ("model.net.num_outputs", "LeNet needs it: give +model.net.num_outputs=…"),
    "seed=-1": ("seed=-1", "takes int from 0 below 4294967296"),
    "optimizer.lr=interval(0,1)": (
        "optimizer.lr=interval(0,1)",
        "names no list of values: write a,b,c or range(start,stop,step)",
    ),
    # what would have no effect
    "model.optimizer.lr=0.5": ("model.optimizer.lr=0.5", "model.optimizer is taken from optimizer: set optimizer.lr=…"),
    "+trainer.logger=false": ("trainer.logger", "logger are chosen by the group of that name"),
    "run_dir=here": ("run_dir=here", "is filled in by the run; log_dir=… and name=… choose where it goes"),
    "hydra/launcher=joblib": (
        "hydra/launcher=joblib",
        "is a group here: launcher=joblib, ray or slurm, with its keys, launcher.…=…",
    ),
    "hydra.launcher.n_jobs=2": ("hydra.launcher.n_jobs=2", words.HYDRA["launcher"]),
    "hydra/sweeper=optuna": ("hydra/sweeper=optuna", words.HYDRA["sweeper"]),
    "+experiment=mnist_mlp": (
        "+experiment=mnist_mlp",
        "is a group, whose choice is given without a +: experiment=mnist_mlp",
    ),
    "++optimizer=sgd": ("++optimizer=sgd", "is a group, whose choice is given without a +: optimizer=sgd"),
    "+optimizer@foo=sgd": ('foo="…"', f"there is no key 'foo'; keys: {ROOT_KEYS}"),
    "trainer.max_epochs=1.0": ("trainer.max_epochs=1.0", "Trainer takes int, null: write 1"),
    "data.batch_size=64.": ("data.batch_size=64.0", "Digits takes int: write 64"),
    r"name='a\${seed}b'": ("name=a${seed}b", "holds ${, which a saved config may not: the run could not be read"),
    r"tags=['\${x}']": ("tags.0=${x}", "holds ${, which a saved config may not: the run could not be read"),
    # values that do not go together
    "callbacks=none": ("test=true", "tests a checkpoint, and no callback saves one: callbacks=[best], or test=false"),
    "trainer.max_epochs=0": ("trainer.max_epochs=0", "leaves no checkpoint to test: test=false"),
    "trainer.enable_checkpointing=false": (
        "trainer.enable_checkpointing=false",
        "contradicts callbacks best, last: leave them out",
    ),
    "monitor=val_accuracy": (
        "monitor=val_accuracy",
        "nothing logs this metric: did you mean 'val_acc'? logged: test_acc, test_f1, test_loss, test_precision, "
        "test_recall, test_top5, train_acc, train_loss, train_loss_step, val_acc, val_f1, val_loss, val_precision, "
        "val_recall, val_top5",
    ),
    "trainer.devices=3": (
        "data.batch_size=64",
        "is the global batch, divided over 3 processes: take a multiple, for example 66",
    ),
    "data.fold=0": ("data.fold=0", "is a part of how many? give data.folds=… as well"),
    "data.folds=5": ("data.folds=5", "needs the part that validates: data.fold=0 to data.fold=4"),
    "data.folds=1": ("data.folds=1", "is less than 2 parts"),
    "data.folds=five": ("data.folds=five", "Digits takes int, null"),
    "data.max_samples=0": ("data.max_samples=0", "0 is less than 1"),
    # paths
    "data_dir=/a=b": ("data_dir=/a=b", f"""cannot be read; {QUOTE} 'data_dir="/a=b"'"""),
    "data_dir=/数据": ("data_dir=/数据", f"""cannot be read; {QUOTE} 'data_dir="/数据"'"""),
    "tags=[good,très bon]": ("tags=[good,très bon]", f"""cannot be read; {QUOTE} 'tags=["good","très bon"]'"""),
    "data_dir=/a,b": (
        "data_dir=/a,b",
        f"""names several values: add -m to run them all; if it is one text, {QUOTE} 'data_dir="/a,b"'""",
    ),
    "verbose": ("verbose", "is no key=value pair; boltlab <verb> --help shows the keys"),
}


@pytest.mark.slow
@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_ends_with_its_message_and_exit_code_2(override, boltlab):
    where, message = MISTAKES[override]
    code, out, err = boltlab("train", override)
    assert (code, out) == (2, "")
    assert err == f"boltlab train: 1 mistake in the config, nothing was started\n\n  {where}\n      {message}\n"
    assert not Path("logs").exists()


def test_the_nearest_choice_among_many_is_named(boltlab):
    code, _, err = boltlab("train", "model=restnet18")
    assert code == 2 and "model has no 'restnet18': did you mean 'resnet18'? choices: cnn, lenet, " in err


def test_two_lengths_that_exclude_each_other(boltlab):
    code, _, err = boltlab("train", "scheduler.warmup_steps=3", "scheduler.warmup_epochs=1")
    assert code == 2 and "scheduler.warmup_epochs=1" in err and "warmup_steps" in err


def test_all_mistakes_are_listed_at_once_and_fit_a_screen(boltlab):
    given = ("model=restnet18", "optimizer=sdg", "sed=3", "trainer.max_epochs=ten", "data.batch_size=a", "data_dir=")
    code, _, err = boltlab("train", *given)
    assert code == 2 and err.startswith("boltlab train: 6 mistakes in the config")
    for where in given:
        assert f"\n  {where}\n" in err
    assert len(err.splitlines()) < 24 and "Traceback" not in err


OUT_OF_RANGE = {
    "trainer.accumulate_grad_batches=0": "Trainer takes int from 1",
    "trainer.check_val_every_n_epoch=0": "Trainer takes int from 1, null",
    "trainer.gradient_clip_val=-1": "Trainer takes float from 0, null",
    "trainer.val_check_interval=1.5": "Trainer takes int from 1, float above 0 up to 1, ",
    "scheduler.warmup_steps=-1": "OneCycle takes int from 0, null",
    "scheduler.div_factor=0": "OneCycle takes float above 0",
    "model.label_smoothing=2": "Classifier takes float from 0 up to 1",
    "model.num_classes=0": "Classifier takes int from 1",
    "model.l1=NaN": "Classifier takes float from 0",
    "data.val_fraction=-0.5": "",
    "data.num_workers=-1": "",
    "timeout_seconds=NaN": "takes float above 0",
}
OF_OPTIMIZERS = {
    "adamw": {"lr": -1.0, "betas": [2, 0.9], "weight_decay": -0.1},
    "sgd": {"momentum": -0.5, "lr": -0.1},
    "rmsprop": {"alpha": -1.0},
}


def test_a_number_out_of_range_is_named_before_anything_is_made(boltlab):
    numbers = [given for given in OUT_OF_RANGE if not given.startswith("data")]
    code, out, err = boltlab("train", *numbers)
    assert (code, out) == (2, "") and err.startswith(f"boltlab train: {len(numbers)} mistakes"), err
    for given in numbers:
        assert f"\n  {given}\n      {OUT_OF_RANGE[given]}" in err
    code, _, err = boltlab("train", *(given for given in OUT_OF_RANGE if given not in numbers))
    assert code == 2 and all(f"  {given}\n" in err for given in OUT_OF_RANGE if given not in numbers)
    assert not Path("logs").exists()


@pytest.mark.parametrize("choice", OF_OPTIMIZERS)
def test_a_number_that_an_optimizer_refuses_is_refused_as_torch_does(choice):
    kind = locate(compose("train", [f"optimizer={choice}"], check=False).config.optimizer._target_)
    for key, value in OF_OPTIMIZERS[choice].items():
        with pytest.raises(ValueError, match="Invalid") as of_torch:
            kind([torch.nn.Parameter(torch.zeros(1))], **{key: value})
        with pytest.raises(ConfigError) as caught:
            compose("train", [f"optimizer={choice}", f"optimizer.{key}={value}".replace(" ", "")])
        (mistake,) = caught.value.mistakes
        assert mistake.where.startswith(f"optimizer.{key}=") and mistake.message == f"{kind.__name__}: {of_torch.value}"


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_an_optimizer_takes_finite_numbers(value):
    with pytest.raises(ConfigError, match="SGD takes a finite number"):
        compose("train", ["optimizer=sgd", f"optimizer.lr={value}"])


def test_a_range_without_a_step_is_refused(boltlab):
    code, _, err = boltlab("train", "-m", "seed=range(0,10,0)", "optimizer.lr=range(0.1,1,0.0)")
    assert code == 2 and err.count("never ends: the step of range(start,stop,step) is 0") == 2
    with pytest.raises(ValueError, match="never ends"):
        command_line.sweep_values("seed", "range(0,10,0)")


def test_folds_that_cannot_be(boltlab, small_data):
    code, _, err = boltlab("train", "data.folds=5", "data.fold=5")
    assert code == 2 and "\n  data.fold=5\n      is none of the parts of data.folds=5, which are 0 to 4\n" in err
    code, _, err = boltlab("train", "-m", "data.folds=3", "data.fold=0,1,3")
    assert code == 2 and "1 mistake " in err and "\n  data.fold=3\n" in err
    Path("images/train").rename("images/valid")
    shutil.copytree("images/valid", "images/train")
    code, _, err = boltlab("train", "data=image_folder", "data.root=images", "data.folds=2", "data.fold=0")
    assert code == 2 and "\n  data.folds=2\n      images/valid is a validation set of its own, and folds" in err


def test_cfg_names_a_mistake_too(boltlab):
    code, out, err = boltlab("train", "--cfg", "job", "modle=x")
    assert (code, out) == (2, "") and "did you mean 'model'" in err


def test_mistakes_of_a_grid_are_found_before_its_first_job(boltlab):
    code, _, err = boltlab(
        "train", "-m", "optimizer.lr=0.1,fast", "model=lenet,lennet,mlp", "seed=1,x", "data=glob(mn*)"
    )
    assert code == 2 and "4 mistakes" in err and "is a pattern: name the choices, a,b,c" in err
    assert "optimizer.lr=fast" in err and "model=lennet" in err and "seed=x" in err
    assert not Path("logs").exists()


def test_a_mistake_of_one_combination_alone_starts_nothing(boltlab):
    grid = ("data.batch_size=256,255", "trainer.devices=1,2", "trainer.accelerator=cpu")
    code, _, err = boltlab("train", "-m", *grid)
    assert code == 2 and "1 mistake " in err and "data.batch_size=255" in err
    assert not Path("logs").exists()


def test_the_jobs_of_a_grid_are_the_combinations_in_order():
    assert command_line.grid(["a=1,2", "+b=x", "c='p,q',r", "d=[1,2]"]) == [
        [f"a={a}", "+b=x", f"c={c}", "d=[1,2]"] for a in (1, 2) for c in ("'p,q'", "r")
    ]
    assert command_line.grid(["a=range(0,3)", "b=choice(x,y)"])[:3] == [["a=0", "b=x"], ["a=0", "b=y"], ["a=1", "b=x"]]
    assert command_line.grid(["a=1"]) == [["a=1"]]
    with pytest.raises(ConfigError, match="names no value"):
        command_line.grid(["a=range(0,0)"])


def test_a_mistyped_key_in_an_experiment_file(configs):
    (configs / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nsed: 3\noptimizer:\n  lrr: 1\ntrainer:\n  max_epochs: ten\n"
    )
    (configs / "experiment" / "other.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /model: restnet18\n"
    )
    with pytest.raises(ConfigError) as caught:
        compose("train", ["experiment=mine"])
    listed = {m.where: m.message for m in caught.value.mistakes}
    assert listed["sed=3"].startswith("there is no key 'sed': did you mean 'seed'?")
    assert listed["optimizer.lrr=1"].startswith("AdamW takes no argument 'lrr': did you mean 'lr'?")
    assert listed["trainer.max_epochs=ten"] == "Trainer takes int, null"
    with pytest.raises(ConfigError, match="restnet18"):
        compose("train", ["experiment=other"])


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/a=b", "/a,b", "/a b", "/数据/图", "/it's", "C:/x"])
def test_a_quoted_path_arrives_as_it_is(path):
    assert compose("train", [f'data_dir="{path}"']).config.data_dir == path


HOME_PATHS = {
    "data_dir=~/a": "data_dir",
    'data_dir="~/a"': "data_dir",
    "data_dir='~/a'": "data_dir",
    "+data.root=~/a": "data.root",
    "tags=[x,~/a]": "tags.1",
}


@pytest.mark.parametrize("given", HOME_PATHS)
def test_a_path_that_begins_with_a_tilde_is_in_the_home_folder(boltlab, monkeypatch, tmp_path, given):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    code, out, _ = boltlab("train", "--cfg", "job", given)
    assert code == 0 and OmegaConf.select(OmegaConf.create(out), HOME_PATHS[given]) == str(tmp_path / "home" / "a")


def test_a_path_of_a_file_that_begins_with_a_tilde_is_in_the_home_folder(configs, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (configs / "local" / "default.yaml").write_text("# @package _global_\nlog_dir: ~/logs/${name}\nname: a~/b\n")
    config = compose("train", ["tags=['~x','a~/b']"], check=False).config
    assert (config.log_dir, config.name, list(config.tags)) == ("/home/me/logs/a~/b", "a~/b", ["~x", "a~/b"])


def test_a_plus_adds_an_argument_that_the_yaml_does_not_show():
    composed = compose("train", ["+optimizer.eps=1e-6", "+optimizer.lr=0.5"])
    assert composed.config.optimizer.eps == 1e-6 and composed.config.optimizer.lr == 0.5


def test_local_defaults_are_read_and_the_command_line_wins(configs):
    (configs / "local" / "default.yaml").write_text("# @package _global_\ndata_dir: /mnt/data\nseed: 7\n")
    composed = compose("train", ["seed=8"])
    assert composed.config.data_dir == "/mnt/data" and composed.config.seed == 8


def every_choice():
    for group, choices in sources.groups().items():
        for choice in choices:
            yield group, choice


# What a choice needs to be complete.
NEEDS = {
    ("data", "csv"): ["data.path=t.csv", "data.target=y", "data.task=classification", "model=mlp"],
    ("data", "image_folder"): ["data.root=images"],
    ("data", "imagenet"): ["data.root=images"],
    ("data", "small_folder"): ["data.root=images"],
    ("data", "diabetes"): ["model=mlp_regressor"],
    ("data", "houses"): ["model=linear_regressor"],
    ("data", "synthetic"): ["model=mlp"],
    ("model", "linear_regressor"): ["data=diabetes"],
    ("model", "mlp_regressor"): ["data=diabetes"],
    ("experiment", "image_folder_cnn"): ["data.root=images"],
}


@pytest.fixture
def small_data(tmp_path):
    from PIL import Image

    for name in ("cat", "dog"):
        (tmp_path / "images" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / "train" / name / "0.png")
    (tmp_path / "t.csv").write_text("a,y\n1,x\n2,z\n3,x\n")
    (tmp_path / "examples").symlink_to(Path(__file__).parents[2] / "examples")


@pytest.mark.slow
@pytest.mark.parametrize(("group", "choice"), list(every_choice()))
def test_every_shipped_choice_passes_the_check(group, choice, small_data):
    if choice in ("mlflow", "deepspeed"):
        pytest.importorskip(choice, reason=f"the extra {choice} is not installed")
    needs = ["test=false"] if group == "callbacks" else NEEDS.get((group, choice), [])
    if group in ("sweep", "sampler", "pruner"):
        OmegaConf.to_container(compose("sweep", [f"{group}={choice}"]).config, resolve=True)
        return
    config = compose("train", [f"{group}={choice}", *needs]).config
    assert "auto" not in (config.data.get("num_classes"), config.precision)
    OmegaConf.to_container(config, resolve=True)


def test_every_yaml_file_is_found_by_the_test_above():
    seen = {f"{group}/{choice}.yaml" for group, choice in every_choice()} | {f"{verb}.yaml" for verb in roots.ROOTS}
    files = {p.relative_to(top).as_posix() for top in sources.config_dirs() for p in top.rglob("*.yaml")}
    assert {f for f in files if not Path(f).name.startswith("_") and f != "local/default.yaml"} <= seen


def test_what_stands_at_auto_is_counted(small_data):
    data = compose("train", ["data=image_folder", "data.root=images"]).config.data
    assert data.num_classes == 2 and list(data.class_names) == ["cat", "dog"]


def test_a_missing_folder_is_a_mistake_of_the_config(boltlab):
    code, _, err = boltlab("train", "data=image_folder", "data.root=nowhere")
    assert code == 2 and "data.root=nowhere does not exist" in err


def test_a_missing_value_names_its_key(boltlab):
    code, _, err = boltlab("train", "data=csv", "model=mlp")
    assert code == 2
    for key in ("path", "target", "task"):
        assert f"\n  data.{key}\n      is missing: give data.{key}=…" in err


def test_edit_swaps_groups_and_values_and_refuses_mistakes():
    trained = compose("train", ["data.batch_size=16", "seed=5"]).config
    assert edit(trained, ["data.batch_size=8"]).data.batch_size == 8
    assert trained.data.batch_size == 16
    swapped = edit(trained, ["data=fashion_mnist", "data.batch_size=4"])
    assert swapped.data.name == "FashionMNIST" and swapped.data.batch_size == 4 and swapped.data.seed == 5
    assert swapped.model == trained.model
    with pytest.raises(ConfigError, match="did you mean 'batch_size'"):
        edit(trained, ["data.bach_size=8"])
    with pytest.raises(ConfigError, match="Digits takes int"):
        edit(trained, ["data.batch_size=x"])


@pytest.mark.parametrize(
    ("value", "annotation", "fits"),
    [
        (1, float, True),
        (1.0, int, False),
        ("1", float, False),
        (True, int, False),
        (None, float, False),
        (None, float | None, True),
        ([1, 2], tuple[int, int], True),
        ([1, 2, 3], tuple[int, int], False),
        ("x", Path, True),
        ("x", str | Path, True),
        (float("inf"), float, True),
        ({"a": 1}, dict[str, int], True),
        ([1], typing.List, True),  # noqa: UP006
        ([1], typing.Dict, False),  # noqa: UP006
    ],
)
def test_values_fit_annotations_as_in_yaml(value, annotation, fits):
    assert (type_problem(value, annotation) is None) == fits


LIGHT = """
import sys
from boltlab.__main__ import main
try:
    code = main(sys.argv[1:])
except SystemExit as e:
    code = e.code
heavy = [m for m in ("torch", "lightning", "torchvision", "torchmetrics", "wandb", "sklearn") if m in sys.modules]
assert not heavy, heavy
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["train", "--help"], 0),
        (["train", "--cfg", "job"], 0),
        (["train", "modle=cnn"], 2),
        (["train", "optimizer.lrr=1"], 2),
        (["train", "model=restnet18", "data=mnist"], 2),
        (["trian"], 2),
        (["runs"], 0),
    ],
)
def test_light_paths_import_nothing_heavy(arguments, code, tmp_path):
    done = subprocess.run([sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr


def test_completion_offers_verbs_groups_and_choices(tmp_path):
    def complete(line):
        environment = {**os.environ, "COMP_LINE": line, "COMP_POINT": str(len(line))}
        command = [sys.executable, "-m", "boltlab", "-sc", "query=bash"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    assert complete("boltlab tr") == ["train"]
    assert {"train", "eval", "predict"} <= set(complete("boltlab "))
    assert "model=" in complete("boltlab train mod")
    assert {"model=resnet18", "model=resnet34"} <= set(complete("boltlab train model=resn"))
    assert complete("boltlab train optimizer.l") == ["optimizer.lr="]


# ---------------------------------------------------------------- short ways, which must lead to the same place


PLAIN = [None, True, 0, 1, 16, -1, 2**40, 1.5, math.nan, math.inf, "", "a", "16", [], [1], [1, 2], [1.5, 2], ["a"]]
PLAIN += [[None], [True], [[1]], {}, {"a": 1}, {"a": "b"}, {"a": None}]
ANNOTATIONS = [bool, int, float, str, Path, list, dict, None, list[int], list[float], list[list[int]], tuple[int, int]]
ANNOTATIONS += [tuple[int, ...], tuple[float, float], tuple[()], dict[str, int], dict[str, Any], int | None, int | bool]
ANNOTATIONS += [str | list[int] | None, Literal["a", 16], Literal[1, "auto"] | None, Sequence[int], Callable, timedelta]
ANNOTATIONS += [Annotated[int, Ge(0), Lt(5)], Annotated[float, Gt(0)], Annotated[int, MultipleOf(2)], complex, tuple]


@pytest.mark.parametrize("annotation", ANNOTATIONS, ids=str)
def test_what_fits_without_pydantic_fits_with_it(annotation):
    adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    for value in PLAIN:
        if _fits(value, annotation):
            adapter.validate_json(json.dumps(value), strict=True)


def test_no_shipped_default_needs_pydantic(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydantic", None)
    for given in ([], ["experiment=mnist_mlp"], ["model=resnet18", "data=cifar10", "optimizer=sgd"]):
        compose("train", [*given, "trainer.max_epochs=3"])
    with pytest.raises(ImportError):
        compose("train", ["trainer.max_epochs=ten"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=3", "name=a b", "tags=[a,b]"],
        ["model=mlp", "model.net.hidden_sizes=[3,4]"],
        ["+optimizer.eps=1e-7", "++optimizer.eps=1e-8", "++trainer.max_epochs=2"],
        ["~callbacks.summary", "~callbacks.best.mode"],
        ["+optimizer.foo={a: 1, b: [1, 2]}", "experiment=mnist_mlp"],
        ["monitor=${mode}", "trainer.max_epochs=???", "logger.wandb=null"],
        ["seed=1", "seed=2"],
    ],
    ids=" ".join,
)
def test_values_are_set_as_hydra_sets_them(overrides, monkeypatch):
    short = compose("train", overrides, check=False)
    texts = [command_line.first_text(o) for o in command_line.parse(overrides, sweep=False)[0]]
    whole, choices = _hydra_compose("train", texts, [])
    assert OmegaConf.to_container(short.config) == OmegaConf.to_container(whole)
    assert (list(short.config), short.choices) == (list(whole), choices)


def test_what_was_composed_before_is_composed_again_where_a_file_or_a_variable_changed(configs, monkeypatch):
    monkeypatch.setenv("CHOSEN", "sgd")
    train = configs / "train.yaml"
    text = train.read_text().replace("optimizer: adamw", "optimizer: ${oc.env:CHOSEN}")
    train.write_text(text)
    first = compose("train", [], check=False)
    first.config.data.clear()  # it is the caller's own
    second = compose("train", [], check=False)
    assert second.config.data and second.choices["optimizer"] == "sgd"
    monkeypatch.setenv("CHOSEN", "adamw")
    assert compose("train", [], check=False).choices["optimizer"] == "adamw"
    train.write_text(text + "\nadded: 7\n")
    assert compose("train", [], check=False).config.added == 7


@pytest.mark.slow
def test_the_garbage_collector_is_back_after_the_imports():
    code = """
import gc, sys
from boltlab.config.compose import _hydra_compose, compose
compose("train", [])
assert "torch" in sys.modules
print(gc.isenabled(), gc.get_freeze_count() > 100_000)
frozen = gc.get_freeze_count()
kept = [[] for _ in range(1000)]
compose("train", ["seed=1"])
print(gc.get_freeze_count() <= frozen)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["True", "True", "True"], "")


def test_each_value_of_a_grid_is_tried_on_a_config_of_its_own():
    composed = compose("train", ["seed=1,2,3", "~callbacks.summary", "+optimizer.eps=1e-7"], sweep=True)
    assert composed.config.seed == 1 and "summary" not in composed.config.callbacks


def test_a_list_of_defaults_passes_over_what_is_missing_and_nothing_else(configs, capsys):
    for group, text in {
        "optimizer": "defaults: [sgd, gone, /data/digits, 'a@b', '${x}', {model: other}, _self_]",
        "model": "defaults: 3",
        "data": "- a\n- list",
        "local": "a: [broken",
        "scheduler": "",
    }.items():
        (configs / group / "default.yaml").write_text(text)
    sources._stand_in_for_what_is_missing()
    assert capsys.readouterr().err == "optimizer=default names gone, which is not there: skipped\n"


def test_data_that_the_project_ships_are_found_from_any_folder(tmp_path):
    shipped = Path(os.environ["BOLTLAB_PROJECT"]) / "examples" / "houses.csv"
    words = ["data=houses", "model=linear_regressor"]
    assert compose("train", words).config.data.path == str(shipped)
    with pytest.raises(ConfigError, match="does not exist"):  # of a command, a path is relative to where it is given
        compose("train", [*words, "data.path=examples/houses.csv"])
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "houses.csv").write_bytes(shipped.read_bytes())
    for given in ([], ["data.path=examples/houses.csv"]):
        assert compose("train", [*words, *given]).config.data.path == "examples/houses.csv"


@pytest.mark.parametrize("data", [["data=diabetes"], ["data=houses"], ["data=houses", "data.target=rooms"]])
@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_a_classifier_on_data_without_classes_is_refused_once(data, model):
    with pytest.raises(ConfigError) as error:
        compose("train", [*data, f"model={model}"])
    assert [mistake.where for mistake in error.value.mistakes] == ["model"]
    assert "needs classes, and " in str(error.value) and "such as model=mlp_regressor" in str(error.value)


@pytest.mark.parametrize("data", ["digits", "mnist", "synthetic"])
@pytest.mark.parametrize("model", ["linear_regressor", "mlp_regressor"])
def test_a_regressor_on_data_with_classes_is_refused(data, model):
    with pytest.raises(ConfigError, match=r"Regressor predicts a number, and \w+ has 10 classes"):
        compose("train", [f"data={data}", f"model={model}"])


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("seed=${oc.env:GIVEN}", "data.seed", 7),
        ('seed="${oc.decode:${oc.env:GIVEN}}"', "seed", 7),
        ("optimizer.lr=${oc.env:GIVEN}", "optimizer.lr", 1e-3),
        ("test=${oc.env:GIVEN}", "test", False),
        ("data.batch_size=${oc.env:GIVEN}", "data.batch_size", 64),
        ("name=${oc.env:GIVEN}", "name", "007"),
    ],
)
def test_a_variable_holds_what_the_key_takes(monkeypatch, override, key, value):
    texts = {7: "7", 1e-3: "1e-3", False: "false", 64: "64"}
    monkeypatch.setenv("GIVEN", texts.get(value, str(value)))
    config = credentials.plain(compose("train", ["data=digits", "model=linear", override]).config)
    for part in key.split("."):
        config = config[part]
    assert (type(config), config) == (type(value), value)


@pytest.mark.parametrize("given", ["7.5", "", "seven"])
def test_a_variable_that_holds_something_else_is_a_mistake(boltlab, monkeypatch, given):
    monkeypatch.setenv("SEED", given)
    code, _, err = boltlab("train", "seed=${oc.env:SEED}")
    assert code == 2 and "1 mistake " in err and "takes int from 0" in err and "quotes" not in err


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("name=2024_01_15", "name", "2024_01_15"),
        ("name=1e3", "name", "1e3"),
        ("name=true", "name", "true"),
        ("tags=[2024_01,a,-1.50,inf]", "tags", ["2024_01", "a", "-1.50", "inf"]),
        ("data.class_names=[0,1,2_0,3,4,5,6,7,8,9]", "data.class_names", ["0", "1", "2_0", *"3456789"]),
        ("seed=1_0", "seed", 10),
    ],
)
def test_a_key_that_takes_text_gets_what_was_typed(override, key, value):
    composed = compose("train", ["data=digits", "model=linear", override])
    assert OmegaConf.select(composed.config, key) == value
    assert compose("train", composed.overrides).config == composed.config  # as a run has them recorded


def test_each_job_of_a_grid_gets_the_text_that_was_typed():
    whole = compose("train", ["data=digits", "model=linear", "name=2024_01,1_0,x", "seed=1_0,2"], sweep=True)
    names = [job[2:] for job in command_line.grid(whole.overrides)]
    assert names == [[f"name={name}", f"seed={seed}"] for name in ('"2024_01"', '"1_0"', "x") for seed in (10, 2)]


def test_a_run_is_found_by_a_name_of_digits():
    assert compose("eval", ["run=123456"]).config.run == "123456"
    assert compose("eval", ["run=2024_01"]).config.run == "2024_01"


@pytest.mark.parametrize(
    ("values", "count"),
    [
        (["seed=range(0,100000000)"], 10**8),
        (["seed=range(0,100,0.0001)"], 10**6),
        (["seed=1,2,3", "data.batch_size=range(1,50001)"], 150_000),
        (["seed=range(100000000,0,-1)"], 10**8),
    ],
)
def test_a_grid_of_too_many_jobs_is_refused_before_they_are_listed(boltlab, values, count):
    code, _, err = boltlab("train", "-m", *values)
    assert code == 2 and f"makes {count:,} jobs, more than 10,000: fewer values, or max_jobs={count}" in err
    assert not Path("logs").exists()


def test_how_many_jobs_a_grid_may_have_is_a_key(boltlab):
    assert "makes 3 jobs, more than 2" in boltlab("train", "-m", "seed=1,2,3", "max_jobs=2")[2]
    assert "takes int: how many jobs" in boltlab("train", "-m", "seed=1,2,3", "max_jobs=many")[2]
    assert "mistake in" not in boltlab("train", "-m", "seed=1,2,3", "max_jobs=3", "--cfg", "job")[2]
    for values in ("1,2,3", "range(1,10,3)", "range(5,0,-2)", "range(0,1,0.25)", "choice(1,2)", "range(3,1)", "4"):
        override = command_line.read(f"seed={values}")
        listed = list(override.sweep_iterator()) if override.is_sweep_override() else [4]
        assert command_line.job_count([f"seed={values}"]) == len(listed)
    assert command_line.job_count(["seed=range(0,inf)"]) == float("inf")


@pytest.mark.parametrize(
    ("arguments", "said", "values"),
    [
        (("train", "-m", "--cfg", "job", "seed=5,6", "optimizer.lr=0.1,0.2"), "# the first of 4 jobs\n", {"seed": 5}),
        (("train", "seed=5,6", "--cfg=job", "-m"), "# the first of 2 jobs\n", {"seed": 5}),
        (("sweep", "--cfg", "job", "seed=5,6,7"), "# the first of 3 points\n", {"seed": 5, "test": False}),
        (("sweep", "--cfg", "job", "optimizer.lr=interval(0.1,1)"), "# the first of endless points\n", {"seed": 0}),
        (("train", "-c", "job", "seed=5", "--resolve"), "", {"seed": 5}),
    ],
)
def test_cfg_prints_the_first_config_and_how_many_there_are(boltlab, arguments, said, values):
    code, out, err = boltlab(*arguments)
    assert (code, err) == (0, "") and out.startswith(said)
    config = yaml.safe_load(out)
    assert {key: config[key] for key in values} == values
    assert config["data"]["seed"] == (5 if "--resolve" in arguments else "${seed}")


@pytest.mark.parametrize("flags", [("--cfg", "job"), ("--cfg", "all"), ("--info", "defaults"), ("--cfg", "job", "-m")])
@pytest.mark.parametrize("override", ["data=digist", "sed=3"])
def test_hydras_flags_name_mistakes_as_a_training_does(boltlab, override, flags):
    code, out, err = boltlab("train", *flags, override)
    assert (code, out) == (2, "") and err == boltlab("train", override)[2] and "HYDRA_FULL_ERROR" not in err


def test_a_part_of_the_config_is_printed(boltlab):
    code, out, _ = boltlab("train", "seed=3", "--cfg", "job", "-p", "data", "--resolve")
    assert code == 0 and yaml.safe_load(out)["seed"] == 3 and out.startswith("# @package data\n")
    assert "--package dta" in boltlab("train", "--cfg", "job", "-p", "dta")[2]
    assert boltlab("train", "-m", "--info", "plugins")[0] == 2
