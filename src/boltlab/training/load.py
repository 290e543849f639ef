"""A trained module out of a checkpoint."""

import copy
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from boltlab.checkpoints.file import CheckpointError, read
from boltlab.config import project, renamed
from boltlab.config.build import build
from boltlab.config.trust import refuse_untrusted
from boltlab.ground.files import read_json
from boltlab.runs.checkpoints import which_file


def load(
    run: str | Path = "latest",
    checkpoint: str | None = None,
    device: str = "cpu",
    log_dir: str = "logs",
) -> LightningModule:
    """The trained model of a run, in evaluation mode.

    Args:
        run: `latest`, a run folder, part of its name, a checkpoint file, or the http address of one.
        checkpoint: `best` or `last`; None takes the best where the run has chosen one.
        device: where the model is put, as torch names devices.
        log_dir: where runs are looked for.

    Returns:
        The LightningModule; a shipped classifier, called on normalized images [B, C, H, W], gives logits
        [B, num_classes].

    Raises:
        UserError: no such run, no checkpoint, a damaged one, or that of another project.
    """
    path = which_file(run, checkpoint, log_dir)
    project.refuse_another(read_json(path.parent.parent / "environment.json").get("project"), str(path))
    return restore(read(path, map_location=device)).to(device)


def fitted(content: dict[str, Any]) -> dict[str, Any]:
    """What the data module of a run has fitted on its training samples; of an old checkpoint, the class names alone."""
    data = (content.get("config") or {}).get("data") or {}
    states = (part["fitted"] for part in content.values() if isinstance(part, dict) and "fitted" in part)
    found = next((state for state in states if isinstance(state, dict)), {})
    return copy.deepcopy({"class_names": data.get("class_names"), **found})  # the file may be mapped into memory


def restore(content: dict[str, Any]) -> LightningModule:
    """Builds the module that a checkpoint's own config describes and gives it the checkpoint's weights, as Lightning's
    `load_from_checkpoint` does: a module that builds layers in `configure_model`, or changes the content in
    `on_load_checkpoint`, is asked to."""
    config = content.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
        raise CheckpointError("the checkpoint carries no config of a model: it was not written by boltlab")
    kinds = (nn.Module, Optimizer, LRScheduler)
    config = content["config"] = renamed.current(config)
    refuse_untrusted({"model": config["model"]}, "the checkpoint's config", kinds)
    model: LightningModule = build({"model": config["model"]}, "model")
    model.configure_model()
    # What metrics have counted belongs to the training run: a model to use starts from zero.
    counted = tuple(f"{name}." for name, part in model.named_modules() if name and isinstance(part, Metric))
    # A compiled net's names, unless this one is compiled as well.
    compiled = any("_orig_mod." in key for key in model.state_dict())
    names = {key if compiled else key.replace("_orig_mod.", ""): key for key in content["state_dict"]}
    weights = {name: content["state_dict"][key] for name, key in names.items() if not name.startswith(counted)}
    content = {**content, "state_dict": weights}
    model.on_load_checkpoint(content)
    missing, unexpected = _give(model, content["state_dict"])
    wrong = [key for key in (*missing, *unexpected) if not key.startswith(counted)]
    if wrong and model.strict_loading:
        raise CheckpointError(f"{_CHANGED}: {', '.join(wrong[:5])}")
    return model.eval()


_CHANGED = "the checkpoint does not fit the code of its model any more"


def _give(model: LightningModule, weights: dict[str, Any]) -> Any:
    """Loads what there is of the weights; returns the names that are missing and those that nothing takes."""
    try:
        return model.load_state_dict(weights, strict=False)
    except RuntimeError as e:  # torch names each weight and both of its shapes
        header, *others = map(str.strip, str(e).splitlines())
        if not header.startswith("Error(s) in loading state_dict"):
            raise
        raise CheckpointError(f"{_CHANGED}: {' '.join(others[:5])}") from e
