import copy
import csv
import hashlib
import json
import math
import pickle
import re
import shlex
import shutil
import threading
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from omegaconf import OmegaConf
from PIL import Image

from boltlab import runs
from boltlab.checkpoints import file as checkpoint_file
from boltlab.checkpoints import io
from boltlab.data import fingerprint as fingerprints
from boltlab.ground.errors import DataError
from boltlab.runs import differences as differ
from boltlab.training import resume

pytestmark = pytest.mark.floats

QUICK = ("model=linear", "trainer.max_epochs=1", "logger=csv", "data.batch_size=256", "trainer.accelerator=cpu")
QUICK += ("callbacks=[best,last]", "trainer.enable_progress_bar=false")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run of one epoch, for tests to copy."""
    from boltlab.__main__ import main

    top = tmp_path_factory.mktemp("made")
    assert main(["train", *QUICK, f"log_dir={top}"]) == 0
    return next(runs.folders(top))


@pytest.fixture
def run(made):
    folder = Path("logs/train") / made.name
    shutil.copytree(made, folder)
    return folder


def edit_json(path, **values):
    runs.write_json(path, {**runs.read_json(path), **values})


def edit_config(folder, old, new):
    text = (folder / "config.yaml").read_text()
    assert text.count(old) == 1, text
    (folder / "config.yaml").write_text(text.replace(old, new))


def count():
    return len(list(runs.folders("logs")))


def test_a_run_is_reproduced_to_the_bit(boltlab, run):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    code, out, err = boltlab("reproduce", f"run={run}")
    assert code == 0, err + out
    again = next(folder for folder in runs.folders("logs") if folder.name != run.name)
    assert "code          equal: commit" in out and "environment   equal" in out
    lines = out.split("run folder")[-1].splitlines()
    for what in ("best val_acc", "final train_loss", "test test_loss", "weights of best", "weights of last", "metrics"):
        assert any(line.startswith(what) and line.endswith("equal to the bit") for line in lines), (what, out)
    assert lines[-1].startswith("reproduced: all ") and lines[-1].endswith(" are equal to the bit")
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    summary = runs.read_summary(again)
    assert summary["reproduces"] == str(run.resolve()) and summary["reproduced"] is True
    assert summary["name"] == "digits_linear" and again.name.split("_", 2)[2].startswith("digits_linear")
    # what must be equal is, also by a comparison of its own
    first, second = (
        checkpoint_file.read(folder / "checkpoints" / "last.ckpt")["state_dict"] for folder in (run, again)
    )
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_what_cannot_change_the_result_may_be_another(boltlab, run):
    free = ("logger=none", "name=again", "tags=[x]", "data_dir=other", "data.num_workers=1", "data_fingerprint=none")
    code, out, err = boltlab("reproduce", f"run={run}", *free, "log_dir=elsewhere")
    assert code == 0, err + out
    (again,) = runs.folders("elsewhere")
    assert runs.load_config(again).name == "again" and not (again / "data.json").exists()


@pytest.mark.parametrize(
    "override",
    ["seed=1", "optimizer.lr=0.1", "trainer.max_epochs=2", "data=mnist", "callbacks=none", "precision=64",
     "trainer.devices=2", "launcher=joblib", "data.batch_size=3", "+trainer.log_every_n_steps=1"],
)  # fmt: skip
def test_what_could_change_the_result_is_refused(boltlab, run, override):
    code, _, err = boltlab("reproduce", f"run={run}", override)
    assert code == 2 and override in err and "could change the result" in err and count() == 1


def test_a_run_whose_config_was_edited_is_not_the_same(boltlab, run):
    edit_config(run, "seed: 0\nmonitor", "seed: 1\nmonitor")
    code, out, _ = boltlab("reproduce", f"run={run}")
    assert code == 1
    assert re.search(r"\nmetrics\.csv +2 rows +2 rows +differs *\n", out)
    assert re.search(r"\nmetrics\.csv: first at step 5: \w+ \S+ / \S+\n", out)
    assert "\nweights of last.ckpt: 2 of 2 tensors, most net." in out
    assert "are not equal to the bit" in out.splitlines()[-1]


def test_digits(boltlab, run):
    """A weight and a metric that differ in their last bits: not to the bit, but to six digits."""
    path = run / "checkpoints" / "last.ckpt"
    content = checkpoint_file.read(path)
    content["state_dict"]["net.layers.0.weight"][0, 0] += 1e-6
    checkpoint_file.write(content, path)
    summary = runs.read_summary(run)
    edit_json(run / "summary.json", test={**summary["test"], "test_loss": summary["test"]["test_loss"] * (1 + 2e-7)})
    code, out, _ = boltlab("reproduce", f"run={run}", "digits=6")
    assert code == 0 and "equal to 6 digits" in out.splitlines()[-1], out
    again = next(folder for folder in runs.folders("logs") if folder.name != run.name)
    code, out, _ = boltlab("reproduce", f"run={run}", f"compare={again}")
    assert code == 1 and out.splitlines()[-1].startswith("2 of ")
    assert "weights of last.ckpt: 1 of 2 tensors, most net.layers.0.weight by 1e-06" in out
    assert boltlab("reproduce", f"run={run}", f"compare={again}", "digits=7")[0] == 1


def images(root, red=0):
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(3):
                Image.new("RGB", (8, 8), (red + i, 200 * (name == "dog"), 0)).save(root / split / name / f"{i}.png")


FOLDER = (*QUICK, "data=small_folder", "data.root=images", "data.input_shape=[3,8,8]", "data.batch_size=2")


def test_other_data_end_it_before_anything_is_trained(boltlab):
    images(Path("images"))
    assert boltlab("train", *FOLDER)[0] == 0
    Path("images/train/cat/1.png").rename("images/train/cat/1b.png")
    code, out, err = boltlab("reproduce", "run=latest")
    assert code == 1 and count() == 1
    assert "train: names or sizes of files), nothing was trained" in err and "anyway=true" in err
    assert "data, val    6 samples  equal (names and sizes of files)" in out
    code, out, _ = boltlab("reproduce", "run=latest", "dry_run=true")
    assert code == 0 and "names or sizes of files" in out and count() == 1
    code, out, _ = boltlab("reproduce", "run=latest", "anyway=true")
    assert code == 0 and count() == 2  # the order of the names is the same, so are the images


def test_the_data_may_lie_elsewhere(boltlab):
    images(Path("data/images"))
    below = ("data.root=data/images", "data_fingerprint=contents")
    assert boltlab("train", *FOLDER, *below)[0] == 0
    Path("data").rename("moved")
    code, out, err = boltlab("reproduce", "run=latest", "dry_run=true")
    assert code == 0 and "cannot be read here" in out
    code, out, err = boltlab("reproduce", "run=latest")
    assert code == 1 and "data/images does not exist" in err and count() == 1
    code, out, err = boltlab("reproduce", "run=latest", "data_dir=moved")
    assert code == 0, err + out
    assert "data, train  6 samples  equal (contents)" in out


@pytest.mark.slow
def test_a_resumed_run_notices_other_files(boltlab):
    images(Path("images"))
    assert boltlab("train", *FOLDER)[0] == 0
    Image.new("RGB", (8, 8), (7, 7, 7)).save("images/train/cat/1.png", compress_level=0)
    rows = next(runs.folders("logs")) / "metrics.csv"
    before = rows.read_bytes()
    code, _, err = boltlab("train", "resume=latest", "trainer.max_epochs=2")
    assert code == 1 and "the train split is not what" in err and "bytes, now" in err and "restart_epoch" in err
    assert rows.read_bytes() == before  # nothing was trained
    code, _, err = boltlab("train", "resume=latest", "trainer.max_epochs=2", "resume_changed=restart_epoch")
    assert code == 0, err
    code, _, err = boltlab("train", "resume=latest", "trainer.max_epochs=3")  # what it went on with is what it has now
    assert code == 0, err
    code, _, err = boltlab("reproduce", "run=latest")
    assert code == 1 and "it was resumed with another trainer.max_epochs, so no one config has made it" in err


def test_a_resumed_run_with_the_same_config_is_reproduced(boltlab, run):
    edit_json(run / "summary.json", resumed=[{"time": 1.0, "seconds": 1.0, "overrides": ["logger=csv"], "changed": []}])
    edit_json(run / "summary.json", found={"optimizer.lr": 0.007})
    code, out, err = boltlab("reproduce", f"run={run}")
    assert code == 0, err + out
    assert "then it was resumed 1 times" in out and "optimizer.lr=0.007 was searched before the run" in out


@pytest.mark.parametrize(
    ("summary", "config", "said"),
    [
        ({"status": "interrupted"}, None, "it is interrupted, and has no end to be compared with: boltlab train "),
        ({"status": "failed"}, None, "it is failed, and has no end to be compared with\n"),
        ({"status": "unknown"}, None, "its summary.json is not there or broken"),
        ({"evaluated": "logs/train/x"}, None, "is an evaluation, no training"),
        ({"resumed": [{"time": 1.0, "seconds": 1.0, "changed": [["seed", 0, 1]]}]}, None, "resumed with another seed"),
        ({}, ("fast_dev_run: false", "fast_dev_run: true"), "fast_dev_run keeps nothing"),
        ({"epochs": 0}, ("max_time: null", "max_time: '00:00:01:00'"), "max_time=00:00:01:00 may have ended it"),
        ({}, ("init_from: null", "init_from: gone.ckpt"), "gone.ckpt, which is not there any more"),
    ],
)  # fmt: skip
def test_a_run_that_its_config_alone_does_not_explain_is_refused(boltlab, run, summary, config, said):
    edit_json(run / "summary.json", **summary)
    if config:
        edit_config(run, *config)
    code, _, err = boltlab("reproduce", f"run={run}")
    assert code == 1 and said in err and count() == 1


@pytest.mark.slow
def test_weights_that_a_run_began_with_are_those(boltlab, run):
    from safetensors.torch import save_file

    weights = checkpoint_file.read(run / "checkpoints" / "best.ckpt")["state_dict"]
    save_file({key: value for key, value in weights.items() if key.startswith("net.")}, "begin.safetensors")
    assert boltlab("train", *QUICK, "init_from=begin.safetensors")[0] == 0
    second = next(runs.folders("logs"))
    code, out, err = boltlab("reproduce", f"run={second}")
    assert code == 0, err + out
    save_file({"net.layers.0.weight": torch.zeros(10, 784)}, "begin.safetensors")
    code, _, err = boltlab("reproduce", f"run={second}")
    assert code == 1 and "begin.safetensors, which is another file now" in err


def test_a_run_from_before_there_were_fingerprints(boltlab, run):
    (run / "data.json").unlink()
    edit_config(run, "data_fingerprint: names\n", "")
    environment = runs.read_json(run / "environment.json")
    del environment["threads"]
    runs.write_json(run / "environment.json", environment)
    code, out, err = boltlab("reproduce", f"run={run}")
    assert code == 0, err + out
    assert "has recorded nothing of them: whether they are the same is not known" in out
    (run / "environment.json").unlink()
    code, out, _ = boltlab("reproduce", f"run={run}", "dry_run=true")
    assert code == 0 and "the run has recorded no commit" in out and "the run has recorded none" in out


def test_a_run_without_its_checkpoints_is_equal_in_what_is_left(boltlab, run):
    shutil.rmtree(run / "checkpoints")
    code, out, _ = boltlab("reproduce", f"run={run}")
    assert code == 1 and "no file" in out and "2 of " in out.splitlines()[-1]
    again = next(folder for folder in runs.folders("logs") if folder.name != run.name)
    assert boltlab("reproduce", f"run={run}", f"compare={again}", "digits=9")[0] == 0


def test_code_packages_and_machine_that_differ_are_listed(boltlab, run):
    environment = runs.read_json(run / "environment.json")
    packages = {**environment["packages"], "torch": "2.0.0", "aaa": "1", "evil\x1b[2J": "2"}
    edit_json(
        run / "environment.json", git_commit="0123456789" * 4, cpu="i486\x1b[31m", python="3.1", packages=packages
    )
    (run / "git.patch").write_text(
        "diff --git a/!x.py b/!x.py\nindex 1..2 100644\n--- a/!x.py\n+++ b/!x.py\n@@ -1,2 +1,2 @@\n-a\n+++b\n+c\n"
    )
    code, out, err = boltlab("reproduce", f"run={run}", "dry_run=true")
    assert code == 0 and "\x1b" not in out, err
    assert "then commit 012345678901 with uncommitted changes, now " in out
    assert "this clone does not know that commit: git fetch" in out
    assert "!x.py: then +2 -1, now as committed" in out  # the first, where this clone has changes too
    assert f"worktree add ../repro {'0123456789' * 4}\n" in out and f"apply {run.resolve()}/git.patch\n" in out
    lines = [line.split()[0] for line in out.splitlines() if line]
    assert lines.index("python") < lines.index("cpu") < lines.index("torch") < lines.index("aaa")
    assert count() == 1 and "nothing was trained" in out


@pytest.mark.parametrize(
    "commit", ["$(touch pwned)", "main; touch pwned", "--exec=touch", "0123456\n", "ABCDEFG", 7, ["a"]]
)
def test_what_is_no_commit_stands_in_no_command(boltlab, run, commit):
    edit_json(run / "environment.json", git_commit=commit)
    code, out, _ = boltlab("reproduce", f"run={run}", "dry_run=true")
    assert code == 0 and "code          the run has recorded no commit: " in out
    assert "worktree" not in out and " apply " not in out


def test_a_key_of_others_is_quoted_for_the_shell(boltlab, run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["data"]["x; $(y) 'z'"] = "${oc.env:A}'; touch pwned; '"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    err = boltlab("reproduce", f"run={run}")[2]
    assert shlex.split(err.partition("give it again: ")[2].splitlines()[0]) == [
        "data.x; $(y) 'z'=${oc.env:A}'; touch pwned; '"
    ]


def test_a_folder_from_others_builds_nothing_that_is_not_trusted(boltlab, run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["logger"]["csv"] = {"_target_": "os.system", "command": "touch pwned"}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for more in ((), ("dry_run=true",), ("compare=latest",)):
        assert boltlab("reproduce", f"run={run}", *more)[0] == 1 and not Path("pwned").exists()
    assert "os.system" in boltlab("reproduce", f"run={run}")[2]


@pytest.mark.parametrize("content", ["[]", "{", '{"splits": [1]}', '{"splits": {"train": 3, "val": {"samples": []}}}'])
def test_a_broken_data_json_is_no_crash(boltlab, run, content):
    (run / "data.json").write_text(content)
    code, _, err = boltlab("reproduce", f"run={run}", "dry_run=true")
    assert code == 0, err


def test_two_runs_are_compared_without_a_training(boltlab, run, monkeypatch):
    assert boltlab("train", *QUICK, "seed=1")[0] == 0
    other = next(runs.folders("logs"))
    monkeypatch.setattr("boltlab.training.start.run", None)
    before = {p: p.read_bytes() for p in Path("logs").rglob("*") if p.is_file()}
    code, out, err = boltlab("reproduce", f"run={run}", f"compare={other}")
    assert code == 1, err
    assert {p: p.read_bytes() for p in Path("logs").rglob("*") if p.is_file()} == before
    lines = [line.split() for line in out.splitlines()]
    assert ["data.seed", "0", "1"] in lines and ["seed", "0", "1"] in lines and "trainer." not in out
    code, _, err = boltlab("reproduce", f"run={run}", f"compare={run}")
    assert code == 1 and "with itself" in err
    code, _, err = boltlab("reproduce", f"run={run}", "compare=nothing")
    assert code == 1 and "compare=nothing is neither" in err


# ---------------------------------------------------------------- data.json of a training


def test_a_training_records_the_splits_that_it_has_loaded(boltlab, made):
    recorded = runs.read_json(made / "data.json")
    assert recorded["fingerprint"] == "names" and set(recorded["splits"]) == {"train", "val", "test"}
    assert [recorded["splits"][split]["samples"] for split in ("train", "val", "test")] == [1294, 144, 359]
    assert boltlab("train", *QUICK, "test=false")[0] == 0
    folder = next(runs.folders("logs"))
    assert set(runs.read_json(folder / "data.json")["splits"]) == {"train", "val"}
    assert boltlab("train", *QUICK, "data_fingerprint=none")[0] == 0
    assert not (next(runs.folders("logs")) / "data.json").exists()
    code, _, err = boltlab("train", *QUICK, "data_fingerprint=content")
    assert code == 2 and "did you mean 'contents'?" in err


def test_files_are_looked_at_while_the_run_trains_and_are_recorded_before_a_checkpoint(boltlab, monkeypatch):
    images(Path("images"))
    stepped, recorded = threading.Event(), []
    took = fingerprints._size
    monkeypatch.setattr(fingerprints, "_size", lambda path: stepped.wait(60) and took(path))
    step, write = torch.optim.AdamW.step, io.write

    def stepping(*arguments, **options):
        if not recorded:
            recorded.append(splits())
            threading.Timer(0.5, stepped.set).start()  # the epoch has ended by then
        return step(*arguments, **options)

    def splits():
        return set(runs.read_json(next(runs.folders("logs")) / "data.json").get("splits", ()))

    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    monkeypatch.setattr(io, "write", lambda *given: (recorded.append(splits()), write(*given))[1])
    assert boltlab("train", *FOLDER, "optimizer=adamw")[0] == 0
    assert recorded[0] == set() and recorded[1] == {"train", "val"} and len(recorded) > 2
    data = runs.read_json(next(runs.folders("logs")) / "data.json")["splits"]
    for split in ("train", "val", "test"):
        files = sorted(Path("images", split).rglob("*.png"))
        lines = "\n".join(f"{file.relative_to('images')}\0{file.stat().st_size}" for file in files)
        assert data[split]["files"] == 6 and data[split]["bytes"] == sum(file.stat().st_size for file in files)
        assert data[split]["names_and_sizes"] == hashlib.sha256(lines.encode()).hexdigest()


def test_a_copy_of_the_data_records_nothing(tmp_path):
    """In a worker process, whose collate function may belong to the data module; of a module with its Trainer."""
    data = LightningDataModule()
    data.on_load = resume.DataRecord(tmp_path, OmegaConf.create(), data, goes_on=False)
    assert pickle.loads(pickle.dumps(data)).on_load is None and copy.deepcopy(data).on_load is None


@pytest.mark.parametrize("kind", ["names", "contents"])
def test_contents_are_read_before_the_first_step(boltlab, monkeypatch, kind):
    images(Path("images"))
    seen, looked, step = [], threading.Event(), torch.optim.AdamW.step
    took = fingerprints._size
    monkeypatch.setattr(fingerprints, "_size", lambda path: (kind == "contents" or looked.wait(60)) and took(path))

    def stepping(*arguments, **options):
        seen.append(set(runs.read_json(next(runs.folders("logs")) / "data.json").get("splits", ())))
        looked.set()
        return step(*arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", stepping)
    assert boltlab("train", *FOLDER, "optimizer=adamw", f"data_fingerprint={kind}")[0] == 0
    assert seen[0] == ({"train", "val"} if kind == "contents" else set())


def test_what_fails_while_files_are_looked_at_ends_the_run_before_a_checkpoint(boltlab, monkeypatch):
    images(Path("images"))

    def gone(data, split, contents):
        raise DataError("the disk is gone")

    monkeypatch.setattr(fingerprints, "of_files", gone)
    code, _, err = boltlab("train", *FOLDER)
    assert code == 1 and "the disk is gone" in err
    assert not list(Path("logs").rglob("*.ckpt"))


# ---------------------------------------------------------------- the parts


@pytest.mark.parametrize(
    ("a", "b", "digits"),
    [
        (1.0, 1.0, math.inf), (math.nan, math.nan, math.inf), (0.0, -0.0, 17), (1.0, 1.0 + 2**-52, 15),
        (0.12345, 0.12346, 3), (0.9, 0.1, 0), (1.0, math.nan, 0), (math.inf, math.inf, math.inf), (math.inf, 1, 0),
        (0.0, 1e-9, 0), (1e-30, 1.000001e-30, 5), (-1.0, 1.0, 0), (100.0, 100.04, 3),
    ],
)  # fmt: skip
def test_agreement(a, b, digits):
    assert differ.agreement(a, b) == differ.agreement(b, a) == digits


def write_rows(folder, rows):
    folder.mkdir(exist_ok=True)
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_the_first_row_that_differs(tmp_path):
    rows = [{"step": 9, "loss": 0.5, "samples_per_second": 3}, {"step": 19, "loss": 0.25}]
    a = write_rows(tmp_path / "a", rows)
    b = write_rows(tmp_path / "b", [{"step": 9, "loss": 0.5, "samples_per_second": 4}, {"step": 19, "loss": 0.125}])
    (found,) = differ.rows(a, b)
    assert found.detail == "first at step 19: loss 0.25 / 0.125" and found.digits == 0
    (found,) = differ.rows(a, write_rows(tmp_path / "b", rows[:1]))
    assert "step 19" in found.detail and (found.then, found.now) == ("2 rows", "1 rows")
    # a column that the other file has from its first row on, and other times, are no difference
    assert differ.rows(a, write_rows(tmp_path / "b", [{"val": "", **row} for row in rows]))[0].digits == math.inf
    (tmp_path / "b" / "metrics.csv").unlink()
    assert differ.rows(a, tmp_path / "b")[0].verdict == "not to be compared"


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        (lambda w: None, ""),
        (lambda w: w["net.a"].neg_(), "1 of 2 tensors, most net.a by 0"),  # 0.0 and -0.0
        (lambda w: w.update({"net.b": w["net.b"].double()}), "1 of 2 tensors, most net.b by inf"),
        (lambda w: w.pop("net.b"), "net.b is only in one of the two"),
        (lambda w: w.update({"val_metrics.acc": torch.ones(1)}), ""),
    ],
)
def test_weights(tmp_path, change, detail):
    def write(name, weights):
        checkpoint_file.write({"state_dict": weights, "global_step": 3}, tmp_path / name / "checkpoints" / "last.ckpt")

    def fresh():
        return {"net.a": torch.zeros(2), "net.b": torch.tensor([math.nan, 1.0])}

    changed = fresh()
    change(changed)
    write("a", fresh())
    write("b", changed)
    found = differ.weights("last.ckpt", tmp_path / "a", tmp_path / "b")
    assert found.detail == detail and found.digits == (0 if detail else math.inf)
    path = tmp_path / "b" / "checkpoints" / "last.ckpt"
    path.write_bytes(path.read_bytes()[:-9])
    found = differ.weights("last.ckpt", tmp_path / "a", tmp_path / "b")
    assert found.verdict == "not to be compared" and "last.ckpt is cut short" in found.detail


def test_two_patches_file_by_file():
    def patch(name, *lines):
        body = "\n".join(lines)
        return f"diff --git a/{name} b/{name}\nindex 1..2\n--- a/{name}\n+++ b/{name}\n@@ -1 +1 @@\n{body}\n"

    then = patch("same", "-x", "+y") + patch("a b.py", "-x", "+y") + patch("old", "+1", "+2")
    now = patch("same", "-x", "+y") + patch("a b.py", "-x", "+z", "+w")
    assert differ.patches(then.encode(), now.encode()) == [
        "a b.py: then +1 -1, now +2 -1",
        "    then +y",
        "    now  +z",
        "    now  +w",
        "old: then +2 -0, now as committed",
    ]
    assert differ.patches(b"", b"") == [] == differ.patches(then.encode(), then.encode())
    binary = b"diff --git a/x.png b/x.png\nindex 1..2\nGIT binary patch\nliteral 3\n"
    assert differ.patches(binary, b"") == ["x.png: then binary, now as committed"]


def test_packages_that_compute_come_first_and_names_are_normalized():
    then = {"packages": {"Foo_Bar": "1", "zlib": "1", "nvidia-cudnn": "9", "same": "1"}, "accelerators": ["A", "A"]}
    now = {"packages": {"foo-bar": "1", "torch": "2", "nvidia-cudnn": "10", "same": "1"}, "accelerators": []}
    assert differ.environments(then, now) == [
        ("accelerators", "2 x A", "none"),
        ("nvidia-cudnn", "9", "10"),
        ("torch", "not installed", "2"),
        ("zlib", "1", "not installed"),
    ]
    assert differ.environments({"packages": ["x"]}, json.loads(json.dumps(now))) == [] == differ.environments({}, now)
