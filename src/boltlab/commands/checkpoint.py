"""`boltlab checkpoint`: whether a checkpoint is whole, what is in it, and its weights in other forms."""

import json
import zipfile
from pathlib import Path
from typing import Any

from boltlab import runs
from boltlab.config.compose import compose
from boltlab.ground.errors import ConfigError, Mistake, UserError, suggest
from boltlab.ground.texts import line


def main(words: list[str]) -> int:
    """`boltlab checkpoint <action> <file or run> [key=value …]`; fails where a file is not whole."""
    # epoch=3.ckpt is a file, http://…?a=b an address
    overrides = [w for w in words if "=" in w and not w.startswith(("http://", "https://")) and not Path(w).exists()]
    action, *names = [word for word in words if word not in overrides] or [""]
    options = compose("checkpoint", overrides).config
    mistakes = [Mistake(name, "is one word too many: one file or run at a time") for name in names[1:]]
    if action not in _ACTIONS:
        allowed = f"boltlab checkpoint <action> <file or run>; actions: {', '.join(_ACTIONS)}"
        mistakes.append(Mistake(f"checkpoint {action}", suggest("no action", action, list(_ACTIONS), allowed)))
    elif suffix := _ACTIONS[action][1]:
        mistakes += _output_mistakes(options.output, f".{suffix}")
    run = names[0] if names else options.run
    if not run:
        mistakes.append(Mistake("run", f"is missing: boltlab checkpoint {action or 'show'} <file or run>"))
    if mistakes:
        raise ConfigError(mistakes)
    return int(_ACTIONS[action][0](run, options))


def _output_mistakes(output: str | None, suffix: str) -> list[Mistake]:
    if not output:
        return [Mistake("output", f"is missing: give the file to write, output=weights{suffix}")]
    if Path(output).suffix != suffix:
        return [Mistake(f"output={output}", f"must end in {suffix}")]
    return [Mistake(f"output={output}", "is there already: give another name")] if Path(output).exists() else []


def verify(run: str, options: Any) -> int:
    """One line a file, all checkpoints of a run."""
    from boltlab.checkpoints import file as checkpoint_file

    paths = [Path(run)]
    if not paths[0].is_file() and paths[0].suffix != ".ckpt":
        paths = sorted((runs.find(run, options.log_dir) / "checkpoints").glob("*.ckpt"))
    if not paths:
        raise UserError(f"run={run} has no checkpoint")
    problems = [checkpoint_file.verify(path) for path in paths]
    for path, problem in zip(paths, problems, strict=True):
        print(f"{runs.shown(path.resolve())}  {problem or 'good'}")
    return int(any(problems))


def show(run: str, options: Any) -> int:
    """Prints what a file holds. Nothing is built from it."""
    path, content = _read(run, options)
    with zipfile.ZipFile(path) as archive:
        digest = archive.comment.decode()
    config = content.get("config", {})
    lines = {"file": runs.shown(path.resolve()), "bytes": f"{path.stat().st_size:,}", "hash": digest}
    lines |= {key: content[key] for key in ("epoch", "global_step") if key in content}
    lines |= {**_weights(content["state_dict"]), **_callbacks(content.get("callbacks", {}))}
    lines["to go on from"] = "yes" if {"optimizer_states", "loops"} <= content.keys() else "no, weights only"
    lines |= _groups(config)
    lines |= {key: config[key] for key in ("precision", "seed", "name") if config.get(key) is not None}
    for key, value in lines.items():
        print(line(f"{key:<16}{value}", 1000))
    return 0


def _weights(state_dict: dict[str, Any]) -> dict[str, str]:
    import torch

    tensors: dict[str, list[int]] = {}
    for value in state_dict.values():  # a model's own extra state need be no tensor
        if isinstance(value, torch.Tensor):
            tensors.setdefault(str(value.dtype).removeprefix("torch."), []).append(value.numel())
    return {f"weights {kind}": f"{sum(n):,} numbers in {len(n)} tensors" for kind, n in tensors.items()}


def _callbacks(states: dict[str, Any]) -> dict[str, str]:
    import torch

    lines: dict[str, str] = {}
    for name, state in states.items():
        best = state.get("best_model_score") if isinstance(state, dict) else None
        if isinstance(best, torch.Tensor | float) and state.get("monitor"):
            lines["best"] = f"{state['monitor']} {float(best):.4f}"
        named = lines.get("callbacks")
        lines["callbacks"] = f"{named}, " * bool(named) + str(name).partition("{")[0]
    return lines


def _groups(config: dict[str, Any]) -> dict[str, str]:
    lines = {}
    for group in ("data", "model", "optimizer", "scheduler"):
        if isinstance(config.get(group), dict):
            net = config[group].get("net")
            inner = f"  net {net.get('_target_')}" if isinstance(net, dict) else ""
            lines[group] = f"{config[group].get('_target_')}{inner}"
    return lines


def export(run: str, options: Any) -> int:
    """The net's parameters and buffers as safetensors, which every framework reads; what metrics counted stays out."""
    import torch
    from safetensors.torch import save

    from boltlab.checkpoints.file import whole

    content = _read(run, options)[1]
    weights = {key: value for key, value in content["state_dict"].items() if "_metrics." not in key}
    net = {key.removeprefix("net."): value for key, value in weights.items() if key.startswith("net.")}
    if not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise UserError("the weights hold more than tensors: safetensors cannot")
    config = content.get("config", {})
    about = {"format": "pt", "config": json.dumps(config, ensure_ascii=False)}
    if names := config.get("data", {}).get("class_names"):
        about["class_names"] = json.dumps(names, ensure_ascii=False)
    # Shared weights are written once for each name: the format knows no sharing.
    with whole(Path(options.output)) as file:
        file.write(save({key: value.clone().contiguous() for key, value in (net or weights).items()}, about))
    print(f"{len(net or weights)} tensors  {options.output}")
    return 0


def convert(run: str, options: Any) -> int:
    """The weights of a file of another program as one of ours; `trust=true` runs whatever the file says."""
    import torch

    from boltlab.checkpoints import file as checkpoint_file
    from boltlab.runs import checkpoints

    if Path(run).suffix and "://" not in run and not Path(run).exists():
        raise UserError(f"{run}: there is no such file")
    path = checkpoints.which_file(run, options.checkpoint, options.log_dir)
    if options.trust:
        try:
            content = torch.load(path, map_location="cpu", weights_only=False)
        except Exception as e:  # it runs foreign code: anything may come
            raise UserError(f"{path} cannot be loaded: {type(e).__name__}: {e}".splitlines()[0]) from e
    else:
        content = checkpoint_file.read_foreign(path)
    if isinstance(content, torch.nn.Module):
        content = content.state_dict()
    known = content if isinstance(content, dict) else {}
    nested = next((known[key] for key in ("state_dict", "model") if hasattr(known.get(key), "items")), known)
    weights = {str(key): value for key, value in nested.items() if isinstance(value, torch.Tensor)}
    if not weights:
        raise UserError(f"{path} holds no weights: a dict of tensors, or one under state_dict or model, was looked for")
    numbers = {key: known[key] for key in ("epoch", "global_step") if isinstance(known.get(key), int)}
    checkpoint_file.write({"state_dict": weights, **numbers}, Path(options.output))
    print(f"{len(weights)} tensors  {options.output}")
    return 0


def _read(run: str, options: Any) -> tuple[Path, dict[str, Any]]:
    from boltlab.checkpoints import file as checkpoint_file
    from boltlab.runs import checkpoints

    path = checkpoints.which_file(run, options.checkpoint, options.log_dir)
    return path, checkpoint_file.read(path)


_ACTIONS = {
    "verify": (verify, ""),
    "show": (show, ""),
    "export": (export, "safetensors"),
    "convert": (convert, "ckpt"),
}
