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
