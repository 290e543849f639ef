"""What stands on the page, by a parser of HTML: what a reader sees, not how it is written."""

import itertools
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest

from boltlab.report import page as pages
from boltlab.report import plots
from boltlab.report.read import read

NASTY = "<script>alert('x')</script>&\"'$x$"


class Seen(HTMLParser):
    """Elements with their attributes, tables as lists of rows of texts, and the text outside of style and script."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.tables, self.text, self._open = [], [], [], []
        self.feed(text)
        self.text = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "path", "line", "use", "rect"):
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, text):
        if not {"style", "script"} & set(self._open):
            self.text.append(text)
            if {"td", "th"} & set(self._open):
                self.tables[-1][-1][-1] += text

    def table(self, *columns):
        (found,) = [table for table in self.tables if {*columns} <= {*table[0]}]
        return [dict(zip(found[0], row, strict=True)) for row in found[1:]]

    def all(self, tag, **attributes):
        return [a for t, a in self.elements if t == tag and attributes.items() <= a.items()]


def test_runs_stand_side_by_side_with_what_differs_and_seeds_joined(make_run, page):
    for seed, acc in ((1, 0.5), (2, 0.75)):
        make_run(
            f"2026-01-0{seed}_00-00-00_small-a{seed}",
            {"seed": seed, "optimizer": {"_target_": "torch.optim.SGD", "lr": 0.1}},
            overrides=(f"seed={seed}", "optimizer.lr=0.1"),
            best={"val_acc": acc},
            started=1.7e9 + seed,
        )
    make_run("other", {"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.3}}, overrides=("optimizer.lr=0.3",))
    seen = Seen(page())
    every = seen.table("run", "status", "seed", "optimizer.lr", "best_val_acc", "test_acc", "time", "started")
    assert [row["run"] for row in every] == ["1. small-a2", "2. small-a1", "3. other"]
    assert [row["optimizer.lr"] for row in every] == ["0.1", "0.1", "0.3"]
    assert [row["best_val_acc"] for row in every] == ["0.7500", "0.5000", "0.8750"]
    assert every[0]["time"] == "1m05s" and every[0]["status"] == "finished"
    joined = seen.table("runs", "n", "best_val_acc")
    assert [(row["n"], row["best_val_acc"]) for row in joined] == [("2", "0.6250 ± 0.1768 (2)"), ("1", "0.8750")]
    assert "optimizer._target_" not in seen.text
    assert seen.text.startswith("3 runs To the content 3 runs logs/train: 3 of 3 runs, all")


def test_each_run_can_be_repeated(make_run, page):
    overrides = ["name=it's new", 'data.root="/数据/a=b"', "seed=1"]
    folder = make_run("one", overrides=overrides)
    make_run("clean", overrides=())
    (Path("logs/train/clean/git.patch")).write_bytes(b"")
    environment = {"git_commit": None, "git_dirty": False}
    Path("logs/train/clean/environment.json").write_text(json.dumps(environment))
    summary = json.loads((folder / "summary.json").read_text())
    again = {"time": 1.0, "seconds": 1.0, "overrides": ["trainer.max_epochs=9"]}
    (folder / "summary.json").write_text(json.dumps({**summary, "resumed": [again]}))
    seen = Seen(page())
    for expected in (overrides, ["resume=logs/train/one", "trainer.max_epochs=9"]):
        command = shlex.join(["boltlab", "train", *expected])
        assert command in seen.text
        assert shlex.split(command) == ["boltlab", "train", *expected]
    assert "Commit 0123abcdef ; git.patch in its folder holds what was not committed (3 bytes)" in seen.text
    assert "Commit not known. " in seen.text


def test_the_latest_run_is_named_as_what_it_was(make_run, page):
    make_run("val", verb="eval", overrides=("run=latest", "split=val"), evaluated="/logs/train/it was this")
    make_run("new", {"init_from": "/logs/train/other"}, overrides=("init_from=latest", "seed=2"))
    assert "boltlab eval 'run=/logs/train/it was this' split=val" in Seen(page("verb=eval")).text
    make_run("again", overrides=("run=latest", "logger=csv"), reproduces="/logs/train/new")
    text = Seen(page()).text
    assert "boltlab train init_from=/logs/train/other seed=2" in text
    assert "boltlab reproduce run=/logs/train/new logger=csv" in text


def test_of_many_keys_the_telling_ones_are_columns(make_run, page):
    for number in range(2):
        optimizer = {"_target_": "torch.optim.SGD", "lr": 0.1 * (number + 1)}
        others = {key: f"{key}{number}" for key in "abcdefgh"}
        make_run(str(number), {"optimizer": optimizer, **others}, overrides=("optimizer.lr=0.1", "g=g1", *"abcdef"))
    columns = Seen(page()).tables[0][0]
    assert "optimizer.lr" in columns and "a" in columns and "h" not in columns


def test_a_mean_of_what_is_no_number_is_none(make_run, page):
    for seed, acc in enumerate((0.5, float("nan"))):
        make_run(str(seed), {"seed": seed}, best={"val_acc": acc})
    (row,) = Seen(page()).table("runs", "n", "best_val_acc")
    assert row["best_val_acc"] == "nan ± nan (2)"


def test_what_failed_says_why_and_is_in_no_mean(make_run, page):
    for seed, status in ((1, "finished"), (2, "finished"), (3, "failed")):
        more = (
            {"reason": "out of memory", "best": {"val_acc": 0.1}, "test": {}, "epochs": 1} if status == "failed" else {}
        )
        make_run(f"run{seed}", {"seed": seed}, status=status, **more)
    seen = Seen(page())
    (row,) = seen.table("run", "status", "reason", "reached")
    assert (row["status"], row["reason"], row["reached"]) == ("failed", "out of memory", "epochs 1")
    (row,) = seen.table("runs", "n", "best_val_acc")
    assert (row["n"], row["best_val_acc"]) == ("3", "0.8750 ± 0.0000 (2)")


def test_filters_limit_and_an_empty_selection(make_run, page, boltlab):
    for number in range(3):
        make_run(f"run{number}", {"seed": number}, data="mnist" if number else "digits", started=1.7e9 + number)
    seen = Seen(page("data=mnist", "seed<=2", "limit=1"))
    assert "logs/train: 1 of 3 runs, of those that fit data=mnist seed<=2; the newest of 2 (limit=1)" in seen.text
    assert "2. " not in [row["run"] for row in seen.table("run", "status")] and "run2" in seen.text
    code, _, err = boltlab("report", "data=cifar10")
    assert code == 1 and "none of the 3 runs under logs/train fits data=cifar10" in err
    code, _, err = boltlab("report", "log_dir=nowhere")
    assert code == 1 and "there is no run yet under nowhere/train" in err
    code, _, err = boltlab("report", "dta=mnist")
    assert code == 2 and "did you mean 'data'" in err
    code, _, err = boltlab("report", "output=logs/train/run0/config.yaml/x.html")
    assert code == 1 and "cannot be written" in err
    assert boltlab("report", "limit=0")[0] == 2


def test_numbers_of_all_plots_stand_in_tables(make_run, page):
    make_run("one", classes=("a", "b", "c"))
    seen = Seen(page())
    by_value = [table[1:] for table in seen.tables if table[0][0] == "epoch"]
    assert by_value == [
        [["1", "1.0000"], ["2", "0.5000"], ["3", "0.2500"]],
        [["1", "0.5000"], ["2", "0.7500"], ["3", "0.8750"]],
    ]
    assert seen.table("probability", "mean probability", "right")[1] == {
        "probability": "0.500 to 1.000", "samples": "40", "mean probability": "0.7500", "right": "0.5000",
    }  # fmt: skip
    (matrix,) = [table for table in seen.tables if table[0][0] == "true \\ predicted"]
    assert matrix[1:] == [["a", "9", "1", "1"], ["b", "1", "9", "1"], ["c", "1", "1", "9"]]
    assert seen.table("samples per second", "waiting for data")[0]["waiting for data"] == "25.0%"
    labels = [a["aria-label"] for a in seen.all("div", role="img")]
    assert len(labels) == 4 and "expected calibration error 0.2500 over 40 samples" in labels[-1]
    assert [a["alt"] for a in seen.all("img")] == ["Sample 1: a, taken for c", "Sample 2: a, taken for c"]
    assert all(a["src"].startswith("data:image/png;base64,") for a in seen.all("img"))


def test_what_comes_from_a_folder_stays_text(make_run, page):
    folder = make_run(
        "run",
        {"seed": NASTY, "monitor": NASTY},
        classes=(NASTY.replace('"', ""), "b"),
        overrides=(f"name={NASTY}",),
        reason=NASTY,
        status="failed",
        data=NASTY,
        model=NASTY,
        best={NASTY: 0.5},
        name=NASTY,
    )
    text = (folder / "metrics.csv").read_text().replace("val_acc", '"' + NASTY.replace('"', '""') + '"')
    (folder / "metrics.csv").write_text(text)
    for name in ("environment.json", "mistakes.json"):
        content = json.loads((folder / name).read_text())
        content |= {"git_commit": NASTY, "split": NASTY} | (
            {"worst": [{**content["worst"][0], "file": NASTY}]} if "worst" in content else {}
        )
        (folder / name).write_text(json.dumps(content))
    make_run("other")
    text = page()
    seen = Seen(text)
    assert len(seen.all("script")) == 1
    assert NASTY in seen.text and seen.text.count("<script>alert") > 8
    assert "alert" not in re.search(r"<script>(.*?)</script>", text, re.DOTALL)[1]
    # No attribute but those that the template has.
    assert not [a for _, a in seen.elements if {k for k in a if k.startswith("on")}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.csv", b"\xff\xfe\x00"),
        ("metrics.csv", b""),
        ("metrics.csv", b"step,epoch\n1\n"),
        ("metrics.csv", b'step,epoch,val_acc\n"unclosed'),
        ("confusion_matrix.csv", b"true,a,b\na,1\n"),
        ("confusion_matrix.csv", b"true,a\na,-1\n"),
        ("confusion_matrix.csv", b"true,a\na,9e9\n"),
        ("calibration.json", b'{"bins": 3}'),
        ("calibration.json", b'{"bins": [{"from": 0, "to": 2, "samples": 1}]}'),
        ("calibration.json", b"[" * 100_000),
        ("mistakes.json", b'{"mistakes": 1, "samples": 2, "worst": [3]}'),
        ("mistakes.json", b'{"mistakes": true, "samples": 2, "worst": []}'),
        ("overrides.yaml", b"a: [b"),
        ("overrides.yaml", b"- {a: b}"),
        ("environment.json", b"null"),
    ],
)
def test_a_broken_file_is_left_out_with_a_word(make_run, name, content):
    folder = make_run("one")
    whole = read(folder, "train")
    assert whole.missing == []
    (folder / name).write_bytes(content)
    found = read(folder, "train")
    if name == "metrics.csv" and content.startswith(b"step"):  # a killed run's last line is not whole
        assert found.curves == {} and found.missing == []
    else:
        assert len(found.missing) == 1 and found.missing[0].startswith(f"{name} cannot be read")
    (folder / name).unlink()
    assert read(folder, "train").missing == [f"{name} is not there"]


def test_an_empty_run_folder_makes_a_page(page):
    folder = Path("logs/train/empty")
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 1\n")
    (folder / "summary.json").write_text("{")
    seen = Seen(page())
    assert "None of these runs has curves: metrics.csv is not there" in seen.text
    assert "The command is not known." in seen.text and "mistakes.json is not there" in seen.text
    (row,) = seen.table("run", "status", "started")
    assert (row["run"], row["status"]) == ("1. empty", "unknown")


def test_nothing_outside_of_the_folder_is_read(make_run, page):
    folder = make_run("one")
    secret = Path("secret.csv")
    secret.write_text("true,private\nprivate,7\n")
    (folder / "confusion_matrix.csv").unlink()
    (folder / "confusion_matrix.csv").symlink_to(secret.absolute())
    picture = (folder / "mistakes" / "01.png").read_bytes()
    Path("private.png").write_bytes(picture)
    content = json.loads((folder / "mistakes.json").read_text())
    content["worst"][0]["picture"] = "../../../private.png"
    (folder / "mistakes.json").write_text(json.dumps(content))
    (folder / "mistakes" / "01.png").unlink()
    (folder / "mistakes" / "01.png").symlink_to(Path("private.png").absolute())
    seen = Seen(page())
    assert "private" not in seen.text and "no plain file of this folder" in seen.text
    assert len(seen.all("img")) == 1


def test_many_runs_make_a_page_of_bounded_size(make_run, page, monkeypatch):
    monkeypatch.setattr(pages, "PICTURES", 2000)
    names = [f"class {number}" for number in range(30)]
    metrics = [(epoch, 1 / (1 + epoch), 0.5) for epoch in range(1000)]
    drawn = []
    real = plots.draw_curves
    monkeypatch.setattr(plots, "draw_curves", lambda curves, label: drawn.append(curves) or real(curves, label))
    for number in range(20):
        classes = names if number < 4 else None
        make_run(f"run{number}", {"seed": number}, metrics if number > 1 else None, classes, mistakes=6)
    text = page("limit=20")
    seen = Seen(text)
    assert {len(curves) for curves in drawn} == {pages.MAX_CURVES}
    assert max(len(curve.points) for curves in drawn for curve in curves) <= plots.MAX_POINTS
    assert "The first 16 of 18 runs are drawn." in seen.text
    assert sum(len(a["src"]) for a in seen.all("img")) <= 2000 and "the page is full" in seen.text
    assert "The most frequent confusions of 30 classes" in seen.text
    assert len(text) < 1_500_000


def test_thinning_keeps_spikes_and_ends():
    points = [(float(x), 0.0) for x in range(10_000)]
    points[1234] = (1234.0, 99.0)
    kept = plots.thinned(points)
    assert len(kept) <= plots.MAX_POINTS
    assert kept[0] == points[0] and kept[-1] == points[-1] and points[1234] in kept
    assert kept == sorted(kept)
    assert plots.thinned(points[:150]) == points[:150]


def test_curves_go_along_the_steps_where_an_epoch_has_several_values():
    assert plots.axis([[(0, 9, 1.0), (1, 19, 0.5)]]) == "epoch"
    assert plots.axis([[(0, 9, 1.0), (1, 19, 0.5)], [(0, 4, 1.0), (0, 9, 0.5)]]) == "step"
    assert plots.along([(1, 19, 0.5), (0, 9, 1.0)], "epoch") == [(1, 1.0), (2, 0.5)]


def test_32_runs_differ_in_colour_or_dash():
    looks = [(plots.colour(place), plots.dash(place)) for place in range(32)]
    assert len(set(looks)) == 32
    assert all(a[0] != b[0] and a[1] != b[1] for a, b in itertools.pairwise(looks[:8]))


def test_plots_hold_no_colour_of_their_own_and_no_name_twice():
    drawn = [plots.draw_curves([plots.Curve(n, "", [(1, 0.5), (2, 0.7)]) for n in range(9)], "epoch") for _ in range(2)]
    names = re.findall(r' id="([^"]+)"', "".join(drawn))
    assert len(names) == len(set(names)) > 0
    for svg in drawn:
        assert not re.findall(r"#[0-9a-fA-F]{6}\b", svg) and "<style" not in svg and "http" not in svg
        assert {f"var(--series-{n})" for n in range(8)} | {"currentColor", "var(--line)"} <= set(
            re.findall(r"var\([^)]*\)|currentColor", svg)
        )
        used = set(re.findall(r'href="#([^"]+)"', svg)) | set(re.findall(r"url\(#([^)]+)\)", svg))
        assert used == set(re.findall(r' id="([^"]+)"', svg))


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_in_both_themes():
    """WCAG 2.2, AA: 4.5 for text (1.4.3), 3 for what a graphic is understood by (1.4.11)."""
    style = (Path(pages.__file__).parent / "page.css").read_text()
    themes = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in style.split("prefers-color-scheme")]
    assert len(themes) == 2
    for theme in themes:
        for ground in (theme["paper"], theme["raised"]):
            for name in ("text", "muted", "link", "good", "bad", "warn"):
                assert contrast(theme[name], ground) >= 4.5, (name, ground)
        for number in range(plots.COLOURS):
            assert contrast(theme[f"series-{number}"], theme["paper"]) >= 3, number
        share = int(re.search(r"shade-10 .*?(\d+)%", style)[1]) / 100
        shaded = [
            round(share * int(theme["shade"][i : i + 2], 16) + (1 - share) * int(theme["paper"][i : i + 2], 16))
            for i in (1, 3, 5)
        ]
        assert contrast("#" + "".join(f"{part:02x}" for part in shaded), theme["text"]) >= 4.5
