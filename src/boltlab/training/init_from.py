"""`init_from=`: a new run that begins with the weights of another, and with nothing else of it."""

import hashlib
import re
import textwrap
from pathlib import Path

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchmetrics import Metric

from boltlab import runs
from boltlab.checkpoints import file as checkpoint_file
from boltlab.checkpoints.file import CheckpointError, read_foreign
from boltlab.ground.errors import ConfigError, Mistake, UserError
from boltlab.runs import checkpoints

SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth")


def find(init_from: str, log_dir: str) -> Path:
    """The file that `init_from` means: itself, or what an http address holds, or the best
    checkpoint of `latest`, a run folder or a part of its name.

    Raises:
        UserError: no such file or run, no checkpoint in it, or a damaged one.
    """
    if "://" in init_from:
        from boltlab.checkpoints.fetch import fetch

        return fetch(init_from, Path(log_dir) / "fetched").resolve()
    path = Path(init_from)
    if path.suffix not in SUFFIXES:
        path = checkpoints.find(runs.find(init_from, log_dir))
    elif not path.is_file():
        raise UserError("there is no such file")
    if path.suffix == ".ckpt" and (problem := checkpoint_file.verify(path)):
        raise CheckpointError(f"{path} {problem}")
    return path.resolve()


def settle(config: DictConfig) -> None:
    """Puts the file that `init_from` means in its place: what `latest` means changes.

    Raises:
        ConfigError: it means nothing, or a damaged file.
    """
    if given := config.get("init_from"):
        try:
            config.init_from = str(find(given, config.log_dir))
        except UserError as e:
            raise ConfigError([Mistake(f"init_from={given}", str(e).removeprefix(f"run={given} "))]) from e


def initialize(model: LightningModule, config: DictConfig, folder: Path | None = None) -> None:
    """Puts the weights and buffers of the file `init_from` into the module; its own pretrained ones are not asked for.

    Metrics, and buffers that the module itself holds, begin anew, as do optimizer and schedule. A last layer for
    another number of outputs keeps its new weights. What was loaded is printed, and written into the summary of the
    run in `folder`.

    Raises:
        CheckpointError: the file is damaged; with `init_strict`, something beside the last layer does not fit; or
            nothing fits.
    """
    path = Path(config.init_from)
    ours, theirs, own = _matched(model, _read(path))
    taken, head, wrong = _compared(ours, theirs, own)
    if wrong and (config.init_strict or not taken):
        more = f"\n  … and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        cure = "init_strict=false takes what fits" if taken else "nothing of it fits"
        raise CheckpointError(f"init_from={path} does not fit the model ({cure}):\n  " + "\n  ".join(wrong[:5]) + more)
    model.load_state_dict({own[name]: theirs[name] for name in taken}, strict=False)
    if hasattr(net := getattr(model, "net", None), "load_pretrained"):
        net.load_pretrained = lambda: None  # type: ignore[union-attr]  # init_from wins
    if folder is not None:
        _report(folder, path, f"{len(taken)} of {len(ours)} tensors", head, wrong)


def _compared(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], own: dict[str, str]
) -> tuple[set[str], list[str], list[str]]:
    """(names of what is taken, tensors of a new head, what else does not fit); the last two for people."""
    both = [name for name in ours if name in theirs]
    changed = [name for name in both if ours[name].shape != theirs[name].shape]
    reshaped = [f"{own[name]} {list(theirs[name].shape)} -> {list(ours[name].shape)}" for name in changed]
    head, wrong = (reshaped, []) if _is_head(changed, ours, theirs) else ([], reshaped)
    wrong += [f"{own[name]} is only in the model" for name in ours if name not in theirs]
    wrong += [f"{name} is only in the file" for name in theirs if name not in ours]
    return set(both) - set(changed), head, wrong


def _is_head(changed: list[str], ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    """Whether tensors of other shapes are a last layer of which only the outputs are others: it differs in its first
    dimension alone. A layer further inside never comes alone: the one that follows it differs in the second."""
    only_first = all(ours[n].shape[1:] == theirs[n].shape[1:] for n in changed)
    return only_first and len({ours[n].shape[:1] for n in changed}) == 1


def _matched(
    model: LightningModule, state: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, str]]:
    """The module's tensors and those of a file, by names that they share; and what the module calls each.

    The names are the module's own, else, where the file has none of them, both without a leading `net.`: a file of a
    net alone, or a module around it.
    """
    # Metrics, and the module's own buffers: settings as class weights, not weights of a net.
    metrics = tuple(f"{name}." for name, part in model.named_modules() if name and isinstance(part, Metric))
    bare = {key.replace("_orig_mod.", ""): value for key, value in state.items()}
    theirs, whole = (
        {key: value for key, value in of.items() if not key.startswith(metrics) and key not in model._buffers}
        for of in (bare, model.state_dict())
    )
    named = {key.replace("_orig_mod.", ""): key for key in whole if isinstance(whole[key], Tensor)}
    if not named.keys() & theirs.keys():
        named = {_bare(name): key for name, key in named.items()}
        theirs = {_bare(name): value for name, value in theirs.items()}
    return {name: whole[key] for name, key in named.items()}, theirs, named


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's `state_dict`, of a state dict that torch.save has written, or of safetensors."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (OSError, SafetensorError) as e:
            raise CheckpointError(f"init_from={path} cannot be read: {e}") from e
    content = checkpoint_file.read(path) if path.suffix == ".ckpt" else read_foreign(path)
    known = content if isinstance(content, dict) else {}
    nested = next((known[key] for key in ("state_dict", "model") if isinstance(known.get(key), dict)), known)
    return {str(key): value for key, value in nested.items() if isinstance(value, Tensor)}


def _bare(key: str) -> str:
    """The name of a weight in a net's own file: a task keeps it under `net.`, a torchvision net under `net.net.`."""
    return re.sub(r"^(net\.)+", "", key)


@rank_zero_only
def _report(folder: Path, path: Path, taken: str, head: list[str], left: list[str]) -> None:
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    runs.write_summary(folder, init_from={"path": str(path), "sha256": sha256, "new_head": head, "not_taken": left})
    print(f"init_from  {runs.shown(path)}: {taken}", flush=True)
    if head:
        print(f"head: {', '.join(head)}, new")
    if left:
        print(textwrap.fill(f"not taken: {', '.join(left)}", 120, subsequent_indent="  ", break_long_words=False))
