import csv
import io
import re
import sys

import pytest
import rich
from rich.console import Console

from boltlab.callbacks.progress import ProgressLines, _clock
from boltlab.callbacks.throughput import Throughput
from boltlab.config.compose import compose
from boltlab.training.trainer import make_trainer as make_trainer_of


@pytest.fixture
def terminal(monkeypatch):
    """A terminal of 100 columns that keeps what is written to it."""
    console = Console(file=io.StringIO(), force_terminal=True, width=100, height=24, color_system=None)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(rich, "_console", console)
    return console


def test_without_a_terminal_an_epoch_is_one_plain_line(make_trainer, tiny_module, tiny_data, run_dir, capsys):
    progress = ProgressLines(["train_loss", "val_loss", "val_acc", "val_acc", "missing"])
    trainer = make_trainer("trainer.max_epochs=3", callbacks=[Throughput(), progress])
    trainer.fit(tiny_module(), datamodule=tiny_data())
    with (run_dir / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val_acc"]]
    trainer.test(trainer.lightning_module, datamodule=tiny_data(), verbose=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    clock = r"(\d+\.\d s|\d+:\d\d)"
    for epoch, line in enumerate(lines, 1):
        left = "" if epoch == 3 else f"  {clock} left"
        values = "  ".join(f"{n} {float(rows[epoch - 1][n]):.4f}" for n in ("train_loss", "val_loss", "val_acc"))
        expected = rf"epoch {epoch}/3  {re.escape(values)}  [\d,]+ samples/s  {clock}"
        assert re.fullmatch(expected + left, line), line


def test_the_line_of_an_epoch_without_validation_shows_no_old_values(make_trainer, tiny_module, tiny_data, capsys):
    trainer = make_trainer("trainer.check_val_every_n_epoch=2", callbacks=[ProgressLines(["val_acc"])])
    trainer.fit(tiny_module(), datamodule=tiny_data())
    assert ["val_acc" in line for line in capsys.readouterr().out.splitlines()] == [False, True]


@pytest.mark.parametrize("on", ["a terminal", "a pipe"])
def test_a_module_prints_by_lightnings_own_words(make_trainer, tiny_module, tiny_data, request, capsys, on):
    class Prints(tiny_module):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.print(f"batch {batch_idx} of", self.current_epoch)

    terminal = request.getfixturevalue("terminal") if on == "a terminal" else None
    make_trainer("trainer.max_epochs=1", callbacks=[ProgressLines(refresh_seconds=0.0)]).fit(
        Prints(), datamodule=tiny_data()
    )
    text = terminal.file.getvalue() if terminal else capsys.readouterr().out
    assert re.findall(r"batch (\d) of 0 *\n", text) == ["0", "1", "2", "3"]


def test_a_disabled_bar_is_silent(make_trainer, tiny_module, tiny_data, capsys):
    progress = ProgressLines()
    progress.disable()
    make_trainer("trainer.max_epochs=1", callbacks=[progress]).fit(tiny_module(), datamodule=tiny_data())
    assert capsys.readouterr().out == "" and not progress.is_enabled
    progress.enable()
    assert progress.is_enabled


def test_long_epochs_are_not_silent(make_trainer, tiny_module, tiny_data, capsys):
    trainer = make_trainer("trainer.max_epochs=1", callbacks=[ProgressLines(plain_seconds=0.0)])
    trainer.fit(tiny_module(), datamodule=tiny_data())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 + 1
    assert re.match(r"epoch 1/1  2/4  loss \d", lines[1])


def test_a_terminal_shows_a_bar_and_keeps_only_the_lines(make_trainer, tiny_module, tiny_data, terminal):
    trainer = make_trainer(callbacks=[ProgressLines(["val_acc"], refresh_seconds=0.0)])
    trainer.fit(tiny_module(), datamodule=tiny_data())
    trainer.test(trainer.lightning_module, datamodule=tiny_data(), verbose=False)
    text = terminal.file.getvalue()
    for shown in ("━", "1/4", "loss ", "validate", "test", "epoch 2/2  val_acc"):
        assert shown in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is back
    assert sys.stdout is not terminal.file


def test_the_bar_is_drawn_at_its_pace_and_not_at_the_steps(make_trainer, tiny_module, tiny_data, terminal, monkeypatch):
    draws = []
    monkeypatch.setattr(ProgressLines, "_draw", lambda self, *args, **kwargs: draws.append(args))
    progress = ProgressLines(refresh_seconds=1000.0)
    original = progress._begin
    monkeypatch.setattr(progress, "_begin", lambda *args: (original(*args), setattr(progress, "_next_draw", 1e12)))
    make_trainer(callbacks=[progress]).fit(tiny_module(), datamodule=tiny_data())
    assert draws == []


def test_the_terminal_is_usable_after_an_exception(make_trainer, tiny_module, tiny_data, terminal):
    class Failing(tiny_module):
        def training_step(self, batch, batch_idx):
            if self.global_step == 2:
                raise RuntimeError("broken")
            return super().training_step(batch, batch_idx)

    stdout = sys.stdout
    with pytest.raises(RuntimeError, match="broken"):
        make_trainer(callbacks=[ProgressLines()]).fit(Failing(), datamodule=tiny_data())
    assert sys.stdout is stdout
    text = terminal.file.getvalue()
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0  # the cursor, which was hidden, is shown


def test_other_processes_are_silent(make_trainer, tiny_module, tiny_data, capsys, monkeypatch):
    progress = ProgressLines(plain_seconds=0.0)
    monkeypatch.setattr(progress, "enable", lambda: None)
    progress.disable()
    make_trainer(callbacks=[progress]).fit(tiny_module(), datamodule=tiny_data())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.6, "1:00"), (3725, "1:02:05")])
def test_clock(seconds, text):
    assert _clock(seconds) == text


def test_the_default_callbacks_do_without_a_progress_bar(run_dir):
    config = compose("train", ["trainer.enable_progress_bar=false", "logger=none"]).config
    config.run_dir = str(run_dir)
    assert "progress" in config.callbacks and make_trainer_of(config).progress_bar_callback is None
