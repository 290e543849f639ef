"""What a LightningModule holds beside its state dict: metrics, attributes, modes, frozen parameters, gradients."""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_OF_LIGHTNING = {*vars(pl.LightningModule()), "_hparams", "_hparams_initial", "_hparams_name", "_log_hyperparams"}
_OF_TORCH = set(vars(nn.Module()))
_KINDS: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "deque": deque}
_LONG = 100_000  # a longer list or array is looked at by its identity and length alone


class ModuleState:
    """Captures what has changed in a module since this object was made, and restores it in another process.

    Attributes are saved that are numbers, texts, tensors, arrays and containers of these, of the module and of all in
    it: the states of torchmetrics are such attributes. What did not change is left to the new process, whose config
    may be another one.
    """

    def __init__(self, module: "pl.LightningModule") -> None:
        self.module = module
        self._fresh = {path: _mark(value) for path, _, _, value in self._attributes()}

    def _attributes(self) -> Iterator[tuple[str, nn.Module, str, Any]]:
        """(path, owner, name, value), plain ones and buffers that are in no state dict."""
        for prefix, owner in self.module.named_modules(remove_duplicate=True):
            foreign = _OF_LIGHTNING if owner is self.module else _OF_TORCH
            saved = owner.state_dict(keep_vars=True) if owner._buffers else {}
            hidden = {name: value for name, value in owner._buffers.items() if name not in saved}
            for name, value in [*vars(owner).items(), *hidden.items()]:
                if name not in foreign and _is_plain(value):
                    yield f"{prefix}.{name}", owner, name, value

    def capture(self, modes: dict[str, bool] | None = None) -> dict[str, Any]:
        """As tensors and plain values. modes: those of before a validation, for during it all are in eval."""
        changed = {path: v for path, _, _, v in self._attributes() if _differs(_mark(v), self._fresh.get(path))}
        training = modes or {name: module.training for name, module in self.module.named_modules()}
        parameters = dict(self.module.named_parameters())
        state: dict[str, Any] = {
            "attributes": {path: _encode(value) for path, value in changed.items()},
            "evaluating": [name for name, is_training in training.items() if not is_training],
            "frozen": [name for name, p in parameters.items() if not p.requires_grad],
        }
        if not self.module.automatic_optimization:  # a module may step when it likes
            waiting = {name: p.grad for name, p in parameters.items() if p.grad is not None}
            state["gradients"] = {name: grad.detach().clone() for name, grad in waiting.items()}
        return state

    @staticmethod
    def mixed(now: dict[str, Any], before: dict[str, Any], metrics: set[str]) -> dict[str, Any]:
        """The state `now`, these metrics as they were `before`: Lightning resets them only after a validation's end."""

        def of_metrics(state: dict[str, Any], wanted: bool) -> dict[str, Any]:
            return {k: v for k, v in state["attributes"].items() if (k.rpartition(".")[0] in metrics) == wanted}

        return {**now, "attributes": of_metrics(now, False) | of_metrics(before, True)}

    def restore(self, state: dict[str, Any], modes: dict[str, bool] | None) -> None:
        """modes: where a validation has begun, those that are put back at its end."""
        module, owners = self.module, dict(self.module.named_modules())
        for path, encoded in state["attributes"].items():
            prefix, _, name = path.rpartition(".")
            owner = owners.get(prefix)
            if owner is not None and name not in (_OF_LIGHTNING if owner is module else _OF_TORCH):
                setattr(owner, name, _decode(encoded, getattr(owner, name, None), module.device))
        for name, owner in owners.items():
            if modes is None:
                owner.training = name not in state["evaluating"]
            elif name in modes:
                modes[name] = name not in state["evaluating"]
        gradients = state.get("gradients", {})
        for name, parameter in module.named_parameters():
            if "frozen" in state:
                parameter.requires_grad_(name not in state["frozen"])
            if name in gradients:
                parameter.grad = gradients[name].to(parameter.device)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (nn.Parameter, *_PLAIN)):
        return not isinstance(value, nn.Parameter)
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return getattr(value, "dtype", None) != np.dtype(object)
    if isinstance(value, dict):
        return all(isinstance(key, _PLAIN) and _is_plain(part) for key, part in value.items())
    return isinstance(value, (list, tuple, set, deque)) and all(map(_is_plain, islice(value, _LONG)))


def _mark(value: Any) -> Any:
    """Tells a value from what it becomes: a tensor by itself and the number of its changes in place."""
    if isinstance(value, Tensor):
        # One that was made in inference mode, in a validation before the fit, counts no changes and allows none.
        return "tensor", _Same(value), 0 if value.is_inference() else value._version
    if isinstance(value, np.ndarray):
        return "array", value.shape, value.tobytes() if value.nbytes <= _LONG else _Same(value)
    if isinstance(value, dict):
        return "dict", [(key, _mark(part)) for key, part in value.items()]
    if isinstance(value, (list, tuple, deque)):
        return ("long", _Same(value), len(value)) if len(value) > _LONG else ("list", [_mark(part) for part in value])
    return set(value) if isinstance(value, set) else value


@dataclass(eq=False)
class _Same:
    """Equal to what holds the very same object, which it keeps alive."""

    thing: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.thing is self.thing


def _differs(mark: Any, fresh: Any) -> bool:
    return not (mark == fresh or (mark != mark and fresh != fresh))  # NaN is no change


def _encode(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"tensor": value.detach().cpu().clone(), "cpu": value.device.type == "cpu"}
    if isinstance(value, np.ndarray):
        return {"array": torch.from_numpy(value.copy())}
    if isinstance(value, dict):
        return {"dict": [(key, _encode(part)) for key, part in value.items()]}
    for name, kind in _KINDS.items():
        if isinstance(value, kind):
            return {name: [_encode(part) for part in value]}
    return value.item() if isinstance(value, np.generic) else value


def _decode(encoded: Any, fresh: Any, device: torch.device) -> Any:
    """The value; a container that is there is filled, for it may be of a kind of its own (deque(maxlen=…))."""
    if not isinstance(encoded, dict):
        return encoded
    if "tensor" in encoded:
        return encoded["tensor"] if encoded["cpu"] else encoded["tensor"].to(device)
    if "array" in encoded:
        return encoded["array"].numpy()
    kind, parts = next(iter(encoded.items()))
    if kind == "dict":
        made: Any = {key: _decode(part, None, device) for key, part in parts}
    else:
        made = _KINDS[kind](_decode(part, None, device) for part in parts)
    if not (isinstance(fresh, (dict, list, deque)) and isinstance(fresh, type(made))):
        return made
    fresh.clear()
    (fresh.update if isinstance(fresh, dict) else fresh.extend)(made)
    return fresh
