"""What the words of the most used template (ashleve/lightning-hydra-template) are called here."""

# Root keys that it has and boltlab has not. (`train ckpt_path=X` and `eval ckpt_path=X` work.)
KEYS = {
    "ckpt_path": "is given to train and eval on the command line; else run=FOLDER, and checkpoint=best or last",
    "hparams_search": "is a verb here: boltlab sweep sweep=NAME, with configs/sweep/NAME.yaml",
    "task_name": "is name=…, the short name of the run",
    "paths": "is log_dir=… for runs and data_dir=… for data",
    "extras": "has nothing to switch here: tags=[…] are given as they are, the config is in the run folder",
    "optimized_metric": "is monitor=…",
    "train": "is a verb here: boltlab eval run=… evaluates without a training",
}
# Choices of groups.
CHOICES = {
    ("logger", "many_loggers"): "is a list here: logger=[wandb,tensorboard,mlflow]; metrics.csv is always written",
    ("debug", "fdr"): "is debug=fast",
    ("debug", "default"): "is debug=fast (one batch) or debug=limit (a part of each epoch)",
    ("callbacks", "rich_progress_bar"): "is callbacks=progress",
    ("callbacks", "model_checkpoint"): "is callbacks=[best,last]",
    ("callbacks", "model_summary"): "is callbacks=summary",
    ("trainer", "ddp_sim"): "is trainer=ddp trainer.accelerator=cpu trainer.devices=2",
}
# Its train.yaml and eval.yaml have this key; ours replace them.
PRIMARY = ("task_name", "it is lightning-hydra-template's; docs/migrate.md says what replaces it")
# Groups and keys of Hydra's own, behind `hydra/` or `hydra.`.
HYDRA = {
    "launcher": "is a group here: launcher=joblib, ray or slurm, with its keys, launcher.…=…",
    "sweeper": "is a verb here: boltlab sweep, with sampler=tpe, sampler.…=… and sweep.trials=…",
    "mode": "is the flag -m: boltlab train -m seed=1,2",
    "run": "has no effect here: log_dir=… and name=… choose the run folder",
}
