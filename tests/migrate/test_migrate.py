"""A project in the layout of lightning-hydra-template, moved by the edits that docs/migrate.md names."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from plain.conftest import install
from training.kills import at
from warm import differences, outcome

from boltlab import runs
from boltlab.config.compose import compose

PAGE = (Path(__file__).parents[2] / "docs" / "migrate.md").read_text()
pytestmark = [
    pytest.mark.filterwarnings("ignore:Attribute 'net' is an instance of `nn.Module`"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "src"]:
        del sys.modules[name]


def move(root):
    """The edits of the page, in its order."""
    for command in blocks("bash"):
        subprocess.run(["bash", "-ec", command], cwd=root, check=True)
    with (root / "pyproject.toml").open("a") as file:
        file.write(blocks("toml")[0])
    for text in blocks("yaml"):
        path = root / re.match(r"# (\S+)\n", text)[1]
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """The root of the project, moved and installed editable."""
    folder = tmp_path_factory.mktemp("moved").resolve()
    root = Path(shutil.copytree(Path(__file__).parent / "project", folder / "spirals"))
    move(root)
    install(root, folder / "site", name="src")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("site.getsitepackages", lambda: [str(folder / "site")])
        patch.syspath_prepend(root)
        forget()
        yield root
    forget()


@pytest.fixture
def inside(moved, boltlab, monkeypatch, tmp_path):
    """Runs a command in the project's folder, with the runs in a folder of this test."""
    monkeypatch.chdir(moved)
    return lambda *arguments: boltlab(*arguments, f"log_dir={tmp_path / 'logs'}")


def only(tmp_path, verb="train"):
    (folder,) = runs.folders(tmp_path / "logs", verb)
    return folder


def test_the_modules_stay_as_they_are(moved):
    source = Path(__file__).parent / "project"
    for path in [*source.glob("src/models/**/*.py"), *source.glob("src/data/**/*.py")]:
        assert (moved / path.relative_to(source)).read_bytes() == path.read_bytes()
    assert "paths." not in "".join(path.read_text() for path in moved.rglob("configs/**/*.yaml"))


@pytest.mark.parametrize("group", ["model", "data", "callbacks", "trainer", "logger", "experiment"])
def test_every_yaml_that_stays_is_a_choice(moved, inside, group):
    for path in sorted((moved / "configs" / group).glob("*.yaml")):
        if path.stem in ("gpu", "mps", "ddp", "ddp_sim", "wandb"):  # need a device, or the network
            continue
        code, _, err = inside("train", "--cfg", "job", f"{group}={path.stem}")
        assert code == 0, err


def test_it_trains_tests_and_evaluates(inside, tmp_path):
    code, _, err = inside("train", "logger=many_loggers")
    assert code == 0, err
    run = only(tmp_path)
    summary = runs.read_summary(run)
    assert summary["exact"] is True and summary["epochs"] == 3 and summary["test"].keys() == {"test/acc", "test/loss"}
    assert (run / "csv" / "version_0" / "metrics.csv").is_file() and (run / "metrics.csv").is_file()
    assert list((run / "tensorboard").rglob("events.*"))
    best = run / summary["best_checkpoint"]
    assert re.fullmatch(r"epoch_00\d\.ckpt", best.name)
    for which in ("run=latest", f"ckpt_path={best}"):
        assert inside("eval", which)[0] == 0
        assert runs.read_summary(next(runs.folders(tmp_path / "logs", "eval")))["test"] == summary["test"]


def test_an_experiment_sets_what_it_set_there(inside, tmp_path):
    code, out, err = inside("train", "experiment=wide", "test=false")
    assert code == 0, err
    config = runs.load_config(only(tmp_path))
    assert (config.seed, config.data.batch_size, config.model.net.width, config.trainer.gradient_clip_val) == (
        *(12345, 8, 32),
        0.5,
    )
    assert out.splitlines()[0] == "not used: logger.wandb and logger.aim; logger=… does not choose it"


def test_a_key_that_the_command_gives_a_logger_which_is_not_chosen_is_a_mistake(inside):
    code, _, err = inside("train", "experiment=wide", "+logger.aim.experiment=mine")
    assert code == 2 and "  logger.aim\n" in err and "names no class" in err


@pytest.mark.parametrize("given", ["trainer=default", "trainer=cpu", "++trainer.precision=${precision}"])
def test_precision_and_folder_reach_a_trainer_whose_yaml_does_not_name_them(inside, tmp_path, given):
    assert inside("train", "precision=64", given, "trainer.max_epochs=1", "test=false")[0] == 0
    run = only(tmp_path)
    trainer = runs.load_config(run).trainer
    assert str(trainer.precision) == "64" and trainer.default_root_dir in ("${run_dir}", str(run))


@pytest.mark.faults
@pytest.mark.parametrize("callbacks", ["default", "[default,last]"])
@pytest.mark.parametrize("place", ["0.2", "1.1", "2.0"])
def test_killed_and_resumed_it_equals_the_run_that_was_not_to_the_bit(moved, warm, tmp_path, callbacks, place):
    site = f"import site; site.getsitepackages = lambda: [{str(moved.parent / 'site')!r}]\n"
    site += f"sys.path.insert(0, {str(moved)!r})\n"
    found = []
    for name in ("whole", "killed"):
        logs = f"log_dir={tmp_path / name}"
        before = site + (at(place) if name == "killed" else "")
        child = warm("train", f"callbacks={callbacks}", logs, folder=moved, before=before).wait()
        assert child.code == (-signal.SIGKILL if name == "killed" else 0), child.stderr
        if name == "killed":
            child = warm("train", "resume=latest", logs, folder=moved, before=site).wait()
            assert child.code == 0, child.stderr
        found.append(next(runs.folders(tmp_path / name)))
    assert differences(*map(outcome, found)) == []
    whole, killed = map(runs.read_summary, found)
    assert killed["exact"] is True and killed["test"] == whole["test"] and killed["best"] == whole["best"]


@pytest.mark.parametrize("limits", [("~trainer.min_epochs",), ("~trainer.max_epochs", "+trainer.max_steps=7")])
def test_a_trainer_whose_yaml_leaves_limits_out_is_made_longer(inside, tmp_path, limits):
    assert inside("train", *limits, "test=false", "callbacks=[default,last]")[0] == 0
    more = "trainer.max_steps=9" if len(limits) > 1 else "trainer.max_epochs=4"
    code, _, err = inside("train", "resume=latest", more)
    assert code == 0, err
    assert runs.read_summary(only(tmp_path))["steps"] == (9 if len(limits) > 1 else 20)


@pytest.mark.slow
def test_a_grid_and_a_sweep_run_with_its_keys(inside, tmp_path):
    code, out, err = inside("train", "-m", "model.net.width=8,16", "trainer.max_epochs=1", "test=false")
    assert code == 0, err
    code, out, err = inside("sweep", "sweep=spirals_optuna", "sweep.trials=2", "trainer.max_epochs=1", "workers=1")
    assert code == 0, err
    assert len(re.findall(r"trial \d+ finished", out)) == 2 and "val/acc" in out


def test_choices_in_folders_are_taken_as_hydra_takes_them(moved, inside):
    """`experiment=tuned/wide`, `data/sizes=small`, and a folder of a data set's parts that is its own group."""
    configs = moved / "configs"
    files = {
        "experiment/tuned/wide.yaml": "# @package _global_\nmodel:\n  net:\n    width: 64\n",
        "data/sizes/small.yaml": "batch_size: 4\n",
        "data/sized.yaml": "defaults: [spirals, sizes@_here_: large, _self_]\n",
        "data/sizes/large.yaml": "batch_size: 32\n",
    }
    for name, text in files.items():
        (configs / name).parent.mkdir(exist_ok=True)
        (configs / name).write_text(text)
    try:
        chosen = ("experiment=tuned/wide", "data=sized", "data/sizes@data=small")
        config = compose("train", [*chosen]).config
        assert (config.model.net.width, config.data.batch_size) == (64, 4)
        assert compose("train", ["data=sized"]).config.data.batch_size == 32
        code, _, err = inside("train", "experiment=tuned/wild")
        assert code == 2 and "did you mean 'tuned/wide'?" in err
    finally:
        for name in files:
            (configs / name).unlink()


@pytest.mark.parametrize("text", ["raise ValueError('no')", "import json; json.loads('')", "1 +"])
def test_a_module_that_cannot_be_imported_is_named_with_its_line(moved, inside, text):
    path = moved / "src" / "models" / "broken.py"
    path.write_text(f"\n{text}\n")
    try:
        code, _, err = inside("train", "model.net._target_=src.models.broken.Net")
        assert code == 2 and "model.net._target_=src.models.broken.Net" in err
        assert "src.models.broken cannot be imported: " in err and "Traceback" not in err
        assert text == "1 +" or f"{path}, line 2" in err
    finally:
        path.unlink()


WORDS = {
    ("train", "hparams_search=spirals_optuna"): "boltlab sweep sweep=NAME",
    ("train", "debug=fdr"): "debug=fast",
    ("train", "trainer=ddp_sim"): "starts processes, which boltlab does itself: ddp",
    ("train", "trainer.strategy=ddp_fork_find_unused_parameters_true"): "ddp_find_unused_parameters_true",
    ("train", "task_name=mine"): "name=…",
    ("train", "extras.print_config=false"): "the config is in the run folder",
}


@pytest.mark.parametrize(("verb", "word"), WORDS)
def test_a_word_that_is_written_otherwise_is_answered_in_one_line(inside, verb, word):
    given = (word.replace("trainer.strategy", "+trainer.strategy"),)
    code, out, err = inside(verb, *given)
    assert code == 2 and not out and err.count("\n") == 4 and WORDS[verb, word] in err


LEFT = {
    "configs/train.yaml": "docs/migrate.md says what replaces it",
    "configs/experiment/old.yaml": "is monitor=…",
    "configs/hparams_search/spirals_optuna.yaml": "boltlab sweep sweep=NAME",
}


@pytest.mark.parametrize("file", LEFT)
def test_a_file_that_was_not_moved_is_answered_too(moved, inside, file):
    path = moved / file
    before = path.read_bytes() if path.exists() else None
    source = Path(__file__).parent / "project" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(source.read_text() if source.exists() else "# @package _global_\noptimized_metric: val/acc\n")
    try:
        group, name = path.parent.name, path.stem
        code, out, err = inside("train", *([f"{group}={name}"] if group != "configs" else []))
        assert code == 2 and not out and LEFT[file] in err
    finally:
        path.unlink() if before is None else path.write_bytes(before)


def test_without_its_own_callbacks_an_experiment_is_told_what_ours_are_called(moved, inside, tmp_path):
    aside = shutil.move(moved / "configs" / "callbacks", tmp_path / "callbacks")
    try:
        code, _, err = inside("train", "+callbacks.model_checkpoint.monitor=val/loss")
        assert code == 2 and "it is callbacks=[best,last]" in err
        assert inside("train", "trainer.max_epochs=1")[0] == 0
        assert (only(tmp_path) / "checkpoints" / "best.ckpt").is_file()
    finally:
        shutil.move(aside, moved / "configs" / "callbacks")
