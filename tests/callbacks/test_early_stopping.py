import pytest

from boltlab.training import stopped


def test_training_ends_when_the_metric_stays_bad(make_trainer, tiny_module, tiny_data):
    trainer = make_trainer(
        "logger=none",
        "callbacks=[early_stopping]",
        "callbacks.early_stopping.patience=2",
        "trainer.max_epochs=10",
        "trainer.limit_train_batches=2",
        "trainer.enable_checkpointing=false",
    )
    trainer.fit(tiny_module(val_metric=lambda epoch: -float(epoch)), datamodule=tiny_data())
    assert trainer.current_epoch == 3


def logged(folder, values):
    """A run's metrics.csv, two steps an epoch."""
    rows = "".join(f"{2 * epoch + 1},{epoch},{value}\n" for epoch, value in enumerate(values))
    folder.mkdir(exist_ok=True)
    (folder / "metrics.csv").write_text(f"step,epoch,val_acc\n{rows}", encoding="utf-8")


@pytest.mark.parametrize(
    ("given", "values", "said"),
    [
        (
            ["callbacks.early_stopping.patience=2"],
            [0.5, 0.75, 0.6, 0.7],
            "val_acc got no better than 0.75 since epoch 2",
        ),
        (["callbacks.early_stopping.patience=1"], [0.5, 0.4], "since epoch 1, step 2, for 1 value"),
        (["callbacks.early_stopping.stopping_threshold=0.7"], [0.5, 0.75], "Stopping threshold reached: val_acc"),
        (["trainer.max_epochs=2"], [0.5, 0.75], None),
        (["callbacks.early_stopping.patience=1", "trainer.max_epochs=2"], [0.5, 0.4], None),  # it was the last one
    ],
)
def test_what_ended_a_training_early_is_said(
    make_trainer, tiny_module, tiny_data, run_dir, capsys, given, values, said
):
    trainer = make_trainer(
        "logger=none",
        "callbacks=[early_stopping]",
        "trainer.max_epochs=9",
        "trainer.limit_train_batches=2",
        "trainer.enable_checkpointing=false",
        *given,
    )
    trainer.fit(tiny_module(val_metric=lambda epoch: values[epoch]), datamodule=tiny_data())
    logged(run_dir, values)
    capsys.readouterr()
    reason = stopped.early(trainer, run_dir)["stopped_early"]
    printed = capsys.readouterr().out
    if said is None:
        assert reason is None and not printed
    else:
        assert said in reason and reason in printed and f"after epoch {len(values)}" in printed


def test_a_time_limit_that_ended_a_training_is_said(make_trainer, tiny_module, tiny_data, run_dir, capsys):
    trainer = make_trainer("logger=none", "callbacks=none", "trainer.max_time='00:00:00:00'", "trainer.max_epochs=9")
    trainer.fit(tiny_module(), datamodule=tiny_data())
    assert stopped.early(trainer, run_dir) == {"stopped_early": "trainer.max_time is over"}
    assert "trainer.max_time is over" in capsys.readouterr().out
