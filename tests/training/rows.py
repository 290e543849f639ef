"""The rows: plain modules, forms of loaders and options of the trainer, with a checkpoint at every step."""

from pathlib import Path

ZOO = f"""
import boltlab.config.trust
sys.path.insert(0, {str(Path(__file__).parent)!r})
boltlab.config.trust.PACKAGES += ("zoo",)
"""
QUICK = ("train", "logger=none", "trainer.accelerator=cpu", "trainer.max_epochs=3", "trainer.log_every_n_steps=1")
QUICK += ("trainer.enable_progress_bar=false", "monitor=val_loss", "mode=min", "test=false")
QUICK += ("~model", "~data", "~scheduler", "callbacks=[last]", "callbacks.last.every_n_train_steps=1")
TWO = ("trainer=ddp", "trainer.devices=2", *(text for text in QUICK if text.startswith("trainer.")))


def plain(model, data="tables.Table", **data_arguments):
    """Overrides that train `zoo.<model>` on `zoo.<data>`."""
    arguments = [f"+data.{key}={value}" for key, value in data_arguments.items()]
    return *QUICK, f"+model._target_=zoo.{model}", f"+data._target_=zoo.{data}", *arguments


def net(form="shuffle", workers=0, **data_arguments):
    return plain("nets.Net", "forms.Form", form=f"'{form}'", num_workers=workers, **data_arguments)


WITHOUT_VALIDATION = "trainer.limit_val_batches=0"
EPOCH_END_ONLY = "callbacks.last.every_n_train_steps=null"

MODULES = {
    "VAE": plain("modules.VAE"),
    "plateau by steps": (*plain("modules.StepPlateau"), "trainer.val_check_interval=3"),
    "GAN": (*plain("modules.GAN"), WITHOUT_VALIDATION),
    "two optimizers, one accumulating by hand": plain("modules.Accumulating"),
    "multi-label": plain("modules.MultiLabel"),
    "segmentation": plain("modules.Segmentation", "tables.Shapes"),
    "character GPT": plain("modules.CharGPT", "tables.Text"),
    "LSTM, plateau": plain("modules.LSTM", "tables.Sequences"),
    "SimCLR, plateau on a training value": plain("modules.SimCLR", "tables.Views"),
    "detection": plain("modules.Detection", "tables.Boxes"),
    "forecast": plain("modules.Forecast", "tables.Series"),
    "the template's kind": plain("modules.MNISTLit"),
    "draws and state in all hooks": net(),
    "own on_train_batch_end, frozen parts": plain("nets.Hooked", "forms.Form"),
    "dataloader_iter": plain("nets.FromIterator"),
    "the engine's data": (
        *(text for text in plain("nets.OnImages") if "data" not in text),
        *("data=digits", "data.max_samples=330", "data.batch_size=48", "data.input_shape=[1,8,8]"),
    ),
}
# A shipped module on plain loaders.
SHIPPED = {
    "the project's module": (
        *(text for text in plain("", "tables.Classes") if text not in ("~model", "~scheduler", "+model._target_=zoo.")),
        *("model=mlp", "model.net.hidden_sizes=[8]", "model.net.dropout=0.2"),
        *("+data.input_shape=[6]", "+data.num_classes=6", "+data.num_workers=1"),
    ),
}

LIMIT_5 = "trainer.limit_train_batches=5"
LOADERS = {
    "2 workers": net(workers=2),
    "persistent workers": net("persistent", 2),
    "spawned worker": net("spawn", 1),
    "weighted": net("weighted"),
    "weighted, own generator": net("weighted, own generator"),
    "subset": net("subset"),
    "drop_last": net("drop_last"),
    "generator": net("generator"),
    "replacement": net("replacement"),
    "batch sampler that counts epochs": net("buckets"),
    "batch sampler with its own generator": net("buckets, own generator"),
    "collate draws": net("collate draws"),
    "dataset with its own generators": net("own generators"),
    "worker_init_fn": net("worker_init_fn", 2),
    "no batches": (*net("no batches"), "trainer.limit_train_batches=20"),
    "no batches, batching sampler": net("no batches, batching sampler"),
    "endless sampler": (*net("endless"), LIMIT_5),
    "endless sampler, 2 workers": (*net("endless", 2), LIMIT_5),
    "stream": net("stream"),
    "stream, 2 workers": net("stream", 2),
    "stream, persistent workers": net("stream, persistent", 2),
    "subclass": net("subclass"),
    "own __iter__": net("own __iter__"),
    "own __iter__, 2 workers": net("own __iter__", 2),
    "own class without length": net("own class"),
    "list": net("list"),
    "dict, max_size_cycle": net("dict, max_size_cycle"),
    "dict, min_size": net("dict, min_size"),
    "dict, max_size": net("dict, max_size"),
    "several validation loaders": plain("nets.Two", "forms.Form", val="several"),
    "sequential validation loaders": plain("nets.Two", "forms.Form", val="sequential"),
    "shuffled validation": net(val="shuffled"),
    "pinned, timeout": net("pinned, timeout", 2),
    "reloaded": (*net(), "trainer.reload_dataloaders_every_n_epochs=1"),
    "reloaded every second epoch": (*net("buckets"), "trainer.reload_dataloaders_every_n_epochs=2"),
    "train_dataloader draws": net(draws="true"),
    "train_dataloader draws, reloaded": (*net(draws="true"), "trainer.reload_dataloaders_every_n_epochs=1"),
}

# Resumed with another number of workers.
WORKERS = {
    "2 to 0": (net(workers=2), 0),
    "0 to 2": (net(), 2),
    "collate draws, 2 to 0": (net("collate draws", 2), 0),
    "own generators, 2 to 0": (net("own generators", 2), 0),
}

OPTIONS = {
    "limit_train_batches, whole": (*net(), "trainer.limit_train_batches=4"),
    "limit_train_batches, share": (*net(), "trainer.limit_train_batches=0.6"),
    "limit_train_batches, no validation": (*net(), "trainer.limit_train_batches=4", WITHOUT_VALIDATION),
    "no validation": (*net(), WITHOUT_VALIDATION),
    "validation every second epoch": (*net(), "trainer.check_val_every_n_epoch=2"),
    "val_check_interval": (*net(), "trainer.val_check_interval=0.3"),
    "val_check_interval over epochs": (
        *net(),
        "trainer.val_check_interval=5",
        "trainer.check_val_every_n_epoch=null",
    ),
    "accumulation": (*net(), "trainer.accumulate_grad_batches=3"),
    "accumulation, val_check_interval": (
        *net(),
        "trainer.accumulate_grad_batches=3",
        "trainer.val_check_interval=0.3",
    ),
    "max_steps": (*net(), "trainer.max_steps=16", "trainer.max_epochs=-1"),
    "overfit_batches": (*net(), "trainer.overfit_batches=2"),
    "num_sanity_val_steps": (*net(), "trainer.num_sanity_val_steps=2"),
    "num_sanity_val_steps, all": (*net(), "trainer.num_sanity_val_steps=-1"),
    "checkpoints at epochs' ends": (*net(), EPOCH_END_ONLY),
    "checkpoints every 3 steps": (*net(), "callbacks.last.every_n_train_steps=3"),
    "checkpoints every second epoch": (*net(), EPOCH_END_ONLY, "callbacks.last.every_n_epochs=2"),
    "best and last": (*net(), "callbacks=[best,last]"),
    "EMA, early stopping": (*net(), "callbacks=[last,ema,early_stopping]", "callbacks.early_stopping.patience=9"),
}
ROWS = MODULES | LOADERS | OPTIONS | SHIPPED
# Rows that differ little from others: only the exhaustive matrix has them.
KIN = {
    "weighted, own generator", "endless sampler, 2 workers", "stream, persistent workers", "own __iter__, 2 workers",
    "no batches, batching sampler", "dict, min_size", "dict, max_size", "sequential validation loaders",
    "limit_train_batches, share", "limit_train_batches, no validation", "num_sanity_val_steps, all", "reloaded",
    "train_dataloader draws, reloaded", "checkpoints every 3 steps", "subclass", "replacement",
}  # fmt: skip
