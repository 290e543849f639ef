"""The project: found from the current folder upwards, its configs first, and trusted only where it is installed."""

import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from plain.conftest import QUICK, forget, install, overrides

import boltlab as package
from boltlab import runs
from boltlab.config import project
from boltlab.config.compose import compose
from boltlab.config.sources import CONFIG_DIR, groups
from boltlab.config.trust import UntrustedConfig, refuse_untrusted
from boltlab.ground.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")
SHORT = ("test=false", "callbacks=[best,last]", "trainer.max_epochs=1")
EVIL = {"_target_": "os.system", "command": "touch canary"}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A copy of the project in `mine/cells`, its package importable, and `site`, where an installer would write."""
    root = Path(shutil.copytree(Path(__file__).parent / "project", tmp_path / "mine" / "cells")).resolve()
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.setattr("site.getsitepackages", lambda: [str(site)])
    monkeypatch.syspath_prepend(root / "src")
    monkeypatch.delenv("BOLTLAB_PROJECT")
    forget()
    monkeypatch.chdir(root)
    yield root, site
    forget()


def test_a_project_is_found_from_any_folder_below_it_and_its_configs_come_first(own, monkeypatch):
    root, site = own
    install(root, site)
    (root / "configs" / "trainer").mkdir()
    (root / "configs" / "trainer" / "cpu.yaml").write_text("_target_: lightning.pytorch.Trainer\nmax_epochs: 7\n")
    for folder in (root, root / "src" / "cells", root / "configs" / "model"):
        monkeypatch.chdir(folder)
        found = project.find()
        assert (found.root, found.package, found.version, found.trusted) == (root, "cells", "0.3", True)
        config = compose("train", ["data=cells_digits", "model=cells_vae", "trainer=cpu", "logger=csv"]).config
        assert config.model._target_ == "cells.models.VAE" and config.trainer.max_epochs == 7  # not the engine's 10
    assert "cells_vae" in groups()["model"] and {"cpu", "ddp"} <= set(groups()["trainer"])
    monkeypatch.chdir(root.parent)
    assert project.find() is None and "model" not in groups()
    monkeypatch.setenv("BOLTLAB_PROJECT", str(root))
    assert project.find().root == root and "cells_vae" in groups()["model"]


def test_runs_of_a_subfolder_stand_with_those_of_the_project(boltlab, own, monkeypatch):
    root, site = own
    install(root, site)
    monkeypatch.chdir(root / "src")
    code, _, err = boltlab("train", *overrides("forecaster"), *SHORT)
    assert code == 0, err
    (run,) = runs.folders(root / "logs")
    assert not Path("logs").exists()
    monkeypatch.chdir(root)
    for arguments in (("eval", "run=latest"), ("runs",), ("train", *overrides("forecaster"), *SHORT, "log_dir=other")):
        assert boltlab(*arguments)[0] == 0
    assert len(list(runs.folders("other"))) == 1 and run.is_dir()
    monkeypatch.chdir(root / "src")
    assert boltlab("train", *overrides("forecaster"), *SHORT, "log_dir=mine")[0] == 0
    assert len(list(runs.folders(root / "src" / "mine"))) == 1  # as the command line says it, from here
    assert boltlab("eval", "run=latest")[0] == 0 and not Path("logs").exists()


def test_a_run_is_used_from_anywhere_where_the_package_is_installed(boltlab, own, tmp_path, monkeypatch):
    root, site = own
    install(root, site)
    assert boltlab("train", *overrides("forecaster"), *SHORT)[0] == 0
    run = next(runs.folders("logs")).resolve()
    monkeypatch.chdir(tmp_path)
    code, _, err = boltlab("eval", f"run={run}", "split=val")
    assert code == 0, err
    assert type(package.load(run)).__name__ == "Forecaster"


def not_installed(root, site): ...


def installed_elsewhere(root, site):
    install(root.parent / "another", site)


def not_editable(root, site):
    install(root, site, editable=False)


def a_dist_info_of_its_own(root, site):
    install(root, root)
    install(root, root / "src")


def another_package(root, site):
    install(root, site)
    text = (root / "pyproject.toml").read_text()
    (root / "pyproject.toml").write_text(text.replace('package = "cells"', 'package = "sklearn"'))


def in_a_run_folder(root, site):
    install(root, site)
    for name in ("config.yaml", "summary.json"):
        (root.parent / name).write_text("{}")


def in_a_log_folder(root, site):
    install(root, site)
    (root.parent / "train" / "a").mkdir(parents=True)
    for name in ("config.yaml", "summary.json"):
        (root.parent / "train" / "a" / name).write_text("{}")


UNTRUSTED = [not_installed, installed_elsewhere, not_editable, a_dist_info_of_its_own, another_package]
UNTRUSTED += [in_a_run_folder, in_a_log_folder]


@pytest.mark.parametrize("made", UNTRUSTED, ids=lambda made: made.__name__)
def test_a_project_that_came_from_elsewhere_cannot_trust_itself(boltlab, own, made):
    root, site = own
    (root / "configs" / "data" / "evil.yaml").write_text(yaml.safe_dump(EVIL))
    (root / "configs" / "data" / "digits.yaml").write_text(yaml.safe_dump(EVIL))
    sent = root / "logs" / "train" / "sent"
    sent.mkdir(parents=True)
    (sent / "summary.json").write_text("{}")
    model = {"_target_": "cells.models.VAE"}
    (sent / "config.yaml").write_text(yaml.safe_dump({"model": model, "data": EVIL, "trainer": {}}))
    made(root, site)
    assert "cells" not in project.packages() and "sklearn" not in project.packages()
    assert project.config_dirs() == []
    for verb in ("eval", "predict"):
        code, out, err = boltlab(verb, "run=sent")
        assert code != 0 and not out and "cells.models.VAE" in err and "os.system" in err and "not trusted" in err
    code, out, err = boltlab("show", "data=evil")
    assert code != 0 and not out and not Path("canary").exists()
    if made not in (in_a_run_folder, in_a_log_folder):  # there it is no project at all
        assert code == 1 and "is not trusted" in err and f"pip install --no-deps -e {root}" in err
        for arguments in (("show", "data=digits"), ("train", *QUICK), ("bench",), ("doctor", "data=digits")):
            assert boltlab(*arguments)[0] == 1
    assert not list(root.rglob("canary")) and "cells" not in sys.modules


@pytest.mark.parametrize("name", ["pyproject.toml", "src"])
def test_a_run_folder_with_a_project_in_it_is_passed_over(own, name, monkeypatch):
    root, site = own
    install(root, site)
    inner = root / "logs" / "train" / "2026_sent"
    inner.mkdir(parents=True)
    (inner / "config.yaml").write_text("{}")
    (inner / "summary.json").write_text("{}")
    (inner / "pyproject.toml").write_text('[tool.boltlab]\npackage = "evil"\n')
    (inner / "src").mkdir()
    monkeypatch.chdir(inner / "src" if name == "src" else inner)
    assert project.find().package == "cells"


def test_an_unpacked_archive_is_no_project(boltlab, own, tmp_path, monkeypatch):
    root, _ = own
    with zipfile.ZipFile(tmp_path / "sent.zip", "w") as archive:
        for path in root.rglob("*"):
            archive.write(path, path.relative_to(root))
        archive.writestr("cells-0.3.dist-info/METADATA", "Name: cells\nVersion: 0.3\n")
        url = {"url": (tmp_path / "unpacked").as_uri(), "dir_info": {"editable": True}}
        archive.writestr("cells-0.3.dist-info/direct_url.json", json.dumps(url))
    with zipfile.ZipFile(tmp_path / "sent.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    monkeypatch.chdir(tmp_path / "unpacked")
    monkeypatch.syspath_prepend(tmp_path / "unpacked")  # as `python -m boltlab` has the current folder
    assert project.find().problem == "it is not installed editable in this Python"
    code, _, err = boltlab("train", *overrides("vae"))
    assert code == 1 and "is not trusted" in err and "cells" not in sys.modules


def test_a_run_of_another_project_whose_package_has_the_same_name_is_refused(boltlab, own):
    """Two projects made by different people may both call their package `cells`."""
    root, site = own
    install(root, site)
    assert boltlab("train", *overrides("vae"), *SHORT)[0] == 0
    run = next(runs.folders("logs"))
    assert yaml.safe_load((run / "config.yaml").read_text())["project"] == "cells"
    named = json.loads((run / "environment.json").read_text())["project"]
    assert named == {"name": "cells", "package": "cells", "version": "0.3"}
    shutil.rmtree(site / "cells-0.3.dist-info")
    install(root, site, name="other-cells")
    for verb in (["eval", "run=latest"], ["train", "resume=latest"], ["predict", "run=latest"]):
        code, _, err = boltlab(*verb)
        assert code in (1, 2) and "is a run of the project 'cells'; its package 'cells' is that of 'other-cells'" in err
    with pytest.raises(UserError, match="install 'cells' instead"):
        package.load(run)
    code, _, err = boltlab("eval", "run=latest", "trusted=[cells]")
    assert code == 0, err


def test_an_importable_package_is_trusted_for_the_command_that_names_it(boltlab, own):
    for arguments in (("train", *overrides("forecaster"), *SHORT), ("eval", "run=latest")):
        code, _, err = boltlab(*arguments)
        assert code == 1 and "cells" in err and "not trusted" in err
        code, _, err = boltlab(*arguments, "trusted=[cells]")
        assert code == 0, err
    assert boltlab("eval", "run=latest")[0] == 1 and "BOLTLAB_TRUSTED" not in os.environ
    run = next(runs.folders("logs"))
    assert "trusted" not in (run / "config.yaml").read_text() + (run / "overrides.yaml").read_text()


def test_a_project_is_not_trusted_by_the_name_of_a_package_that_lies_elsewhere(boltlab, own):
    root, _ = own
    (root / "configs" / "data" / "evil.yaml").write_text(yaml.safe_dump(EVIL))
    text = (root / "pyproject.toml").read_text()
    (root / "pyproject.toml").write_text(text.replace('package = "cells"', 'package = "sklearn"'))
    code, _, err = boltlab("show", "data=evil", "trusted=[sklearn]")
    assert code == 1 and "'sklearn' is not imported from below it" in err and not Path("canary").exists()


def test_a_run_builds_classes_of_ones_own_and_calls_no_functions(own):
    root, site = own
    install(root, site)
    refuse_untrusted({"model": {"_target_": "cells.models.VAE"}, "net": {"_target_": "cells.data.Digits"}}, "a run")
    with pytest.raises(UntrustedConfig, match="is no class"):
        refuse_untrusted({"data": {"_target_": "cells.data.padded", "items": []}}, "a run")
    for name in ("cells.data.torch.load", "cells.data.L.Trainer", "cells.models.nn.Linear"):  # by way of its imports
        with pytest.raises(UntrustedConfig):
            refuse_untrusted({"data": {"_target_": name}}, "a run")
    with project.options("eval", ["trusted=[cells.data.padded]"]):
        refuse_untrusted({"data": {"_target_": "cells.data.padded", "items": []}}, "a run")


MISTAKES = {
    "trusted=[nowhere]": "no package 'nowhere' can be imported",
    "trusted=[../evil]": "is no name of a package",
    "trusted=": "is no name of a package",
    "--config-dir=nowhere": "there is no such folder",
    "--config-dir": "names nothing",
}


@pytest.mark.parametrize("given", MISTAKES)
def test_a_mistaken_option_is_named(boltlab, given):
    code, out, err = boltlab("show", "data=digits", given)
    assert code == 2 and not out and MISTAKES[given] in err and given.partition("=")[0] in err


@pytest.mark.parametrize("file", ["train.yaml", "local/default.yaml", "experiment/trusting.yaml"])
def test_a_file_cannot_trust_a_package(boltlab, own, file):
    root, site = own
    install(root, site)
    path = root / "configs" / file
    path.parent.mkdir(exist_ok=True)
    head = (CONFIG_DIR / file).read_text() if file == "train.yaml" else "# @package _global_\n"
    path.write_text(f"{head}\ntrusted: [evil]\n")
    chosen = ("experiment=trusting",) if "experiment" in file else ()
    code, out, err = boltlab("train", *chosen)
    assert code == 2 and not out and "there is no key 'trusted'" in err


BROKEN = {
    '[tool.boltlab]\npackage = "not a name"\n': "is no name of a package",
    "[tool.boltlab]\npackage = 3\n": "is no name of a package",
    '[tool.boltlab]\npackage = "cells"\nconfigs = "../../etc"\n': "is no folder below the project",
    '[tool.boltlab]\npackage = "cells"\nconfigs = "/etc"\n': "is no folder below the project",
    "[tool.boltlab\n": "cannot be read",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_table_is_named_with_its_file(boltlab, tmp_path, text):
    (tmp_path / "pyproject.toml").write_text(text)
    code, _, err = boltlab("show", "data=digits")
    assert code == 1 and BROKEN[text] in err and str(tmp_path / "pyproject.toml") in err
    with pytest.raises(UserError):
        project.find()


def test_other_tools_tables_make_no_project(tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text("[tool.ruff]\nline-length = 9\n")
    monkeypatch.setenv("BOLTLAB_PROJECT", ".")
    with pytest.raises(UserError, match=r"BOLTLAB_PROJECT=\.: there is no pyproject.toml with"):
        project.find()
    monkeypatch.delenv("BOLTLAB_PROJECT")
    assert project.find() is None


def test_a_config_dir_adds_choices_and_a_config_name_another_primary_config(boltlab, tmp_path):
    folder = tmp_path / "my configs"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "few.yaml").write_text("defaults: [digits, _self_]\nmax_samples: 40\n")
    (folder / "short.yaml").write_text("defaults: [train, _self_]\ntrainer:\n  max_epochs: 3\n")
    for flag in ("--config-dir=my configs", "-cd=my configs"):
        code, out, err = boltlab("train", flag, "--cfg", "job", "data=few")
        assert code == 0 and yaml.safe_load(out)["data"]["max_samples"] == 40, err
    code, out, err = boltlab("train", "--config-dir", "my configs", "--config-name", "short", "--cfg", "job")
    assert code == 0 and yaml.safe_load(out)["trainer"]["max_epochs"] == 3, err
    assert "few" in boltlab("train", "--help", "--config-dir", "my configs")[1]
    code, _, err = boltlab("train", "--cfg", "job", "data=few")
    assert code == 2 and "data=few" in err  # it held for its command
    code, _, err = boltlab("train", "--config-name", "nowhere")
    assert code == 2 and "nowhere" in err
