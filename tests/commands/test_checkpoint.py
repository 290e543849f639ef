import json
import os
from pathlib import Path

import pytest
import torch

import boltlab as package
from boltlab import runs
from boltlab.checkpoints import file as checkpoint_file

pytestmark = pytest.mark.floats

QUICK = ["model=linear", "trainer.max_epochs=1", "logger=csv", "~callbacks.progress", "~callbacks.summary"]


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    from boltlab.__main__ import main

    logs = tmp_path_factory.mktemp("logs")
    assert main(["train", *QUICK, f"log_dir={logs}"]) == 0
    return logs


@pytest.fixture
def folder(logs, tmp_path):
    """The run, as `latest` in the current folder; what a test changes in it is its own."""
    import shutil

    shutil.copytree(logs, tmp_path / "logs")
    return runs.find("latest", "logs")


def test_verify_tells_of_all_checkpoints_of_a_run_and_of_one_file(boltlab, folder):
    code, out, _ = boltlab("checkpoint", "verify", "latest")
    assert code == 0 and [line.split()[1] for line in out.splitlines()] == ["good", "good"]
    path = folder / "checkpoints" / "best.ckpt"
    path.write_bytes(path.read_bytes()[:-1])
    code, out, _ = boltlab("checkpoint", "verify", "run=latest")
    assert code == 1
    assert "best.ckpt  is " in out and "last.ckpt  good" in out
    named = path.with_name("epoch=3-step=4.ckpt")  # as Lightning names files; no override
    (path.parent / "last.ckpt").rename(named)
    assert boltlab("checkpoint", "verify", str(named))[0] == 0
    code, out, _ = boltlab("checkpoint", "verify", "nowhere.ckpt")
    assert code == 1 and out == "nowhere.ckpt  cannot be read: No such file or directory\n"


def test_show_says_what_is_in_a_checkpoint_and_builds_nothing(boltlab, folder, monkeypatch):
    monkeypatch.setattr("hydra.utils.instantiate", lambda *a, **k: pytest.fail("something was built"))
    code, out, _ = boltlab("checkpoint", "show", "latest", "checkpoint=last")
    assert code == 0
    shown = dict(line.split(maxsplit=1) for line in out.splitlines() if not line.startswith(("weights", "to go")))
    assert shown["global_step"] == "21" and shown["epoch"] == "1"
    assert shown["file"].endswith("last.ckpt") and shown["hash"].startswith("sha256:") and len(shown["hash"]) == 71
    assert shown["best"].startswith("val_acc 0.")
    assert shown["data"] == "project.data.digits.Digits" and shown["optimizer"] == "torch.optim.AdamW"
    assert "to go on from   yes" in out
    content = checkpoint_file.read(folder / "checkpoints" / "last.ckpt")
    floats = [value.numel() for value in content["state_dict"].values() if value.dtype == torch.float32]
    assert f"weights float32 {sum(floats):,} numbers in {len(floats)} tensors" in out


def test_exported_weights_are_those_of_the_loaded_model(boltlab, folder):
    from safetensors import safe_open
    from safetensors.torch import load_file

    code, out, _ = boltlab("checkpoint", "export", "latest", "output=deep/weights.safetensors")
    assert code == 0 and "deep/weights.safetensors" in out
    wanted, found = package.load().net.state_dict(), load_file("deep/weights.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    with safe_open("deep/weights.safetensors", "pt") as file:
        about = file.metadata()
    assert json.loads(about["class_names"]) == [str(digit) for digit in range(10)]
    assert json.loads(about["config"])["model"]["_target_"] == "project.models.classifier.Classifier"
    assert os.listdir("deep") == ["weights.safetensors"]


class Foreign:
    def __reduce__(self):
        return (_touch, ("executed",))


def _touch(name):
    Path(name).touch()
    return 1


def test_a_foreign_file_is_converted_and_run_only_where_it_is_trusted(boltlab):
    weights = {"a": torch.arange(3.0), "b": torch.ones(2, 2)}
    torch.save(weights, "bare.pt")
    torch.save({"state_dict": weights, "global_step": 7, "hyper_parameters": Foreign()}, "foreign.ckpt")
    torch.save({"model": weights, "args": Foreign()}, "nested.pth", _use_new_zipfile_serialization=False)
    torch.save([1, 2], "none.pt")
    assert boltlab("checkpoint", "convert", "bare.pt", "output=bare.ckpt")[0] == 0
    for name in ("foreign.ckpt", "nested.pth"):
        code, _, err = boltlab("checkpoint", "convert", name, "output=plain.ckpt")
        assert code == 1 and f"{__name__}._touch" in err and "trust=true" in err
        assert not Path("executed").exists() and not Path("plain.ckpt").exists()
        assert boltlab("checkpoint", "convert", name, "output=plain.ckpt", "trust=true")[0] == 0
        assert Path("executed").exists()
        Path("executed").unlink()
        for made in ("bare.ckpt", "plain.ckpt"):
            content = checkpoint_file.read(Path(made))["state_dict"]
            assert content.keys() == weights.keys() and all(torch.equal(content[key], weights[key]) for key in weights)
        assert checkpoint_file.read(Path("plain.ckpt")).get("global_step") == (7 if name == "foreign.ckpt" else None)
        Path("plain.ckpt").unlink()
    for arguments in (("none.pt",), ("none.pt", "trust=true"), ("nowhere.pt",), ("nowhere.pt", "trust=true")):
        code, _, err = boltlab("checkpoint", "convert", *arguments, "output=plain.ckpt")
        assert code == 1 and arguments[0] in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "actions: verify, show, export, convert"),
        (("shwo", "latest"), "did you mean 'show'?"),
        (("show",), "boltlab checkpoint show <file or run>"),
        (("show", "a", "b"), "is one word too many"),
        (("export", "latest"), "output=weights.safetensors"),
        (("convert", "a.pt"), "output=weights.ckpt"),
        (("show", "latest", "chekpoint=last"), "did you mean 'checkpoint'?"),
        (("show", "latest", "checkpoint=first"), "checkpoint"),
    ],
)
def test_a_mistake_ends_with_2_and_says_what_is_right(boltlab, words, message):
    code, _, err = boltlab("checkpoint", *words)
    assert code == 2 and message in err


def test_no_run_and_no_file_are_errors_of_one_line(boltlab):
    address = "http://127.0.0.1:1/a.ckpt?b=c"  # with = in it, and no override
    for words in (
        ("show", "latest"),
        ("show", "nowhere.ckpt"),
        ("show", address),
        ("verify", "latest"),
        ("export", "a", "output=b.safetensors"),
    ):
        code, _, err = boltlab("checkpoint", *words)
        assert code == 1 and err.count("\n") == 1


def test_an_output_is_never_overwritten_and_says_what_it_is(boltlab, tmp_path):
    checkpoint_file.write({"state_dict": {"net.a": torch.ones(1)}}, tmp_path / "a.ckpt")
    (tmp_path / "there.safetensors").write_text("mine")
    for words, message in (
        (("export", "a.ckpt", "output=there.safetensors"), "is there already"),
        (("export", "a.ckpt", "output=a.txt"), "must end in .safetensors"),
        (("convert", "a.ckpt", "output=a.ckpt"), "is there already"),
    ):
        code, _, err = boltlab("checkpoint", *words)
        assert code == 2 and message in err
    assert (tmp_path / "there.safetensors").read_text() == "mine"


def test_a_damaged_file_of_ours_is_not_made_good(boltlab, tmp_path):
    checkpoint_file.write({"state_dict": {"net.a": torch.ones(100)}}, tmp_path / "a.ckpt")
    raw = bytearray((tmp_path / "a.ckpt").read_bytes())
    raw[len(raw) // 2] ^= 1
    (tmp_path / "a.ckpt").write_bytes(raw)
    code, _, err = boltlab("checkpoint", "convert", "a.ckpt", "output=b.ckpt")
    assert code == 1 and "is damaged" in err and not (tmp_path / "b.ckpt").exists()
    _, _, err = boltlab("checkpoint", "show", "a.ckpt")
    assert "is damaged" in err and "convert" not in err


@pytest.mark.parametrize("odd", [{"state_dict": [1]}, {"state_dict": {1: 2}}, {"config": "abc"}, {"callbacks": [1]},
                                 {"loops": 5}, {"config": {"data": 3}}])  # fmt: skip
def test_a_file_of_odd_shape_is_one_line(boltlab, tmp_path, odd):
    checkpoint_file.write({"state_dict": {"net.a": torch.ones(1)}, **odd}, tmp_path / "a.ckpt")
    for words in (("show", "a.ckpt"), ("export", "a.ckpt", "output=b.safetensors")):
        code, _, err = boltlab("checkpoint", *words)
        assert code == 1 and err.count("\n") == 1 and f"{tmp_path}" not in err.partition("a.ckpt")[2]
