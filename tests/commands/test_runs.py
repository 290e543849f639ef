import csv
import io
import json
import os
import platform
import re
import sys
import tarfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from filelock import FileLock

from boltlab import runs
from boltlab.ground.errors import UserError
from boltlab.runs import index as history
from boltlab.runs import manage as runs_manage
from boltlab.runs import table as runs_table


def make_run(run, /, config=None, verb="train", **summary):
    """A run folder under `logs` as training leaves it."""
    folder = Path("logs") / verb / run
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "best.ckpt").write_bytes(os.fsencode(run) * 1000)
    config = {"seed": 0, "mode": "max", "name": None, "tags": [], **(config or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    summary = {"status": "finished", "started": 1.7e9, "data": "mnist", "model": "lenet", **summary}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def make_sweep(name, count, kept="jobs.json", **summary):
    for number in range(count):
        make_run(f"{name}/{number}", **summary)
    (Path("logs/train") / name / kept).write_text("{}")
    return Path("logs/train") / name


def sgd(lr, seed=0, **more):
    return {"seed": seed, "optimizer": {"_target_": "torch.optim.SGD", "lr": lr}, "data": {"seed": seed}, **more}


OPTIONS = SimpleNamespace(log_dir="logs", verb="train", yes=True)  # as `compose` gives them


def printed(out):
    """The first word of each line of a table but its head."""
    return [line.split()[0] for line in out.splitlines()[1:] if line.startswith(" ")]


@pytest.mark.slow
def test_runs_lists_the_newest_first_with_its_status(boltlab):
    code, out, _ = boltlab("runs")
    assert code == 0 and "no run yet" in out
    quick = ("model=linear", "trainer.max_epochs=1", "logger=csv")
    assert boltlab("train", *quick, "name=first")[0] == 0
    assert boltlab("train", *quick, "name=second", "optimizer=sgd", "optimizer.lr=1e30", "scheduler=constant")[0] == 1
    code, out, _ = boltlab("runs")
    lines = [line for line in out.splitlines() if "digits" in line]
    assert code == 0 and len(lines) == 2
    assert "second" in lines[0] and "failed" in lines[0]
    assert "first" in lines[1] and "finished" in lines[1] and "linear" in lines[1]
    accuracy = runs.read_summary(sorted(runs.folders("logs"), key=lambda f: "first" not in f.name)[0])["best"][
        "val_acc"
    ]
    assert f"val_acc {accuracy:.4f}" in lines[1]
    assert "second" in boltlab("runs", "limit=1")[1] and "first" not in boltlab("runs", "limit=1")[1]


@pytest.mark.slow
def test_a_run_that_was_killed_is_told_from_one_that_runs(boltlab):
    assert boltlab("train", "model=linear", "trainer.max_epochs=1", "logger=csv")[0] == 0
    folder = next(runs.folders("logs"))
    assert "epoch 1 " in boltlab("runs")[1]
    summary = runs.read_summary(folder)
    (folder / "summary.json").write_text(json.dumps({"started": summary["started"], "status": "running", "step": 7}))
    out = boltlab("runs")[1]
    assert "killed" in out and "step 7 " in out
    runs.write_summary(folder, pid=os.getpid())
    (folder / ".lock").unlink()  # a run of before there were locks
    assert "running" in boltlab("runs")[1]
    with runs.lock(folder):  # the lock tells it, whoever has the pid by now
        assert "running" in boltlab("runs")[1]
    assert "killed" in boltlab("runs")[1]


def test_a_summary_that_is_not_as_it_should_be_is_no_crash(boltlab):
    folder = Path("logs/train/odd")
    folder.mkdir(parents=True)
    (folder / "config.yaml").touch()
    assert "odd" in boltlab("runs")[1]
    for summary in ([], {"best": 3, "test": {"test_acc": "high"}, "started": None, "seconds": "x", "epochs": {}}):
        (folder / "summary.json").write_text(json.dumps(summary))
        code, out, _ = boltlab("runs")
        assert code == 0 and "odd" in out and "unknown" in out


# ---------------------------------------------------------------- the table


@pytest.fixture
def three():
    make_run("a", sgd(0.1, 3), best={"val_acc": 0.5}, test={"test_acc": 0.9, "test_loss": 0.3}, started=1.70e9)
    make_run("b", sgd(0.01), best={"val_acc": 0.75}, test={"test_acc": 0.8, "test_loss": 0.1}, started=1.71e9)
    make_run("c", sgd(0.001), data="digits", status="failed", reason="no space", started=1.72e9, seconds=3725)


def test_filters_and_order(boltlab, three):
    assert printed(boltlab("runs")[1]) == ["c", "b", "a"]
    assert printed(boltlab("runs", "data=mnist")[1]) == ["b", "a"]
    assert printed(boltlab("runs", "best_val_acc>0.5", "optimizer.lr<=0.1")[1]) == ["b"]
    assert printed(boltlab("runs", "seed!=3", "status!=failed")[1]) == ["b"]
    for sort, order in (
        ("best_val_acc", "bac"),  # the largest first; what has none at the end
        ("+best_val_acc", "abc"),
        ("-best_val_acc", "bac"),
        ("test_loss", "bac"),
        ("-test_loss", "abc"),
        ("optimizer.lr", "cba"),
        ("-optimizer.lr", "abc"),
        ("data", "cba"),
        ("+started", "abc"),
        ("started", "cba"),
    ):
        code, out, err = boltlab("runs", f"sort={sort}")
        assert (code, err) == (0, "") and "".join(printed(out)) == order, sort
    make_run("d", {"mode": "min"}, best={"val_score": 1.0})
    make_run("e", {"mode": "min"}, best={"val_score": 2.0})
    assert printed(boltlab("runs", "best_val_score>0", "sort=best_val_score")[1]) == ["d", "e"]


def test_the_config_keys_in_which_runs_differ_are_columns(boltlab, three):
    head, *lines = boltlab("runs")[1].splitlines()
    assert head.split()[:5] == ["run", "data", "model", "optimizer.lr", "seed"]
    assert lines[0].split()[3:5] == ["0.001", "0"] and "1h02m" in lines[0]
    assert "optimizer.lr" not in boltlab("runs", "run=a")[1]


def test_a_column_tells_something():
    common = {"run_dir": "/x", "log_dir": "a", "logger": {"csv": {"dir": "a"}}, "class": "x"}
    for number in range(4):
        lr = 0.1 * number
        config = sgd(lr, number, **common)
        config |= {"model": {"optimizer": {"lr": lr}, "net": {"width": number % 2}}, "name": f"n{number}"}
        config["data"] |= {"mean": [number], "root": f"/data/{number}", "batch_size": 8 * (number // 2)}
        config["trainer"] = {"max_epochs": number, "devices": [1, 2, 1, 2][number], "dir": "${run_dir}" * number}
        make_run(str(number), config)
    wanted = ["data.batch_size", "optimizer.lr", "trainer.devices", "trainer.max_epochs"]
    assert runs_table.differing(history.rows("logs")) == wanted  # the seed says the same as max_epochs here


def test_of_keys_that_tell_the_same_runs_apart_one_is_among_the_first_columns():
    for seed, (kind, decay) in enumerate((("SGD", 0.5), ("SGD", 0.5), ("Adam", 0.1), ("Adam", 0.1))):
        make_run(
            str(seed), {"seed": seed, "optimizer": {"_target_": kind, "weight_decay": decay}, "k": [1, 2, 2, 1][seed]}
        )
    assert runs_table.differing(history.rows("logs")) == ["optimizer._target_", "k", "seed", "optimizer.weight_decay"]


def test_columns_may_be_chosen(boltlab, three):
    for words in ("columns=[run,optimizer.lr,best_val_acc]", "columns=run,optimizer.lr,best_val_acc"):
        code, out, _ = boltlab("runs", words, "data=mnist")
        assert code == 0
        assert [line.split() for line in out.splitlines()] == [
            ["run", "optimizer.lr", "best_val_acc"],
            ["b", "0.01", "0.7500"],
            ["a", "0.1", "0.5000"],
        ]
    code, _, err = boltlab("runs", "columns=[run,optimizer.lrr,best_val_ac]")
    assert code == 2 and err.count("did you mean") == 2 and "'optimizer.lr'" in err and "'best_val_acc'" in err


def test_a_narrow_terminal_gets_fewer_columns():
    make_run("a", sgd(0.1), best={"val_acc": 0.5})
    make_run("b", sgd(0.2), best={"val_acc": 0.5})
    groups = [[row] for row in history.rows("logs")]
    wide, table = runs_table.cells(groups, None, width=500)
    assert "optimizer.lr" in wide and [row[wide.index("optimizer.lr")] for row in table] == ["0.2", "0.1"]
    narrow, table = runs_table.cells(groups, None, width=60)
    assert narrow == [name for name in wide if name != "optimizer.lr"] and {len(row) for row in table} == {len(narrow)}


def test_a_table_says_how_many_are_left_out(boltlab):
    for number in range(25):
        make_run(f"r{number:02}", started=1.7e9 + number)
    out = boltlab("runs")[1]
    assert len(printed(out)) == 20 and out.splitlines()[-1] == "20 of 25: limit=0 shows all"
    assert len(printed(boltlab("runs", "limit=0")[1])) == 25
    assert len(boltlab("runs", "format=csv")[1].splitlines()) == 26
    assert len(boltlab("runs", "format=csv", "limit=3")[1].splitlines()) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["limt=3"], "did you mean 'limit'?"),
        (["dta=mnist"], "did you mean 'data'?"),
        (["best_val_ac>0.9"], "did you mean 'best_val_acc'?"),
        (["sort=best_val_ac"], "did you mean 'best_val_acc'?"),
        (["sort=best"], "did you mean 'best_val_acc'?"),
        (["mnist"], "neither a filter nor an action"),
        (["dif", "a", "b"], "did you mean 'diff'?"),
        (["format=xml"], "csv"),
        (["best_val_acc>high"], "no number"),
    ],
)
def test_a_word_that_means_nothing(boltlab, three, words, said):
    code, out, err = boltlab("runs", *words)
    assert code == 2 and out == "" and said in err


def test_a_mistyped_key_where_there_is_no_run_yet(boltlab):
    code, _, err = boltlab("runs", "limt=3")
    assert code == 2 and "did you mean 'limit'?" in err
    code, out, _ = boltlab("runs", "data=mnist")
    assert code == 0 and "no run yet" in out


def test_filters_come_through_the_command_line(boltlab_process, three):
    done = boltlab_process("runs", "best_val_acc>=0.5", "optimizer.lr<0.1", "name!~x", "format=json")
    assert done.returncode == 0 and done.stderr == ""
    assert [row["run"] for row in json.loads(done.stdout)] == ["b"]


# ---------------------------------------------------------------- several seeds in one row


@pytest.fixture
def seeds():
    for seed, value in ((1, 0.90), (2, 0.94), (3, 0.98)):
        make_run(
            f"good{seed}",
            sgd(0.1, seed, name=f"n{seed}", tags=[str(seed)]),
            best={"val_acc": value},
            test={"test_acc": value / 2},
            started=1.7e9 + seed,
            seconds=10 * seed,
            epochs=5,
        )
    make_run("good4", sgd(0.1, 4, tags=["2", "x"]), status="failed", best={"val_acc": 0.0}, started=1.7e9)
    make_run("other", sgd(0.2, 1), best={"val_acc": 0.5}, started=1.6e9)


def test_seeds_are_one_row_with_mean_and_deviation(boltlab, seeds):
    assert len(printed(boltlab("runs")[1])) == 5  # each a folder
    out = boltlab("runs", "seeds=true")[1]
    first, second = out.splitlines()[1:]
    # 0.90, 0.94, 0.98: the mean is 0.94, the squares of the differences 0.0016 + 0 + 0.0016, half of that 0.04²
    assert "val_acc 0.9400 ± 0.0400 (3)" in first and "test_acc 0.4700 ± 0.0200 (3)" in first
    assert "3 finished, 1 failed" in first and "good3 +3" in first and "20.0s" in first and "epoch 5" in first
    assert "val_acc 0.5000 " in second and "other " in second and "±" not in second
    assert "0.1" in first.split() and "0.2" in second.split()  # the learning rates
    assert "1,2,3,x" in first.split()  # all their tags
    one = boltlab("runs", "seeds=true", "seed=1", "optimizer.lr=0.1")[1]
    assert "val_acc 0.9000 " in one and "±" not in one
    two = boltlab("runs", "seeds=true", "seed>2", "optimizer.lr=0.1")[1]
    assert "val_acc 0.9800 (1)" in two and "1 finished, 1 failed" in two
    none = boltlab("runs", "seeds=true", "status=failed")[1]
    assert "failed" in none and "val_acc 0.0000" in none


def test_a_seed_that_was_trained_twice_counts_once(boltlab, seeds):
    make_run("again", sgd(0.1, 3), best={"val_acc": 0.98}, started=1.71e9, reproduces="good3")
    assert "val_acc 0.9400 ± 0.0400 (3)" in boltlab("runs", "seeds=true")[1]
    assert json.loads(boltlab("runs", "seeds=true", "format=json")[1])[0]["n"] == 3


def test_seeds_are_exported_unrounded(boltlab, seeds):
    rows = json.loads(boltlab("runs", "seeds=true", "format=json", "sort=best_val_acc")[1])
    assert [row["run"] for row in rows] == ["good3", "other"]
    assert rows[0]["runs"] == ["good3", "good2", "good1", "good4"] and rows[0]["n"] == 3
    assert rows[0]["best_val_acc"] == pytest.approx(0.94, abs=1e-15)
    assert rows[0]["best_val_acc_std"] == pytest.approx(0.04, abs=1e-15)
    assert rows[0]["seed"] == [1, 2, 3, 4] and rows[0]["optimizer.lr"] == 0.1
    assert rows[1]["n"] == 1 and rows[1]["best_val_acc"] == 0.5 and rows[1]["best_val_acc_std"] is None
    table = list(csv.DictReader(io.StringIO(boltlab("runs", "seeds=true", "format=csv", "sort=-best_val_acc")[1])))
    assert float(table[0]["best_val_acc_std"]) == rows[0]["best_val_acc_std"] and table[1]["best_val_acc_std"] == ""


def test_numbers_that_have_no_mean_are_no_crash(boltlab):
    for number, value in enumerate((float("nan"), float("inf"), 1e308, -1e308, float("-inf"))):
        make_run(str(number), sgd(0.1, number), best={"val_loss": value})
    assert "± nan (5)" in boltlab("runs", "seeds=true")[1]
    assert json.loads(boltlab("runs", "seeds=true", "format=json")[1])[0]["best_val_loss"] == "nan"
    assert len(printed(boltlab("runs", "sort=best_val_loss")[1])) == 5


# ---------------------------------------------------------------- formats


def test_csv_and_json_are_complete_and_unrounded(boltlab):
    value = 0.1 + 0.2
    config = sgd(1e-7, 3, betas=[0.9, 0.999], nothing=None, flag=True, text='a,"b"\nc', none=float("inf"))
    make_run("one", config, best={"val_acc": value}, test={"test_acc": float("nan")}, reason="x | y")
    make_run("two", {"only_here": 1})
    rows = {row["run"]: row for row in json.loads(boltlab("runs", "format=json")[1])}
    one = history.read(Path("logs/train/one"))
    assert set(rows["one"]) == {*one.values, *one.config} and "only_here" not in rows["one"]
    assert rows["one"]["best_val_acc"] == value and rows["one"]["optimizer.lr"] == 1e-7
    assert rows["one"]["betas"] == [0.9, 0.999] and rows["one"]["flag"] is True and rows["one"]["nothing"] is None
    assert rows["one"]["test_acc"] == "nan" and rows["one"]["none"] == "inf" and rows["one"]["text"] == 'a,"b"\nc'
    code, out, err = boltlab("runs", "format=csv")
    assert (code, err) == (0, "")
    table = {row["run"]: row for row in csv.DictReader(io.StringIO(out, newline=""))}
    assert set(table["one"]) == {*rows["one"], "only_here"} and table["one"]["only_here"] == ""
    assert float(table["one"]["best_val_acc"]) == value and float(table["one"]["optimizer.lr"]) == 1e-7
    assert json.loads(table["one"]["betas"]) == [0.9, 0.999] and table["one"]["flag"] == "true"
    assert table["one"]["text"] == 'a,"b"\nc' and table["one"]["nothing"] == "" and table["one"]["reason"] == "x | y"
    chosen = json.loads(boltlab("runs", "format=json", "columns=optimizer.lr,best,run,time", "run=one")[1])
    assert chosen == [{"optimizer.lr": 1e-7, "best_val_acc": value, "run": "one"}]


def test_markdown_is_a_table(boltlab):
    make_run("one", best={"val_acc": 0.5}, name="x|y", model="<img src=x>", data="[a](http://b)")
    out = boltlab("runs", "format=md", "columns=run,name,model,data,best")[1]
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in out.splitlines()]
    plain = [[re.sub(r"\\(.)", r"\1", cell.strip()) for cell in line] for line in lines]
    assert plain == [
        ["run", "name", "model", "data", "best"],
        ["---"] * 5,
        ["one", "x|y", "<img src=x>", "[a](http://b)", "val_acc 0.5000"],
    ]
    assert "\\<img" in out and "\\[a" in out


def test_where_nothing_is_left_the_output_stays_readable(boltlab, three):
    code, out, err = boltlab("runs", "data=nothing", "format=json")
    assert code == 0 and json.loads(out) == [] and "none of the 3 runs" in err
    code, out, err = boltlab("runs", "data=nothing", "format=csv")
    assert code == 0 and out == "run\n" and "none of the 3 runs" in err
    code, out, err = boltlab("runs", "data=nothing")
    assert code == 0 and "none of the 3 runs" in out and err == ""
    code, out, err = boltlab("runs", "log_dir=elsewhere", "format=json")
    assert code == 0 and out == "[]\n" and "no run yet" in err


def test_what_a_run_says_is_no_markup_and_moves_no_cursor(boltlab):
    folder = make_run("odd", {"optimizer": {"lr": "[red]\x1b[2J"}}, name="[bold]x[/]", status="[/red]")
    make_run("even", {"optimizer": {"lr": 1}})
    (folder / "marks.json").write_text(json.dumps({"note": "a\x1b[31mb\nc", "tags": ["[link=x]y[/link]"]}))
    for form in ("table", "md", "csv", "json"):
        code, out, err = boltlab("runs", f"format={form}")
        assert code == 0 and err == "" and "\x1b" not in out and "odd" in out
    out = boltlab("runs", "columns=[run,name,status,note,tags,optimizer.lr]")[1]
    assert "[bold]x[/]" in out and "[/red]" in out and "[link=x]y[/link]" in out and "[red]" in out
    assert len(out.splitlines()) == 3
    assert boltlab("runs", "diff", "odd", "even")[0] == 0


@pytest.mark.skipif(sys.platform == "win32", reason="head")
def test_head_is_no_error(tmp_path):
    import subprocess

    for number in range(300):
        make_run(f"r{number}", {f"k{index}": index for index in range(50)})
    command = f"set -o pipefail; {sys.executable} -m boltlab runs format=json | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "[\n")


# ---------------------------------------------------------------- tags and notes


def test_tags_and_notes_are_shown_filtered_and_exported(boltlab):
    make_run("one", {"tags": ["first"]})
    make_run("two")
    assert boltlab("runs", "tag", "one", "good", "a=b")[1] == "one  first, good, a=b\n"
    assert boltlab("runs", "tag", "one", "-first", "good")[1] == "one  good, a=b\n"
    assert boltlab("runs", "tag", "one")[1] == "one  good, a=b\n"
    assert boltlab("runs", "note", "one", "lr=0.1 was", "too high")[1] == "one  lr=0.1 was too high\n"
    assert boltlab("runs", "note", "two", "-5 % worse")[0] == 0
    assert boltlab("runs", "note", "two", "limit=0 was too few")[1] == "two  limit=0 was too few\n"
    assert boltlab("runs", "note", "two", "-5 % worse")[0] == 0
    out = boltlab("runs")[1]
    assert "good,a=b" in out and "lr=0.1 was too high" in out and "-5 % worse" in out
    assert printed(boltlab("runs", "tags=good")[1]) == ["one"]
    assert printed(boltlab("runs", "note~worse")[1]) == ["two"]
    rows = {row["run"]: row for row in json.loads(boltlab("runs", "format=json")[1])}
    assert rows["one"]["tags"] == ["good", "a=b"] and rows["two"]["note"] == "-5 % worse" and rows["two"]["tags"] == []
    assert boltlab("runs", "note", "two", "")[1] == "two  no note\n"
    assert boltlab("runs", "tag", "one", "-good", "-a=b")[1] == "one  no tag\n"
    assert boltlab("runs", "note", "one", "")[0] == 0
    assert "note" not in boltlab("runs")[1].splitlines()[0]
    code, _, err = boltlab("runs", "tag", "one", "-gone")
    assert code == 1 and "has no tag 'gone'" in err
    for wrong in (["tag"], ["tag", "one", "a,b"], ["tag", "one", "-"], ["note", "one", "x" * 3000], ["note"]):
        assert boltlab("runs", *wrong)[0] == 2, wrong
    assert boltlab("runs", "tag", "nowhere", "x")[0] == 1


def test_a_sweep_is_tagged_as_a_whole(boltlab):
    make_sweep("sweep_x", 2)
    assert boltlab("runs", "tag", "sweep_x", "old")[1] == "sweep_x/0  old\nsweep_x/1  old\n"
    assert [row.get("tags") for row in history.rows("logs")] == [["old"], ["old"]]


def test_a_run_at_work_and_its_tags_do_not_disturb_each_other():
    folder = make_run("one", status="running")

    def work():
        for step in range(200):
            runs.write_summary(folder, step=step, **{f"k{step}": step})

    def tagging(number):
        for index in range(10):
            runs_manage.tag(["one", f"t{number}-{index}"], OPTIONS)

    threads = [threading.Thread(target=work), *(threading.Thread(target=tagging, args=(n,)) for n in range(3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    summary = runs.read_summary(folder)
    assert summary["step"] == 199 and all(summary[f"k{step}"] == step for step in range(200))
    assert set(history.read(folder).get("tags")) == {f"t{n}-{index}" for n in range(3) for index in range(10)}


# ---------------------------------------------------------------- diff


def test_diff_says_where_two_runs_differ(boltlab):
    a = make_run("a", sgd(0.1, model={"optimizer": {"lr": 0.1}}), test={"test_acc": 0.9})
    b = make_run("b", sgd(0.2, extra=1, model={"optimizer": {"lr": 0.2}}), test={"test_acc": 0.8})
    for folder, version, commit in ((a, "2.0", "abc"), (b, "2.1", "abc")):
        found = {"git_commit": commit, "cpu": "x", "packages": {"torch": version, "same": "1"}, "command": [version]}
        (folder / "environment.json").write_text(json.dumps(found))
    patch = "diff --git a/x.py b/x.py\n--- a/x.py\n+++ b/x.py\n@@ -1 +1 @@\n"
    (a / "git.patch").write_text(f"{patch}+one\n")
    (b / "git.patch").write_text(f"{patch}+two\n")
    code, out, err = boltlab("runs", "diff", "a", "logs/train/b")
    lines = [line.split() for line in out.splitlines()]
    assert (code, err) == (0, "")
    assert ["optimizer.lr", "0.1", "0.2"] in lines and ["extra", "–", "1"] in lines
    assert ["torch", "2.0", "2.1"] in lines and ["test_acc", "0.9", "0.8"] in lines
    assert "model.optimizer.lr" not in out and "same" not in out and "git_commit" not in out
    assert "x.py: a +1 -0, b +1 -0" in out and ["a", "+one"] in lines and ["b", "+two"] in lines
    assert "equal" not in out  # whether the data are is not known
    (b / "git.patch").write_bytes(b"")
    assert "x.py: a +1 -0, b as committed" in boltlab("runs", "diff", "a", "b")[1]
    for folder, samples in ((a, 8), (b, 9)):
        (folder / "data.json").write_text(json.dumps({"splits": {"train": {"samples": samples, "labels": "x"}}}))
    assert "  train: 8 samples in a, in b 9" in boltlab("runs", "diff", "a", "b")[1]
    code, out, _ = boltlab("runs", "diff", "a", "a")
    assert code == 0 and out.splitlines()[-1] == "equal: config, environment, data, uncommitted changes"


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff\xfe", b'{"packages": [1], "cpu": {"a": ["\\u001b[2J"]}}'])
def test_diff_of_what_is_broken_is_no_crash(boltlab, content):
    a, b = make_run("a"), make_run("b")
    for name in ("environment.json", "git.patch", "summary.json", "config.yaml"):
        (a / name).write_bytes(content)
    code, out, err = boltlab("runs", "diff", "a", "b")
    assert (code, err) == (0, "") and "\x1b" not in out
    assert ("that of a cannot be read" in out) is not content.startswith(b"{")
    (b / "environment.json").symlink_to("/dev/zero")
    assert boltlab("runs", "diff", "a", "b")[0] == 0


@pytest.mark.slow
def test_a_job_is_named_as_the_table_names_it(boltlab):
    make_sweep("2026_sweep_x", 11)
    make_sweep("2026_sweep_y", 2)
    assert "2026_sweep_x/1 " in boltlab("runs", "diff", "2026_sweep_x/1", "x/10")[1].replace("\n", " ")
    assert "2026_sweep_y/1 " in boltlab("runs", "diff", "y/1", "y/0")[1].replace("\n", " ")
    assert boltlab("runs", "tag", "2026_sweep_x/1", "one")[0] == 0
    assert [row.run for row in history.rows("logs") if row.get("tags")] == ["2026_sweep_x/1"]
    code, _, err = boltlab("runs", "diff", "x/1", "y/0")
    assert code == 1 and "fits 2 runs" in err


def test_diff_takes_two(boltlab, three):
    assert boltlab("runs", "diff", "a")[0] == 2 and boltlab("runs", "diff", "a", "b", "c")[0] == 2
    code, _, err = boltlab("runs", "diff", "a", "zzz")
    assert code == 1 and "zzz" in err


# ---------------------------------------------------------------- rm


def everything():
    return sorted(str(path) for path in Path().rglob("*") if not path.name.startswith("."))


def test_rm_removes_runs_and_sweeps(boltlab):
    for name in ("a", "b", "c"):
        make_run(name)
    make_sweep("sweep_x", 2)
    make_sweep("sweep_y", 2, "sweep.json")  # of `boltlab sweep`
    (Path("logs/train/sweep_y/claims")).mkdir()
    with FileLock("logs/train/sweep_y/claims/first"):  # between two trials
        code, _, err = boltlab("runs", "rm", "weep_y", "yes=true")
        assert code == 1 and "sweep_y is at work: let the sweep end first" in err and len(history.rows("logs")) == 7
    boltlab("runs")
    code, out, err = boltlab("runs", "rm", "a", "logs/train/b", "sweep_x", "logs/train/sweep_y/0", "yes=true")
    assert code == 0 and "removed 5 runs" in out, err
    assert [row.run for row in history.rows("logs")] == ["sweep_y/1", "c"]
    assert sorted(path.name for path in Path("logs").iterdir()) == [".index-train.json", ".removing", "train"]
    assert sorted(path.name for path in Path("logs/train").iterdir()) == ["c", "sweep_y"]


def test_actions_take_filters_in_place_of_names(boltlab):
    for name in ("a", "b", "c"):
        make_run(name, status="finished" if name == "a" else "failed", data="x=y" if name == "c" else "mnist")
    make_run("named=so")
    before = everything()
    code, _, err = boltlab("runs", "rm", "status=gone", "yes=true")
    assert code == 1 and "none of the 4 runs under logs/train passes status=gone" in err and everything() == before
    code, _, err = boltlab("runs", "rm", "stats=failed", "yes=true")
    assert code == 2 and "did you mean 'status'?" in err and everything() == before
    assert boltlab("runs", "tag", "status=failed", "a=b")[1] == "c  a=b\nb  a=b\n"
    code, out, _ = boltlab(
        "runs", "rm", "status=failed", "data=mnist", "named=so", "yes=true"
    )  # all filters, and a name
    assert code == 0 and "removed 2 runs" in out and [row.run for row in history.rows("logs")] == ["c", "a"]
    with runs.lock(make_run("busy", status="running")):
        code, _, err = boltlab("runs", "rm", "status!=gone", "yes=true")
        assert code == 1 and "busy is running" in err and len(history.rows("logs")) == 3


def test_rm_asks_on_a_terminal_and_wants_a_word_elsewhere(boltlab, monkeypatch):
    make_run("a")
    before = everything()
    code, _, err = boltlab("runs", "rm", "a")
    assert code == 2 and "yes=true removes 1 run for good" in err and everything() == before

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for answer in ("n\n", "", "\n", "nonsense\n"):
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        code, out, _ = boltlab("runs", "rm", "a")
        assert code == 0 and "[y/N]" in out and "nothing was removed" in out and everything() == before
    monkeypatch.setattr(sys, "stdin", Terminal("y\n"))
    assert boltlab("runs", "rm", "a")[0] == 0 and not Path("logs/train/a").exists()


@pytest.mark.parametrize("action", ["rm", "archive"])
def test_what_is_no_run_of_the_log_folder_is_not_touched(boltlab, tmp_path, action):
    make_run("good")
    outside = tmp_path / "outside" / "train" / "run"
    outside.parent.mkdir(parents=True)
    make_run("moved").rename(outside)
    Path("logs/train/link").symlink_to(outside)
    Path("logs/train/inner").symlink_to(Path("logs/train/good").resolve())
    Path("logs/train/plain").mkdir()
    Path("logs/train/plain/file").write_text("x")
    Path("logs/train/half/job").mkdir(parents=True)
    Path("logs/train/half/jobs.json").write_text("{}")
    Path("logs/train/nest/a/b").mkdir(parents=True)
    (Path("logs/train/nest/a/b") / "config.yaml").write_text("a: 1")
    Path("config.yaml").write_text("a: 1")
    Path("logs/config.yaml").write_text("a: 1")
    Path("logs/train/config.yaml").write_text("a: 1")
    before = everything()
    for word in (
        "logs",
        "logs/train",
        ".",
        "..",
        "/",
        "logs/train/..",
        "logs/train/good/..",
        "logs/train/link",
        "link",
        "inner",
        "logs/train/plain",
        "logs/train/half",
        "logs/train/nest",
        "logs/train/nest/a/b",
        "logs/train/good/checkpoints",
        "logs/train/good/config.yaml",
        str(outside),
        "logs/train/../../outside/train/run",
        "nowhere",
        "",
    ):
        with pytest.raises(UserError):
            runs_manage.ACTIONS[action](["good", word], OPTIONS)
        assert everything() == before, word
    code, _, err = boltlab("runs", action, "good", "logs/train", "yes=true")
    assert code == 1 and "logs/train is no folder of a run in the log folder" in err and everything() == before
    assert boltlab("runs", action, "yes=true")[0] == 2


@pytest.mark.parametrize("action", ["rm", "archive"])
def test_a_run_at_work_is_not_touched(boltlab, action):
    folder, other = make_run("busy", status="running"), make_run("idle")
    sweep = make_sweep("sweep_x", 2)
    runs.write_summary(sweep / "1", status="running", pid=os.getpid(), host=platform.node())
    with runs.lock(folder):
        before = everything()
        code, _, err = boltlab("runs", action, "idle", "busy", "yes=true")
        assert code == 1 and "busy is running: let it end first" in err and everything() == before
    code, _, err = boltlab("runs", action, "sweep_x", "yes=true")
    assert code == 1 and "sweep_x/1 is running" in err and everything() == before
    with runs.lock(other), pytest.raises(UserError, match="another process"):  # finished, but somebody is at it
        runs_manage._held([other])
    assert boltlab("runs", action, "busy", "yes=true")[0] == 0  # it was killed
    assert not folder.exists() and other.exists()


def test_rm_follows_no_link_inside_a_run(boltlab, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    (make_run("a") / "wandb").symlink_to(kept)
    assert boltlab("runs", "rm", "a", "yes=true")[0] == 0
    assert (kept / "file").read_text() == "x" and not Path("logs/train/a").exists()


def test_part_of_a_name_that_several_have_removes_none(boltlab):
    make_run("run-one")
    make_run("run-two")
    before = everything()
    code, _, err = boltlab("runs", "rm", "run", "yes=true")
    assert code == 1 and "fits 2 runs" in err and everything() == before


# ---------------------------------------------------------------- archive


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


@pytest.mark.parametrize("name", ["a", "sweep_x", "sweep_x/1"])
def test_an_archived_run_comes_back_as_it_was(boltlab, name):
    make_run("a", best={"val_acc": 0.5})
    make_sweep("sweep_x", 2)
    folder = Path("logs/train") / name
    (folder / "latest").symlink_to("checkpoints/best.ckpt")
    os.link(folder / "jobs.json" if name == "sweep_x" else folder / "config.yaml", folder / "second")
    before, rows = contents(folder), [row.values for row in history.rows("logs")]
    others = [row.run for row in history.rows("logs") if not f"{row.run}/".startswith(f"{name}/")]
    code, out, err = boltlab("runs", "archive", str(folder))
    assert code == 0, err
    assert not folder.exists() and f"logs/archive/train/{name}.tar.gz" in out
    assert [row.run for row in history.rows("logs")] == others
    command = out.splitlines()[-1].partition("bring it back: ")[2].split()
    assert command[:2] == ["tar", "-xzf"] and command[3] == "-C"
    with tarfile.open(command[2]) as packed:
        packed.extractall(command[4], filter="fully_trusted")
    now = contents(folder)
    assert {k: v for k, v in now.items() if not k.endswith(".lock")} == before
    assert [row.values for row in history.rows("logs")] == rows


def test_a_run_goes_only_when_its_archive_reads_back_the_same(boltlab, monkeypatch):
    folder = make_run("a")
    real = tarfile.TarFile.add

    def broken(self, name, *arguments, **options):
        real(self, name, *arguments, **options)
        if Path(name) == folder.resolve():  # all is packed
            (folder / "checkpoints" / "best.ckpt").write_bytes(b"changed meanwhile")

    monkeypatch.setattr(tarfile.TarFile, "add", broken)
    code, _, err = boltlab("runs", "archive", "a")
    assert code == 1 and "changed while it was archived" in err and "best.ckpt" in err
    assert (folder / "checkpoints" / "best.ckpt").exists() and list(Path("logs/archive/train").iterdir()) == []

    def full(self, name, *arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tarfile.TarFile, "add", full)
    code, _, err = boltlab("runs", "archive", "a")
    assert code == 1 and "No space left on device" in err
    assert (folder / "config.yaml").exists() and list(Path("logs/archive/train").iterdir()) == []


@pytest.mark.parametrize("action", ["rm", "archive"])
def test_what_a_command_that_was_killed_has_left_goes(boltlab, action):
    make_run("a")
    half = Path("logs/archive/train/.b.tar.gz-0a1b2c")
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    Path("logs/.removed-01234567/checkpoints").mkdir(parents=True)
    code, _, err = boltlab("runs", action, "a", "yes=true")
    assert code == 0, err
    assert not half.exists() and not list(Path("logs").glob(".removed-*")) and not Path("logs/train/a").exists()


ODD = "a\x1b[2Jb\rc\udcff"


@pytest.mark.parametrize(
    "words",
    [
        "rm status=finished",
        "archive status=finished",
        "rm a",
        "diff a a",
        "archive a log_dir=logs",
        "tag a x",
        "note a x",
    ],
)
def test_no_name_of_a_folder_moves_the_cursor(boltlab, words):
    make_run(ODD, status="finished")
    make_run(f"{ODD}2", status="finished")
    _, out, err = boltlab("runs", *words.split())
    assert "\ufffd[2Jb" in out + err and (out + err).replace("\n", "").isprintable()


def test_no_cell_of_a_csv_is_a_formula(boltlab):
    cells = {"name": "=1+1", "data": "@SUM(A1)", "model": "+x", "reason": "-2+3", "host": "\tx", "start_of": "-1e-3"}
    make_run("a", note="plain", best={"val_acc": -0.5}, **cells)
    row = next(csv.DictReader(boltlab("runs", "format=csv")[1].splitlines()))
    assert row["best_val_acc"] == "-0.5" and row["start_of"] == "-1e-3"
    assert [row[key] for key in ("name", "data", "model", "reason")] == ["'=1+1", "'@SUM(A1)", "'+x", "'-2+3"]
    assert json.loads(boltlab("runs", "format=json")[1])[0]["name"] == "=1+1"


def test_no_archive_is_written_over(boltlab):
    make_run("a")
    target = Path("logs/archive/train/a.tar.gz")
    target.parent.mkdir(parents=True)
    target.write_text("an older one")
    code, _, err = boltlab("runs", "archive", "a")
    assert code == 1 and "is there already" in err and target.read_text() == "an older one"
    assert Path("logs/train/a/config.yaml").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_what_no_archive_can_hold_stays(boltlab):
    os.mkfifo(make_run("b") / "pipe")
    code, _, err = boltlab("runs", "archive", "b")
    assert code == 1 and "pipe is no file that can be archived" in err and Path("logs/train/b/config.yaml").exists()
