"""What a config that comes from outside may build: a run folder or a checkpoint is data, never code.

`_target_` in a config can name anything that Python can import, `os.system` too. The config of a fresh run comes from
the command line and is trusted. One that was read from a run folder or a checkpoint may have been sent by anybody: it
builds what is named here, decided by what a name stands for, not by how it is written.

Beside the engine's own, the packages of installed projects are trusted, and what `trusted=` names: see `project`.
"""

import importlib
import inspect
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from boltlab.config import places, project
from boltlab.ground.errors import UserError

# Packages whose modules, optimizers, … (`_kinds`) may be built; nothing else of them, and nothing is imported outside.
PACKAGES = ("boltlab", "lightning", "torch.nn", "torch.optim", "torchmetrics", "torchvision")

# What is of none of these kinds and may be called, each with the arguments that it may not be given then.
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "datetime.timedelta": (),
    # These read weights from files and addresses that the config chooses.
    "timm.create_model": ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "_args_"),
}

# Kinds of our own that may be built anywhere: they hold numbers. By name, for most runs import one of them at most.
_OURS = ("boltlab.data.augment.Augment", "boltlab.optim.schedulers.Schedule")

# Left out of PACKAGES: their metrics have transformers run the code of a model folder, `jinaai` in its name will do;
# the other two are demonstrations and the command line of Lightning.
_LEFT_OUT = ("torchmetrics.multimodal", "lightning.pytorch.demos", "lightning.pytorch.cli")

_NAME = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", re.ASCII)  # no private names


class UntrustedConfig(UserError):
    """A config from outside names what is not trusted, or computes a value; nothing of it was imported or run."""


def refuse_untrusted(
    config: Any, where: str | Path, kinds: tuple[type, ...] | None = None, given: Iterable[str] = ()
) -> None:
    """Refuses a config that would build or compute anything but what `boltlab` trusts.

    Args:
        config: a resolved config, plain or not; it is not changed and nothing in it is resolved.
        where: what it was read from, for the message.
        kinds: what its classes must be subclasses of, if not any of the kinds that a run is made of.
        given: keys that the command line gives again: where these write is its own affair.

    Raises:
        UntrustedConfig: with all that is refused, each by its key path.
    """
    plain = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    found = [f"  {key}\n      {message}" for key, message in _walk(plain, "", kinds or _kinds())]
    if not found and isinstance(plain, dict):
        found = [f"  {key}\n      {message}" for key, message in places.outside(plain, where, given)]
    if not found:
        return
    lines = [*found[:20], f"  … and {len(found) - 20} more"] if len(found) > 20 else found
    raise UntrustedConfig(
        f"{where} asks for what is not trusted: nothing of it was run\n" + "\n".join(lines) + "\n"
        "Whoever sent it could run any code this way. If the run and these classes are your own, install the project\n"
        "that they belong to (pip install -e; its pyproject.toml has [tool.boltlab]), or name their package in this\n"
        "command: trusted=[package]; a single function: trusted=[package.module.function]"
    )


def _walk(node: Any, path: str, kinds: tuple[type, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        yield from _walk_dict(node, path, kinds)
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            yield from _walk(value, f"{path}.{i}", kinds)
    elif isinstance(node, str):
        # `instantiate` resolves what it is given, and resolvers read the environment.
        if "${" in node.replace("${run_dir}", ""):
            message = "is an interpolation: a saved config is resolved, but for ${run_dir}"
            if node.startswith("${oc.env:"):
                message += f"; if this run is your own, give it again: {shlex.quote(f'{path}={node}')}"
            yield f"{path}={node}"[:200], message
    elif node is not None and type(node) not in (bool, int, float):
        yield path, f"is a {type(node).__name__}, no plain value"


def _walk_dict(node: dict[Any, Any], path: str, kinds: tuple[type, ...]) -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        here = f"{path}.{key}" if path else str(key)
        if key != "_target_":
            yield from _walk(value, here, kinds)
        elif message := _problem(value, node, kinds):
            yield f"{here}={value}"[:200], message


def _problem(name: Any, node: dict[Any, Any], kinds: tuple[type, ...]) -> str | None:
    """Why this `_target_` may not be built."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return "is no plain name of a class or function"
    if name in FUNCTIONS:
        return _problem_of_arguments(name, node)
    if name in project.named() and "." in name:
        return None
    own = () if _within(name, PACKAGES) else project.packages()
    if not _within(name, (*PACKAGES, *own)):
        return f"is of the package {name.partition('.')[0]}, which is not trusted"
    thing = _named(name)
    return "names nothing that is known here" if thing is None else _problem_of_thing(thing, own, kinds)


def _problem_of_arguments(function: str, node: dict[Any, Any]) -> str | None:
    wrong = [key for key in FUNCTIONS[function] if key in node]
    if ":" in str(node.get("model_name")):  # timm: hf-hub:…, local-dir:…
        wrong.append("model_name")
    return f"may not be given {', '.join(wrong)} by a config from outside" if wrong else None


def _problem_of_thing(thing: Any, own: tuple[str, ...], kinds: tuple[type, ...]) -> str | None:
    """own: packages of the project, where the name is of none that is trusted anyway."""
    home = str(getattr(thing, "__module__", ""))
    if not _within(home, (*PACKAGES, *own)) or _within(home, _LEFT_OUT):
        return f"is of {home or type(thing).__name__}, which is not trusted"
    if not inspect.isclass(thing):
        return None if thing in _net_functions() else "is no class, and no function of torchvision that makes a net"
    if _within(home, own):
        return None  # a class of one's own: a function is not, for it would be called with what the config says
    import torch

    ours = any(f"{kind.__module__}.{kind.__qualname__}" in _OURS for kind in thing.__mro__)
    allowed = (ours or issubclass(thing, kinds)) and not issubclass(
        thing, (torch.fx.GraphModule, torch.jit.ScriptModule)
    )
    return None if allowed else "is of no kind that may be built here"


def _within(name: str, packages: tuple[str, ...]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def _named(name: str) -> Any:
    """What Hydra would find by this name; None where it is not found, or only through a module of another name."""
    *modules, last = name.split(".")
    try:
        thing: Any = importlib.import_module(modules[0])
        for depth, part in enumerate(modules[1:], 2):
            path = ".".join(modules[:depth])
            thing = getattr(thing, part) if hasattr(thing, part) else importlib.import_module(path)
            if not inspect.ismodule(thing) or thing.__name__ != path:
                return None
    except Exception:  # whatever a module of these packages meets when it is imported
        return None
    return getattr(thing, last, None)


def paths_inside(folder: Path, states: dict[str, Any]) -> dict[str, Any]:
    """The callbacks' states of a checkpoint with the paths of each ModelCheckpoint in `<folder>/checkpoints`.

    Lightning removes with all below it what such a state calls an older checkpoint, wherever `..` or `local://` lead.
    And it forgets the best values where the state's folder is not the callback's, so a run that was moved needs this.
    """
    here = (folder / "checkpoints").resolve()

    def inside(path: Any) -> str:
        name = re.split(r"[/\\]", path)[-1] if isinstance(path, str) else ""
        return str(here / name) if name.endswith(".ckpt") and ":" not in name else ""

    moved = {}
    for key, state in states.items():
        if isinstance(state, dict) and "best_model_path" in state:
            names = ("best_model_path", "kth_best_model_path", "last_model_path")
            paths = {name: inside(state.get(name)) for name in names}
            best = state.get("best_k_models")
            models = {inside(path): value for path, value in (best if isinstance(best, dict) else {}).items()}
            models.pop("", None)
            state = {**state, **paths, "dirpath": str(here), "best_k_models": models}
        moved[key] = state
    return moved


@cache
def _kinds() -> tuple[type, ...]:
    """What a run is made of. Metrics, nets and transforms are torch's modules."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.profilers import Profiler
    from lightning.pytorch.strategies import Strategy
    from torchvision import transforms

    # torchvision's first transforms have no class in common.
    v1 = transforms.transforms
    first = [kind for _, kind in inspect.getmembers(v1, inspect.isclass) if kind.__module__ == v1.__name__]
    lightning = (pl.LightningDataModule, pl.Trainer, pl.Callback, Logger, Profiler, Strategy)
    training = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
    return (torch.nn.Module, *training, *lightning, *first)


@cache
def _net_functions() -> frozenset[Callable[..., Any]]:
    from torchvision import models

    return frozenset(models.get_model_builder(name) for name in models.list_models())
