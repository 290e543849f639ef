import json
import math
import multiprocessing
import os
import platform
import random
import subprocess
import sys

import pytest
import yaml
from omegaconf import OmegaConf
from waiting import HANG

from boltlab import runs
from boltlab.config.compose import compose
from boltlab.ground import files
from boltlab.ground.errors import ConfigError
from boltlab.runs import index as history
from boltlab.runs.filters import select


def make_run(run, /, config=None, marks=None, verb="train", **summary):
    """A run folder under `logs` as training leaves it."""
    folder = history.Path("logs") / verb / run
    folder.mkdir(parents=True, exist_ok=True)
    config = {"seed": 0, "name": None, "tags": [], **(config or {})}
    runs.write_json(folder / "summary.json", {"status": "finished", "started": 1.7e9, **summary})
    runs.write_whole(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    if marks is not None:
        (folder / "marks.json").write_text(json.dumps(marks))
    return folder


def sgd(lr, seed=0, **more):
    return {"seed": seed, "optimizer": {"_target_": "torch.optim.SGD", "lr": lr}, "data": {"seed": seed}, **more}


def read_files(monkeypatch):
    """The files that are read from now on."""
    seen, real = [], files.read_bytes

    def read(path, most):
        if not path.name.startswith(".index"):
            seen.append(path.parent.name)
        return real(path, most)

    monkeypatch.setattr(files, "read_bytes", read)
    return seen


def names(found):
    return [row.run for row in found]


def test_a_row_says_what_summary_config_and_marks_say():
    config = sgd(1e-5, layers=[{"size": 3}, {"size": 4}], betas=[0.9, 0.999], nothing={}, tags=["a"])
    make_run(
        "one",
        config,
        {"tags": ["a", "good"], "note": "try again"},
        data="mnist",
        model="lenet",
        best={"val_acc": 0.5},
        final={"train_loss": 0.25},
        test={"test_acc": 0.75, "acc": 1},
        seconds=12.5,
    )
    (row,) = history.rows("logs")
    assert row.folder == history.Path("logs/train/one") and row.started == 1.7e9 and row.status == "finished"
    wanted = {"best_val_acc": 0.5, "final_train_loss": 0.25, "test_acc": 1, "data": "mnist", "seconds": 12.5}
    wanted |= {"tags": ["a", "good"], "note": "try again", "run": "one", "model": "lenet"}
    assert wanted.items() <= row.values.items()
    assert row.config["optimizer.lr"] == row.get("optimizer.lr") == 1e-5
    assert row.config["layers.1.size"] == 4 and row.config["betas"] == [0.9, 0.999]
    assert row.config["tags"] == ["a"] and row.get("tags") == ["a", "good"]
    assert row.get("no.such", 7) == 7 and "no.such" not in row and "best_val_acc" in row and "seed" in row


def test_the_newest_is_first_and_the_jobs_of_a_sweep_are_among_them():
    for name, started in (("b", 2.0), ("a", 3.0), ("sweep/0", 5.0), ("sweep/1", 1.0)):
        make_run(name, started=started)
    make_run("other", verb="eval", started=9.0)
    assert names(history.rows("logs")) == ["sweep/0", "a", "b", "sweep/1"]
    assert [row.folder for row in history.rows("logs")] == list(runs.folders("logs"))
    assert names(history.rows("logs", "eval")) == ["other"]
    assert history.rows("nowhere") == [] and not history.Path("nowhere").exists()


def test_numbers_are_read_as_training_reads_them():
    texts = "1e-3 1.0e-05 .5 1_000 0x10 08 12:30 2001-01-01 true null nan .nan .inf 'x' '1.5' 3 -2.5 1. yes"
    texts = texts.split()
    folder = make_run("one")
    (folder / "config.yaml").write_text("".join(f"k{number}: {text}\n" for number, text in enumerate(texts)))
    wanted = runs.load_config(folder, own=True)
    (row,) = history.rows("logs")
    for key, value in row.config.items():
        assert repr(value) == repr(wanted[key]), key


def flat(node, path=""):
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", "{}" if value == {} else value


@pytest.mark.parametrize("words", [["data=cifar10", "model=resnet18"], ["data=mnist", "model=vit_tiny"]], ids=str)
def test_a_config_of_ours_is_read_as_training_reads_it(words):
    folder = make_run("one")
    runs.write_config(folder, compose("train", [*words, "tags=[a,'b: c','#d']", "name='1e3'"], check=False).config)
    wanted = OmegaConf.to_container(runs.load_config(folder, own=True), resolve=False)
    wanted["run_dir"] = "${run_dir}"  # which loading fills in
    (row,) = history.rows("logs")
    assert row.config == dict(flat(wanted)) and len(row.config) > 80


def test_what_has_not_changed_is_not_read_again(monkeypatch):
    for number in range(3):
        make_run(f"run{number}", sgd(0.1 * number))
    first = history.rows("logs")
    seen = read_files(monkeypatch)
    again = history.rows("logs")
    assert seen == [] and [(r.run, r.values, r.config) for r in again] == [(r.run, r.values, r.config) for r in first]
    make_run("run1", sgd(0.25), best={"val_acc": 0.5})
    by_name = {row.run: row for row in history.rows("logs")}
    assert set(seen) == {"run1"}
    assert by_name["run1"].get("optimizer.lr") == 0.25 and by_name["run1"].get("best_val_acc") == 0.5
    assert by_name["run2"].get("optimizer.lr") == 0.2
    assert by_name["run1"].config == {row.run: row for row in _afresh()}["run1"].config


def _afresh():
    history.Path("logs/.index-train.json").unlink()
    return history.rows("logs")


def test_a_run_that_is_gone_is_gone(monkeypatch):
    folder = make_run("one")
    make_run("two")
    assert len(history.rows("logs")) == 2
    (folder / "config.yaml").unlink()
    assert names(history.rows("logs")) == ["two"]
    assert b'"one"' not in history.Path("logs/.index-train.json").read_bytes()


def test_a_run_at_work_is_read_each_time_and_the_index_stays_as_it_is(monkeypatch):
    make_run("done")
    folder = make_run("busy", status="running", pid=os.getpid(), host=platform.node())
    assert statuses() == {"done": "finished", "busy": "running"}
    stamps = os.stat(folder / "summary.json")
    text = (folder / "summary.json").read_text()
    runs.write_whole(folder / "summary.json", text.replace("running", "Running"))
    os.utime(folder / "summary.json", ns=(stamps.st_atime_ns, stamps.st_mtime_ns))  # a clock too coarse to see it
    seen = read_files(monkeypatch)
    assert statuses() == {"done": "finished", "busy": "Running"}
    assert set(seen) == {"busy"}
    runs.write_summary(folder, status="running")
    with runs.lock(folder):
        assert statuses() == {"done": "finished", "busy": "running"}
        before = history.Path("logs/.index-train.json").read_bytes()
        for step in range(3):
            runs.write_summary(folder, step=step)
            assert statuses() == {"done": "finished", "busy": "running"}
    assert statuses() == {"done": "finished", "busy": "killed"}
    assert history.Path("logs/.index-train.json").read_bytes() == before
    runs.write_summary(folder, status="finished", best={"val_acc": 0.5})
    assert statuses() == {"done": "finished", "busy": "finished"}


def statuses():
    found = history.rows("logs")
    assert all(row.values["status"] == row.status for row in found)
    return {row.run: row.status for row in found}


SPOILED = {
    "empty": lambda good: b"",
    "half": lambda good: good[:-40],
    "no text": lambda good: b"\xff\xfe\0",
    "deep": lambda good: b"[" * 100_000,
    "of other versions": lambda good: b'{"version":2,"layouts":[],"table":[],"runs":{}}',
    "other version": lambda good: b"0" + good[1:],
    "another value": lambda good: good.replace(b"0.5", b"0.6"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_an_index_that_is_not_ours_is_made_anew(how):
    make_run("one", sgd(0.1), best={"val_acc": 0.5})
    make_run("two", sgd(0.2))
    wanted = [(row.run, row.values, row.config) for row in history.rows("logs")]
    path = history.Path("logs/.index-train.json")
    good = path.read_bytes()
    path.write_bytes(SPOILED[how](good))
    assert [(row.run, row.values, row.config) for row in history.rows("logs")] == wanted
    assert path.read_bytes() == good


def test_an_index_that_cannot_be_written_is_no_error(monkeypatch):
    make_run("one", sgd(0.1))
    history.Path("logs/.index-train.json").mkdir()  # for root every folder can be written
    assert names(history.rows("logs")) == ["one"]
    assert [path.name for path in history.Path("logs").iterdir() if path.is_file()] == []


def test_the_index_forgets_the_values_of_runs_that_are_gone():
    for number in range(20):
        make_run("one", {f"k{index}": number * 1000 + index for index in range(200)})
        assert history.rows("logs")[0].get("k7") == number * 1000 + 7
    assert len(history.Path("logs/.index-train.json").read_bytes()) < 20_000


def _look(number, changes):
    draw = random.Random(number)
    for _ in range(15):
        if changes:
            make_run(f"run{number}-{draw.randrange(4)}", sgd(draw.random()), best={"val_acc": draw.random()})
        for row in history.rows("logs"):
            assert row.config["optimizer.lr"] == row.get("optimizer.lr") and "best_val_acc" in row.values


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_several_processes_write_the_index_at_once():
    processes = [multiprocessing.get_context("fork").Process(target=_look, args=(n, n < 3)) for n in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANG)
    assert [process.exitcode for process in processes] == [0] * 4
    seen = {row.run: (row.values, row.config) for row in history.rows("logs")}
    assert seen == {row.run: (row.values, row.config) for row in _afresh()} and len(seen) > 6
    assert {path.name for path in history.Path("logs").iterdir()} == {"train", ".index-train.json"}


HOSTILE_CONFIGS = {
    "empty": "",
    "no mapping": "[1, 2]",
    "broken": "a: [",
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    "own alias": "a: &a [*a]",
    "alias of another block": "a: &a [x]\nb: *a\n",
    "deep flow": "a: " + "[" * 200_000,
    "deep blocks": "a: 1\n? " + "- " * 200_000,
    "deep keys": "? " * 200_000,
    "deep lines": "\n".join(" " * depth + "a:" for depth in range(900)),
    "code": "a: !!python/object/apply:os.system [touch broken]",
    "bytes": "a: !!binary aGFsbG8=\nb: !!set {x}\nc: 2001-01-01\n? [1]\n: 2",
    "long number": f"a: {'9' * 10_000}",
    "a large number": f"a: {'9' * 40}\nb: 0x{'f' * 5000}",
    "a long text": f"a: {'x' * 100_000}",
    "too large": "a: 1\n" + "#" * 1_000_001,
    "signs": '"a\\e[31m": 1\nb: "\\e]0;x\\a"\n',
    "numbers as keys": "1: a\ntrue: b\nnull: c\n1.5: d\nx: {1: a, '1': b}",
}


@pytest.mark.parametrize("how", HOSTILE_CONFIGS)
def test_a_config_from_anybody_is_a_row(how):
    folder = make_run("odd", best={"val_acc": 0.5})
    (folder / "config.yaml").write_text(HOSTILE_CONFIGS[how])
    make_run("good", sgd(0.1))
    for _ in range(2):  # read, and from the index
        found = {row.run: row for row in history.rows("logs")}
        assert found["good"].config["optimizer.lr"] == 0.1 and found["odd"].get("best_val_acc") == 0.5
        text = json.dumps(list(found["odd"].config.items()), ensure_ascii=False)
        assert text.isprintable() and len(text) < 50_000
    assert sorted(os.listdir()) == ["logs"]


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_what_is_no_file_is_not_waited_for():
    folder = make_run("odd")
    for name in ("summary.json", "marks.json"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    (make_run("even") / "marks.json").mkdir()
    pipe = make_run("pipe")
    (pipe / "config.yaml").unlink()
    os.mkfifo(pipe / "config.yaml")
    os.mkfifo("logs/.index-train.json")
    assert {row.run: row.status for row in history.rows("logs")} == {"even": "finished", "odd": "unknown"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"[" * 100_000,
        b"\xff",
        b'{"best": {"val_acc": "high"}, "started": "now", "seconds": NaN, "status": {"a": 1}}',
        b'{"status": "\\u001b[31m", "name": "a\\nb", "run": "x", "started": 1e300, "tags": "x", "note": 3}',
        b'{"started": NaN, "best": {"val_acc": 1e400}, "big": ' + b"9" * 5000 + b"}",
        b'{"pid": 99999999999999999999, "status": "running", "\\ud800": 1, "x": "\\ud800"}',
        b'{"note": "' + b"x" * 2_000_000 + b'"}',
    ],
)
def test_a_summary_from_anybody_is_a_row(content):
    folder = make_run("odd", sgd(0.1))
    (folder / "summary.json").write_bytes(content)
    (folder / "marks.json").write_bytes(content)
    for _ in range(2):
        (row,) = history.rows("logs")
        assert row.run == "odd" and row.status in ("unknown", "killed") and 0 <= row.started < 1e11
        assert row.values["status"] == row.status
        json.dumps(row.values, ensure_ascii=False).encode()


def test_runs_of_one_recipe_differ_in_seed_and_names_only():
    make_run("a", sgd(0.1, seed=1, name="x", tags=["t"], log_dir="/one", logger={"csv": {"dir": "a"}}))
    other = sgd(0.1, seed=2, name="y", tags=[], log_dir="/two", logger={"wandb": {"name": "y"}})
    make_run("b", dict(reversed(other.items())))  # the order means nothing
    places = {"trainer": {"enable_progress_bar": False}, "data_dir": "/mine", "callbacks": {"progress": {"a": 1}}}
    other = sgd(0.1, seed=3, **places)
    other["data"] |= {"num_workers": 3, "data_dir": "/mine"}
    make_run("e", other)
    other["data"]["root"] = "/cats"  # in it are other pictures
    make_run("f", other)
    make_run("c", sgd(0.2, seed=1, log_dir="/one"))
    make_run("d", sgd(0.1, seed=1, model={"seed": 1}, log_dir="/one"))
    recipe = {row.run: row.recipe for row in history.rows("logs")}
    assert recipe["a"] == recipe["b"] == recipe["e"] and len(set(recipe.values())) == 4
    assert recipe == {row.run: row.recipe for row in _afresh()}


@pytest.fixture
def several():
    make_run(
        "a",
        sgd(0.1, seed=3, model={"optimizer": {"lr": 0.1}}),
        data="mnist",
        best={"val_acc": 0.9},
        name="Lenet one",
        started=1.70e9,
    )
    make_run("b", sgd(0.01), data="mnist", best={"val_acc": 0.99}, name="lenet", status="failed", started=1.71e9)
    make_run(
        "c", {"flag": True, "sizes": [1, 2]}, {"tags": ["good", "old"]}, data="digits", started=1.72e9, loss=math.nan
    )
    return history.rows("logs")


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        ([], "cba"),
        (["data=mnist"], "ba"),
        (["data!=mnist"], "c"),
        (["status=finished", "data=mnist"], "a"),
        (["best_val_acc>0.9"], "b"),
        (["best_val_acc>=0.9"], "ba"),
        (["best_val_acc<0.99"], "a"),
        (["optimizer.lr<=0.01"], "b"),
        (["optimizer.lr=1e-2"], "b"),
        (["optimizer.lr=null"], "c"),
        (["optimizer.lr!=0.1"], "cb"),
        (["seed=3.0"], "a"),
        (["seed!=3"], "cb"),
        (["name~LENET"], "ba"),
        (["name!~one"], "cb"),
        (["name=Lenet one"], "a"),
        (["tags=good"], "c"),
        (["tags~ol"], "c"),
        (["tags!=good"], "ba"),
        (["note=null"], "cba"),
        (["flag=true"], "c"),
        (["flag=1"], ""),
        (["flag=True"], "c"),
        (["seed==3"], "a"),
        (["best_val_acc=nan"], ""),
        (["loss=nan"], "c"),
        (["loss!=nan"], "ba"),
        (["sizes=[1, 2]"], "c"),
        (["sizes=2"], "c"),
        (["optimizer._target_~sgd"], "ba"),
        (["started>=2024-07-01"], "c"),
        (["run=a"], "a"),
    ],
)
def test_filters(several, filters, wanted):
    assert "".join(names(select(several, filters))) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("best_val_ac>0.9", "did you mean 'best_val_acc'?"),
        ("dta=mnist", "did you mean 'data'?"),
        ("lr<0.1", "did you mean 'optimizer.lr'?"),
        ("best>0.9", "did you mean 'best_val_acc'?"),
        ("optimzer.lr<0.1", "did you mean 'optimizer.lr'?"),
        ("optimizer.lrr<0.1", "did you mean 'optimizer.lr'?"),
        (
            "optimizer=sgd",
            "is a group, and no value: optimizer._target_, optimizer.lr; did you mean 'optimizer._target_~sgd'?",
        ),
        ("best_val_acc=>0.9", "has no operator =>"),
        ("best_val_acc>nan", "'nan' is no number"),
        ("best_val_acc>high", "'high' is no number"),
        ("started>soon", "'soon' is no number and no date"),
        ("mnist", "is no filter"),
        (">3", "is no filter"),
    ],
)
def test_a_filter_that_cannot_be_is_named(several, text, said):
    with pytest.raises(ConfigError) as caught:
        select(several, ["data=mnist", text, "xyzzy=1"])
    (mistake, other) = caught.value.mistakes
    assert mistake.where == text and said in mistake.message
    assert other.where == "xyzzy=1" and "no run has 'xyzzy'" in other.message


def test_where_there_is_no_run_no_filter_is_wrong():
    assert select([], ["anything=1"]) == []


def test_no_torch_and_no_hydra_for_the_rows():
    heavy = ("torch", "hydra", "lightning", "wandb", "pandas")
    code = "import sys; from boltlab.runs import index as history; history.rows('logs')"
    code += f"; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
