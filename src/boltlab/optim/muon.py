"""Muon for every weight matrix and convolution inside a net, AdamW for the rest, as one optimizer."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """Roughly U Vᵀ of the singular value decomposition U S Vᵀ of a matrix [m, n], in bfloat16.

    Newton-Schulz iteration with the coefficients of Jordan (2024, kellerjordan.github.io/posts/muon): steepest at 0, so
    that five steps bring every singular value to about 0.7 to 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix.size(0) <= matrix.size(1)
    x = (matrix if wide else matrix.T).to(torch.bfloat16)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class Muon(Optimizer):
    """Momentum whose update is orthogonalized, on hidden weights of two and more dimensions.

    torch.optim.Muon takes matrices only and leaves the rest to a second optimizer. This one takes a whole net:
    convolutions as matrices [out, in · height · width]; biases, norms, embeddings, whatever is not called "weight", and
    the output layer (the last weight) go to AdamW. Updates are scaled by 0.2 √max(m, n), which gives them AdamW's size
    (Liu et al. 2025), so that one `lr` and one `weight_decay` serve both, and AdamW's values are a good start.

    `fused`: of AdamW, as torch has it.
    `params`: named parameters, or groups of them with their own options, in the order of the net.

    Raises:
        ValueError: a parameter comes without its name.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        nesterov: bool = True,
        newton_schulz_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool | None = None,
    ) -> None:
        split = self._split(list(params))
        rest = [group for group in split if not group["muon"]]
        adamw = AdamW(rest, lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
        defaults["newton_schulz_steps"] = newton_schulz_steps
        super().__init__([group for group in split if group["muon"]] + adamw.param_groups, defaults)
        self._adamw = adamw

    @classmethod
    def _split(cls, given: list[Any]) -> list[dict[str, Any]]:
        """Groups whose parameters are hidden weights (`muon`) or not, in the order of those that are given."""
        given = given if given and isinstance(given[0], dict) else [{"params": given}]
        groups = [{**group, "params": list(group["params"])} for group in given]
        entries = [entry for group in groups for entry in group["params"]]
        if any(not isinstance(entry, tuple) for entry in entries):
            raise ValueError("Muon needs names to tell hidden weights from the rest: pass net.named_parameters()")
        hidden = dict([entry for entry in entries if cls._is_matrix(*entry)][:-1])  # all matrices but the last
        split = [
            {**group, "params": [(name, p) for name, p in group["params"] if (name in hidden) == muon], "muon": muon}
            for group, muon in itertools.product(groups, (True, False))
        ]
        return [group for group in split if group["params"]]

    @staticmethod
    def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2 and name.endswith("weight") and "embed" not in name

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a loaded state dict, a copy or a pickle, which know nothing of the inner AdamW
        self._adamw = AdamW([group for group in self.param_groups if not group["muon"]])

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["muon"]:
                for p in group["params"]:
                    if p.grad is not None:
                        self._step_matrix(p, p.grad, group)
        # One state and one list of groups: state dicts and learning-rate schedules see a single optimizer.
        self._adamw.param_groups = [group for group in self.param_groups if not group["muon"]]
        self._adamw.state = self.state
        self._adamw.step()
        return loss

    def _step_matrix(self, p: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        average = state["momentum_buffer"]
        average.lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(average, group["momentum"]) if group["nesterov"] else average
        matrix = orthogonalize(update.reshape(len(p), -1), group["newton_schulz_steps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(matrix.reshape(p.shape), alpha=-group["lr"] * 0.2 * max(matrix.shape) ** 0.5)
