"""Names that have moved: the configs of older runs are read with today's."""

from typing import Any

# Module or class; what lies below a module has moved with it.
TARGETS = {
    "boltlab.launchers": "boltlab.processes.launchers",
    "boltlab.models.muon": "boltlab.optim.muon",
    "boltlab.models.schedulers": "boltlab.optim.schedulers",
    "boltlab.models": "project.models",
    "boltlab.data.digits": "project.data.digits",
    "boltlab.data.torchvision_images": "project.data.torchvision_images",
    "boltlab.data.tabular.Diabetes": "project.data.tables.Diabetes",
    "boltlab.data.tabular.SyntheticClasses": "project.data.tables.SyntheticClasses",
}


# Arguments that are gone: the root keys say it of any module.
GONE = {
    f"project.models.{name}": ("compile", "channels_last") for name in ("classifier.Classifier", "regressor.Regressor")
}


def current(config: Any) -> Any:
    """A plain config with each `_target_` under its name of today."""
    if isinstance(config, list):
        return [current(part) for part in config]
    if not isinstance(config, dict):
        return config
    today = {key: _today(value) if key == "_target_" else current(value) for key, value in config.items()}
    gone = GONE.get(str(today.get("_target_")), ())
    return {key: value for key, value in today.items() if key not in gone}


def _today(target: Any) -> Any:
    for old, new in TARGETS.items() if isinstance(target, str) else ():
        if target == old or target.startswith(f"{old}."):
            return new + target[len(old) :]
    return target
