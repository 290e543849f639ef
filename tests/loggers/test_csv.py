import csv

import pytest

from boltlab.loggers.csv import CSVLogger


def table(folder):
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def test_values_of_one_step_share_a_row_that_is_on_disk_at_once(tmp_path):
    logger = CSVLogger(tmp_path / "new" / "run")
    logger.log_metrics({"epoch": 0, "train_loss": 1.5}, step=0)
    assert table(tmp_path / "new" / "run") == [{"step": "0", "epoch": "0", "train_loss": "1.5"}]
    logger.log_metrics({"epoch": 0, "val_loss": 2.5}, step=0)
    logger.log_metrics({"epoch": 0, "train_loss": 1.25}, step=5)
    logger.log_metrics({"odd, name": 0.1}, step=5)
    assert table(tmp_path / "new" / "run") == [
        {"step": "0", "epoch": "0", "train_loss": "1.5", "val_loss": "2.5", "odd, name": ""},
        {"step": "5", "epoch": "0", "train_loss": "1.25", "val_loss": "", "odd, name": "0.1"},
    ]


def test_nothing_else_is_written_and_other_files_are_left_alone(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 0")
    logger = CSVLogger(tmp_path)
    logger.log_hyperparams({"seed": 0})
    logger.log_metrics({"a": 1.0}, step=1)
    logger.log_metrics({"b": 1.0}, step=2)
    logger.finalize("success")
    assert logger.save_dir == logger.log_dir == str(tmp_path)  # modules join their own names to it
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "metrics.csv"]


def test_a_run_that_goes_on_replaces_what_it_does_again(tmp_path):
    logger = CSVLogger(tmp_path)
    for step in range(6):
        logger.log_metrics({"a": float(step)}, step=step)
    again = CSVLogger(tmp_path)
    again.log_metrics({"a": 30.0, "b": 1.0}, step=3)
    again.log_metrics({"a": 40.0}, step=4)
    assert [(row["step"], row["a"], row["b"]) for row in table(tmp_path)] == [
        *[(str(step), str(float(step)), "") for step in range(3)],
        ("3", "30.0", "1.0"),
        ("4", "40.0", ""),
    ]


@pytest.mark.parametrize("torn", ["7,0.1", '7,"half a na'])
def test_a_line_that_a_killed_process_left_unfinished_is_dropped(tmp_path, torn):
    CSVLogger(tmp_path).log_metrics({"a": 1.0}, step=3)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write(torn)
    CSVLogger(tmp_path).log_metrics({"a": 2.0}, step=9)
    assert [row["step"] for row in table(tmp_path)] == ["3", "9"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        CSVLogger(tmp_path / "file").log_metrics({"a": 1.0}, step=0)


def test_without_a_step_rows_follow_each_other(tmp_path):
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"a": 1.0})
    logger.log_metrics({"a": 2.0})
    assert [(row["step"], row["a"]) for row in table(tmp_path)] == [("0", "1.0"), ("1", "2.0")]


WHOLE = "step,epoch,loss,val_acc\n0,0,0.5,\n1,0,0.25,0.75\n2,1,,0.5\n3,1,0.125,\n"
DAMAGES = {
    "mark": ("\ufeff" + WHOLE, [0, 1, 2, 3]),
    "zeros": (WHOLE.replace("1,0,0.25,0.75", "\0" * 13), [0, 2, 3]),
    "zeros in a number": (WHOLE.replace("0.25", "0.\0\0"), [0, 2, 3]),
    "torn row": (WHOLE.replace("2,1,,0.5", "2,1"), [0, 1, 3]),
    "two rows in one": (WHOLE.replace(",\n1", ",1"), [2, 3]),
    "no header": (WHOLE.partition("\n")[2], []),
    "zeros for a header": (WHOLE.replace("step,epoch,loss,val_acc", "\0" * 23), []),
    "quotation mark": (WHOLE.replace("1,0,0.25", '"1,0,0.25'), [0, 2, 3]),
    "torn at the end as well": (WHOLE.replace("2,1,,0.5", "2,1")[:-3], [0, 1]),
    "nothing": ("", []),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_a_power_cut_has_left_is_read_row_by_row(tmp_path, capsys, damage):
    content, steps = DAMAGES[damage]
    (tmp_path / "metrics.csv").write_text(content)
    known = {int(line.split(",")[0]): line for line in WHOLE.splitlines()[1:]}
    logger = CSVLogger(tmp_path)
    logger.log_metrics({"loss": 1.5, "epoch": 2}, 4)
    logger.log_metrics({"loss": 2.5, "val_acc": 0.625, "epoch": 2}, 5)
    rows = {row["step"]: (row["epoch"], row["loss"], row["val_acc"]) for row in table(tmp_path)}
    expected = {str(step): tuple(known[step].split(",")[1:]) for step in steps}
    assert rows == expected | {"4": ("2", "1.5", ""), "5": ("2", "2.5", "0.625")}
    said = capsys.readouterr().err
    assert (f"is damaged: {len(steps)} rows are kept" in said) == bool(content), said
    if content:
        assert (tmp_path / "metrics.damaged.csv").read_text() == content


def test_a_file_that_is_gone_is_said_where_the_run_had_one(tmp_path, capsys):
    CSVLogger(tmp_path).log_metrics({"loss": 1}, 7)
    assert capsys.readouterr().err == ""
    (tmp_path / "metrics.csv").unlink()
    (tmp_path / "summary.json").write_text('{"resumed": [{"checkpoint": "last.ckpt"}]}')
    CSVLogger(tmp_path).log_metrics({"loss": 1}, 7)
    assert "metrics.csv is gone: it begins anew" in capsys.readouterr().err
