import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import boltlab as package
from boltlab.commands.predict import find_files
from boltlab.config.build import build
from boltlab.config.compose import compose
from boltlab.ground.errors import UserError

pytestmark = pytest.mark.floats


@pytest.fixture
def trained(boltlab):
    more = ("augment=none", "trainer.max_epochs=3", "optimizer.lr=0.01", "logger=csv", "test=false")
    assert boltlab("train", "model=linear", *more)[0] == 0


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
    assert [row["class"] for row in rows] == [str(i) for i in straight(photos).indices.tolist()]
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
    assert [p.name for p in found] == ["0.png", "1.png", "2.png", "3.png", "4.png", "broken.jpg"]


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
