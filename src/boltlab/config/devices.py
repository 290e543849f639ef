"""The devices and processes that a config asks for."""

from omegaconf import DictConfig, ListConfig

from boltlab.ground.errors import Mistake
from boltlab.ground.started_by import outside


def settle(config: DictConfig, overrides: list[str]) -> list[Mistake]:
    """Puts the processes that there are into the config, in place; mistakes: the command line asks for others."""
    world = outside()
    if world is None or config.get("trainer") is None:
        return []
    devices, nodes = world.local_size, world.nodes
    if devices > 1 and _one_gpu_each(config):
        devices, nodes = 1, world.size
    mistakes = []
    for key, there in (("devices", devices), ("num_nodes", nodes)):
        asked = [text for text in overrides if text.partition("=")[0] == f"trainer.{key}"]
        if asked and config.trainer[key] not in (there, str(there), "auto", -1):
            found = f"{world.size} processes, {world.local_size} on each node"
            mistakes.append(Mistake(asked[-1], f"but {world.launcher} has started {found}: leave it out"))
        config.trainer[key] = there
    return mistakes


def _one_gpu_each(config: DictConfig) -> bool:
    """Whether Slurm lets each process see its own GPU only (--gpus-per-task): each is then a node of its own."""
    import torch

    on_gpu = config.trainer.get("accelerator", "auto") in ("auto", "gpu", "cuda")
    return on_gpu and torch.cuda.is_available() and torch.cuda.device_count() == 1


def process_count(config: DictConfig) -> int:
    """How many processes the config asks for: devices of one node times nodes."""
    devices, accelerator = config.trainer.get("devices", "auto"), config.trainer.get("accelerator", "auto")
    if isinstance(devices, (list, ListConfig)):
        devices = len(devices)
    elif not str(devices).isdigit():  # auto or -1
        import torch

        on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        devices = torch.cuda.device_count() if on_gpu else 1
    return max(1, int(devices)) * int(config.trainer.get("num_nodes", 1))
