import csv
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import boltlab as package
from boltlab.__main__ import main
from boltlab.checkpoints import file as checkpoint_file
from boltlab.commands import predict
from boltlab.commands.predict import find_files
from boltlab.config.build import build
from boltlab.config.compose import compose
from boltlab.ground.errors import UserError

pytestmark = pytest.mark.floats


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    more = ("augment=none", "trainer.max_epochs=3", "optimizer.lr=0.01", "logger=csv", "test=false")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "model=linear", *more]) == 0
    return folder / "logs"


@pytest.fixture
def trained(logs, tmp_path):
    shutil.copytree(logs, tmp_path / "logs", symlinks=True)


@pytest.fixture
def photos():
    """Five digits as files, and the class that the model gives to each when it gets the pixels straight."""
    folder = Path("photos/数字 a=b")
    folder.mkdir(parents=True)
    images = build(compose("train", []).config, "data").dataset("val").x[:5]
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).convert("RGB" if i % 2 else "L").save(folder / f"{i}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not whole")
    (folder / "notes.txt").write_text("no image")
    return folder


def straight(photos):
    images = [torch.tensor(np.array(Image.open(photos / f"{i}.png").convert("L")))[None] for i in range(5)]
    data = build(compose("train", []).config, "data")
    return package.load().predict_step((data.normalize(torch.stack(images)),)).topk(3)


def class_of(path):
    pixels = torch.tensor(np.array(Image.open(path).convert("L")))[None, None]
    data = build(compose("train", []).config, "data")
    return package.load().predict_step((data.normalize(pixels),)).argmax().item()


def test_csv_has_a_row_a_file_and_lists_the_unreadable(boltlab, trained, photos):
    code, out, err = boltlab("predict", "run=latest", "input=photos", "top_k=3", "batch_size=2")
    assert code == 0
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [Path(row["file"]).name for row in rows] == ["0.png", "1.png", "2.png", "3.png", "4.png", "broken.jpg"]
    right = straight(photos)
    for rank, end in enumerate(("", "_2", "_3")):
        assert [row[f"class{end}"] for row in rows[:5]] == [str(i) for i in right.indices[:, rank].tolist()]
        given = [float(row[f"probability{end}"]) for row in rows[:5]]
        assert given == pytest.approx(right.values[:, rank].tolist(), abs=1e-5)
    assert [row["error"] for row in rows[:5]] == [""] * 5
    assert "broken.jpg" in rows[5]["error"] and not rows[5]["class"]
    assert "not read" in err and "broken.jpg" in err


def test_json_to_a_file_in_the_same_order(boltlab, trained, photos):
    code, out, _ = boltlab("predict", "run=latest", f'input="{photos}/[0-9].png"', "output=out/p.json", "top_k=99")
    assert code == 0 and "5 files" in out
    rows = json.loads(Path("out/p.json").read_text(encoding="utf-8"))
    assert [row["class"] for row in rows] == [str(i) for i in straight(photos).indices[:, 0].tolist()]
    assert all(len(row["top_k"]) == 10 for row in rows)
    assert all(abs(sum(c["probability"] for c in row["top_k"]) - 1) < 1e-4 for row in rows)


def test_fails_only_where_nothing_could_be_read(boltlab, trained, photos):
    code, _, err = boltlab("predict", "run=latest", f'input="{photos}/broken.jpg"')
    assert code == 1 and f"{photos}/broken.jpg" in err
    code, _, err = boltlab("predict", "run=latest", "input=nowhere")
    assert code == 1 and "input=nowhere names no image" in err
    code, _, err = boltlab("predict", "run=latest", "input=photos", "output=p.xlsx")
    assert code == 2 and ".csv or .json" in err
    code, _, err = boltlab("predict", "run=latest", "input=photos", "device=abacus")
    assert code == 1 and "device=abacus is none of" in err
    code, _, err = boltlab("predict", "run=latest", "input=photos", "trainer.devices=2")
    assert code == 2 and "there is none here: device=… and devices=…" in err
    code, _, err = boltlab("predict", "run=latest", "input=photos", "top_k=0", "batch_size=0")
    assert code == 2 and "top_k=0" in err and "batch_size=0" in err and "takes int from 1" in err


def test_files_are_found_once_and_sorted(photos):
    found = find_files([str(photos), f"{photos}/*.png", f"{photos}/0.png"])
    assert [Path(p).name for p in found] == ["0.png", "1.png", "2.png", "3.png", "4.png", "broken.jpg"]


def test_random_weights_never_predict(boltlab, trained, photos):
    for path in Path("logs").rglob("*.ckpt"):
        path.unlink()
    code, out, err = boltlab("predict", "run=latest", "input=photos", "output=p.csv")
    assert (code, out) == (1, "") and "has no checkpoint" in err and not Path("p.csv").exists()
    with pytest.raises(UserError, match="has no checkpoint"):
        package.load()


def test_tables_are_refused(boltlab):
    assert boltlab("train", "data=diabetes", "model=linear_regressor", "trainer.max_epochs=1", "logger=csv")[0] == 0
    Image.new("L", (8, 8)).save("x.png")
    code, _, err = boltlab("predict", "run=latest", "input=x.png")
    assert code == 1 and "takes images" in err and "without input=" in err


HARMLESS = {"sub/._0.png", ".hidden.png", ".trash/1.png"}  # what systems leave between photographs


def test_a_name_that_is_no_text_and_a_dead_link_each_have_a_row(boltlab, trained, photos):
    name = os.fsdecode(b"caf\xe9 \xff.png")
    (photos / "0.png").rename(photos / name)
    (photos / "1.png").unlink()
    (photos / "1.png").symlink_to("nowhere.png")
    for hidden in HARMLESS:
        (photos / hidden).parent.mkdir(exist_ok=True)
        (photos / hidden).write_bytes(b"no image")
    names = sorted(f"{photos}/{file}" for file in ("1.png", "2.png", "3.png", "4.png", "broken.jpg", name))
    for kind in ("csv", "json"):
        code, out, err = boltlab("predict", "run=latest", "input=photos", f"output=out.{kind}")
        assert code == 0 and f"6 files, 2 not read  out.{kind}" in out
        assert err.count("not read  ") == 2 and "1.png: No such file or directory" in err
        content = Path(f"out.{kind}").read_bytes()
        if kind == "json":
            rows = json.loads(content)
        else:
            text = content.decode(errors="surrogateescape")
            assert b"caf\xe9 \xff.png" in content
            rows = list(csv.DictReader(io.StringIO(text)))
        assert sorted(row["file"] for row in rows) == names
        by_name = {Path(row["file"]).name: row for row in rows}
        assert by_name[name]["class"] == str(class_of(photos / name))
    code, out, _ = boltlab("predict", "run=latest", f'input="{photos}/1.png"')
    assert code == 1 and "No such file" in out


@pytest.mark.parametrize("kind", ["csv", "json"])
def test_rows_are_written_as_they_come_and_stand_in_their_place_at_the_end(boltlab, trained, photos, monkeypatch, kind):
    path, seen = Path(f"out.{kind}"), []
    path.write_text("of before")
    own = predict.predict

    def ends(*arguments, **options):
        for number, row in enumerate(own(*arguments, **options)):
            yield row
            beside = list(Path().glob(f".out.{kind}.*"))
            seen.append((number, len(beside), path.read_text()))
            if number == 2:
                raise UserError("the device is gone")

    monkeypatch.setattr(predict, "predict", ends)
    code, _, err = boltlab("predict", "run=latest", "input=photos", f"output={path}", "batch_size=1")
    assert code == 1 and "the device is gone" in err
    assert seen == [(number, 1, "of before") for number in range(3)]
    assert path.read_text() == "of before" and not list(Path().glob(f".out.{kind}.*"))


def test_what_a_place_refuses_is_said_before_anything_is_predicted(boltlab, trained, photos, monkeypatch):
    monkeypatch.setattr(predict, "predict", lambda *_, **__: pytest.fail("it began"))
    monkeypatch.setattr(predict, "_rows", lambda *_: (pytest.fail("it began") for _ in [0]))
    Path("file").write_text("")
    code, _, err = boltlab("predict", "run=latest", "input=photos", "output=file/p.csv")
    assert code == 1 and "output=file/p.csv cannot be written" in err


def test_a_weight_of_another_shape_is_named_with_both(boltlab, trained, photos):
    (path,) = Path("logs").rglob("best.ckpt")
    content = checkpoint_file.read(path)
    name, weight = next((key, value) for key, value in content["state_dict"].items() if value.ndim == 2)
    content["state_dict"] = {**content["state_dict"], name: weight[:7].clone()}
    checkpoint_file.write(content, path)
    for verb in ("predict", "eval"):
        code, _, err = boltlab(verb, "run=latest", *(["input=photos"] if verb == "predict" else []))
        assert code == 1 and "Traceback" not in err
        assert all(said in err for said in (name, f"{list(weight[:7].shape)}", f"{list(weight.shape)}")), err
