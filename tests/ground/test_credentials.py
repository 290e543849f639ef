"""No secret gets into a run folder, a tracker or a message."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from waiting import HANG

from boltlab import runs
from boltlab.config.compose import compose
from boltlab.ground import credentials
from boltlab.runs import patch

QUICK = ["model=linear", "trainer.max_epochs=1", "trainer.accelerator=cpu"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql://user:pw@host/db", "postgresql://user:***@host/db"),
        ("a https://u:p%40x@h:80/x and sftp://:q@h", "a https://u:***@h:80/x and sftp://:***@h"),
        ("http://host:5000/a@b", "http://host:5000/a@b"),
        ("http://user@host", "http://user@host"),
        ("optimizer.lr=0.1", "optimizer.lr=0.1"),
    ],
)
def test_passwords_of_urls_are_masked(text, expected):
    assert credentials.masked(text) == expected


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("'logger.mlflow.tracking_uri=\"http://me:hunter22@host\"'", "logger.mlflow.tracking_uri=http://me:***@host"),
        ("+data.password=hunter22", "data.password=***"),
        ("name=hunter2222", "name=***"),
    ],
)
def test_a_config_that_holds_a_secret_is_refused(boltlab, monkeypatch, override, where):
    monkeypatch.setenv("SOME_TOKEN", "hunter2222")
    code, out, err = boltlab("train", "logger=mlflow", override.strip("'"))
    assert code == 2
    assert "hunter22" not in out + err
    assert where in err
    assert "${oc.env:" in err
    assert not Path("logs").exists()


LINES = Path(__file__).with_name("lines_with_secrets.txt").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("line", [line for line in LINES if not line.startswith("#")])
def test_lines_with_secrets_as_people_have_them(monkeypatch, line):
    kind, marked = line.split("\t")
    secrets, text = re.findall("‹(.*?)›", marked), re.sub("[‹›]", "", marked)
    key, _, value = text.partition("=")
    if kind == "message":
        assert credentials.masked(text) != text and not any(secret in credentials.masked(text) for secret in secrets)
    elif kind in ("file", "patch"):
        assert credentials.private(text) if kind == "file" else patch.in_code(f"a = 1\n{text}\n")
    else:
        if kind == "variable":
            monkeypatch.setenv(key, value)
            key, value = "name", f"a{value}b"
        ((where, message),) = credentials.mistakes(OmegaConf.create({"a": {key: [value]}}))
        assert f"a.{key}.0=" in where and not any(secret in where + message for secret in secrets)


def test_what_is_shipped_raises_no_alarm():
    root = Path(runs.__file__).parents[3]
    texts = {
        path: path.read_text()
        for top in ("configs", "src", "scripts")
        for path in (root / top).rglob("*.*")
        if path.suffix in (".yaml", ".py", ".sh")
    }
    assert len(texts) > 250
    assert [str(path) for path, text in texts.items() if patch.in_code(text)] == []
    assert [
        str(path) for path, text in texts.items() if path.suffix == ".yaml" and credentials.masked(text) != text
    ] == []
    assert [str(path) for path in texts if credentials.private(str(path))] == []


@pytest.mark.parametrize(
    "text",
    [
        "a.pad_token=<pad>",
        "model.tokens=12",
        "url=http://host/x?page=2&size=3",
        "name=resnet18_imagenet1k_v1_2026-11-30",
        "key=d41d8cd98f00b204e9800998ecf8427e",
        "target=lightning.pytorch.callbacks.GradientAccumulationScheduler",
    ],
)
def test_what_only_looks_like_a_secret(text):
    key, _, value = text.partition("=")
    assert credentials.masked(text) == text and list(credentials.mistakes(OmegaConf.create({key: value}))) == []
    assert not patch.in_code(text)


def test_what_no_secret_is(monkeypatch, tmp_path):
    monkeypatch.setenv("SHORT_KEY", "adamw")
    monkeypatch.setenv("CREDENTIALS", str(tmp_path))
    config = OmegaConf.create({"pad_token": "<pad>", "a": f"{tmp_path}/x", "keys": "abc", "password": None})
    config.update({"optimizer": "adamw", "url": "http://u:${oc.env:PW}@h", "token": "${oc.env:PW}"})
    assert list(credentials.mistakes(config)) == []


def test_references_to_secrets_stay_references_and_others_are_resolved(monkeypatch):
    monkeypatch.setenv("SCRATCH_FOLDER", "/scratch")
    monkeypatch.setenv("TEAM_DB", "postgresql://u:hunter22@h/db")
    monkeypatch.setenv("MY_TOKEN", "hunter22")
    monkeypatch.setenv("WORD", "hunter22")
    config = OmegaConf.create(
        {
            "root": "${oc.env:SCRATCH_FOLDER}/images",
            "missing": "${oc.env:NOT_THERE,else}",
            "storage": "${oc.env:TEAM_DB}",
            "copy": ["${storage}", {"inside": "a ${oc.env:MY_TOKEN}"}],
            "url": "http://me:${oc.env:WORD}@${.host}",
            "host": "h",
            "password": "${oc.env:WORD}",
            "lr": 0.1,
        }
    )
    plain = credentials.plain(config)
    assert plain == {
        "root": "/scratch/images",
        "missing": "else",
        "storage": "${oc.env:TEAM_DB}",
        "copy": ["${oc.env:TEAM_DB}", {"inside": "a ${oc.env:MY_TOKEN}"}],
        "url": "http://me:${oc.env:WORD}@h",
        "host": "h",
        "password": "${oc.env:WORD}",
        "lr": 0.1,
    }
    # What is written means the same, and the resolver is as it was.
    again = OmegaConf.to_container(OmegaConf.create(plain), resolve=True)
    assert again == OmegaConf.to_container(config, resolve=True)
    assert again["url"] == "http://me:hunter22@h"


@pytest.mark.parametrize("name", [".env", "a/.env.local", "x.pem", "id_rsa", "conf/aws_credentials", ".netrc", "A.KEY"])
def test_files_of_these_names_are_private(name):
    assert credentials.private(name)


@pytest.mark.parametrize("name", [".env.example", "id_rsa.pub", "src/credentials.py", "keys.py", "environment.yaml"])
def test_files_of_these_names_are_not(name):
    assert not credentials.private(name)


SECRETS = {
    "WANDB_API_KEY": "1357acfe" * 5,
    "MLFLOW_TRACKING_PASSWORD": "pw-mlflow-7731",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
    "HF_TOKEN": "hf_abcdefghijklmnop",
}
URL_PASSWORD, NETRC_PASSWORD, FILE_SECRET = "pw-of-url-4242", "pw-of-netrc-5151", "value-of-dotenv-6161"

PROGRAM = """
import os, sys
from boltlab.training import fit as train
from boltlab.__main__ import main
tell = train.tell_loggers
def fail(trainer, **parts):  # after all is written and logged
    tell(trainer, **parts)
    if "test" in parts:
        raise RuntimeError("no answer from " + os.environ["TEAM_SERVER"])
train.tell_loggers = fail
sys.exit(main())
"""


@pytest.mark.slow
def test_nothing_secret_is_written_anywhere(tmp_path):
    """A run with every tracker, in a clone with uncommitted secrets, that fails at its very end with a traceback."""
    pytest.importorskip("mlflow")
    pytest.importorskip("tensorboard")
    home, work, clone = tmp_path / "home", tmp_path / "work", tmp_path / "clone"
    for folder in (home, work):
        folder.mkdir()
    (home / ".netrc").write_text(f"machine api.example.org login user password {NETRC_PASSWORD}\n")
    shutil.copytree(Path(runs.__file__).parents[2], clone / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(Path(runs.__file__).parents[3] / "configs", clone / "configs")
    shutil.copy(Path(runs.__file__).parents[3] / "pyproject.toml", clone)
    (clone / ".gitignore").write_text("__pycache__/\nlogs/\n")
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    remote = f"https://me:{URL_PASSWORD}@git.example.org/a.git"
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"], ["remote", "add", "origin", remote]):
        subprocess.run(["git", *who, *command], cwd=clone, check=True)
    (clone / ".env").write_text(f"PASSWORD={FILE_SECRET}\n")
    (clone / "src" / "new.py").write_text("a = 1\n")

    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "WANDB", "_WANDB"))}
    environment = {
        **kept,
        **SECRETS,
        "HOME": str(home),
        "NETRC": str(home / ".netrc"),
        "PYTHONPATH": str(clone / "src"),
    }
    environment |= {"WANDB_MODE": "offline", "TEAM_SERVER": f"http://me:{URL_PASSWORD}@127.0.0.1:9/"}
    environment["TEAM_FOLDER"] = str(work / "elsewhere")
    more = ["logger=[csv,wandb,mlflow,tensorboard]", "logger.mlflow.tracking_uri=${oc.env:TEAM_SERVER}", *QUICK]
    more += ["logger.wandb.log_model=best", "logger.mlflow.log_model=best", "data_dir=${oc.env:TEAM_FOLDER}"]
    more += ["trusted=[project]"]
    program = clone / "src" / "program.py"  # a file: MLflow looks for the repository that it is in
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), "train", *more]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, timeout=HANG, check=False)
    printed = done.stdout + done.stderr
    assert done.returncode == 1, printed.decode()
    assert b"RuntimeError: no answer from http://me:***@127.0.0.1:9/" in printed and b"Traceback" in printed
    assert b"The MLflow server http://me:***@127.0.0.1:9/ cannot be used" in printed

    (folder,) = runs.folders(clone / "logs")
    config = OmegaConf.load(folder / "config.yaml")
    raw = OmegaConf.to_container(config)
    assert raw["logger"]["mlflow"]["tracking_uri"] == "${oc.env:TEAM_SERVER}"
    assert raw["data_dir"] == str(work / "elsewhere")
    described = json.loads((folder / "environment.json").read_text())
    assert described["git_left_out"] == [".env"]
    assert "+a = 1" in (folder / "git.patch").read_text()
    assert "RuntimeError: no answer from http://me:***@127.0.0.1:9/" in runs.read_summary(folder)["reason"]

    sources = {home / ".netrc", clone / ".env", clone / ".git" / "config"}
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path not in sources]
    for expected in ("*.wandb", "mlflow.db", "events.out.tfevents.*", "best.ckpt", "metrics.csv", "debug.log"):
        assert any(path.match(expected) for path in files), expected
    for secret in (*SECRETS.values(), URL_PASSWORD, NETRC_PASSWORD, FILE_SECRET):
        assert [str(path) for path in files if secret.encode() in path.read_bytes()] == []
        assert secret.encode() not in printed


@pytest.mark.slow
def test_a_run_with_a_reference_goes_on_where_it_is_given_again(boltlab, monkeypatch):
    """The environment is read for a saved config only where the command line says so."""
    monkeypatch.setenv("RUN_TOKEN", "hunter2222")
    given = "logger.metrics.dir=${oc.env:RUN_TOKEN}"
    monkeypatch.setenv("RUN_TOKEN", str(Path.cwd() / "elsewhere"))
    assert boltlab("train", "logger=csv", given, *QUICK)[0] == 0
    assert (Path("elsewhere") / "metrics.csv").is_file()
    code, _, err = boltlab("train", "resume=latest", "trainer.max_epochs=2")
    assert (code, f"give it again: '{given}'" in err) == (1, True)
    code, _, err = boltlab("train", "resume=latest", "trainer.max_epochs=2", given)
    assert code == 0, err
    assert boltlab("eval", "run=latest")[0] == 0
    code, _, err = boltlab("predict", "run=latest", "input=nothing.jpg")
    assert code == 1 and "input=nothing.jpg names no image" in err
    folder = next(runs.folders("logs"))
    assert (
        OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))["logger"]["metrics"]["dir"]
        == given.partition("=")[2]
    )


def test_compose_keeps_the_reference(monkeypatch):
    monkeypatch.setenv("A_TOKEN", "hunter2222")
    config = compose("train", ["logger=wandb", "logger.wandb.entity=${oc.env:A_TOKEN}"]).config
    assert OmegaConf.to_container(config)["logger"]["wandb"]["entity"] == "${oc.env:A_TOKEN}"
