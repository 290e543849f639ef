"""What a change of a config key does: to the result of a training, to a resume, to a comparison of runs.

A key stands for all keys below it.
"""

import re

# Nothing to what is trained: places, what is shown, who is told, how fast data are read.
NO_EFFECT = (
    *(f"data.{key}" for key in ("num_workers", "data_dir", "cache_dir", "device_memory_share")),
    *("trainer.enable_progress_bar", "trainer.default_root_dir", "callbacks.progress", "callbacks.summary"),
    *("logger", "name", "tags", "project", "log_dir", "data_dir", "run_dir", "data_fingerprint", "launcher"),
    *("resume", "resume_changed", "max_restarts", "timeout_seconds", "trainer.strategy.timeout"),
)
# Where data lie: their fingerprint tells whether they are the same.
PLACES_OF_DATA = ("data.root", "data.path")
# How long a training is.
LENGTH = tuple(f"trainer.{key}" for key in ("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time"))
# Nothing to the steps that are still to come, so that it can be changed on resume.
CHANGEABLE_ON_RESUME = (
    *NO_EFFECT,
    *LENGTH,
    *(f"data.{key}" for key in ("root", "path", "max_bad_files", "download", "class_names")),
    *(f"trainer.{key}" for key in ("limit_test_batches", "limit_predict_batches", "log_every_n_steps", "profiler")),
    *("trainer.detect_anomaly", "trainer.inference_mode", "test", "init_from", "init_strict", "monitor", "mode"),
    *(f"callbacks.{key}" for key in ("throughput", "lr_monitor", "confusion_matrix", "mistakes", "last", "best")),
    *("callbacks.early_stopping", "callbacks.nan_guard", "callbacks.finite_metrics", "callbacks.latency"),
    "augment",  # it stands in data as well
    "steps_per_execution",  # of older versions
)
# None on resume: the checkpoint restores it, or could not be loaded.
RESTORED = ("model", "optimizer", "scheduler")


def under(*keys: str) -> re.Pattern[str]:
    """Matches these keys and all below them."""
    return re.compile(rf"({'|'.join(map(re.escape, keys))})(\.|$)")
