"""Nets of one architecture trained at once: their weights stand stacked on a leading dimension, [nets, …].

Each step is one call of torch.func's vmap over the gradient of the task's own loss, and an update written elementwise,
so that every net has its own learning rate, weight decay, momentum and seed. What comes out is what `boltlab train`
computes for each of them, to rounding: the same initial weights, order of samples, augmentation, schedule, parameter
groups and metrics. On CUDA the step is recorded as a graph and replayed.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from boltlab.config.build import build
from boltlab.data.base import Split
from boltlab.optim.build import decayed_parameters

Tensors = dict[str, Tensor]  # [nets, …]
_NUMBERS = ("lr", "weight_decay", "momentum", "eps")  # of an optimizer, in which the nets may differ
_WARM_UP = 3  # steps on a stream of their own before a graph is recorded, as torch asks for


def _sgd(weight: Tensor, gradient: Tensor, slots: Sequence[Tensor], h: Callable[[str], Tensor], flags: Any) -> None:
    gradient = gradient + h("weight_decay") * weight
    buffer = slots[0].mul_(h("momentum")).add_(gradient)
    weight.sub_(h("lr") * (gradient + h("momentum") * buffer if flags["nesterov"] else buffer))


def _adam(weight: Tensor, gradient: Tensor, slots: Sequence[Tensor], h: Callable[[str], Tensor], flags: Any) -> None:
    if flags["decoupled_weight_decay"]:
        weight.mul_(1 - h("lr") * h("weight_decay"))
    else:
        gradient = gradient + h("weight_decay") * weight
    mean = slots[0].lerp_(gradient, 1 - h("beta1"))
    square = slots[1].mul_(h("beta2")).addcmul_(gradient, gradient * (1 - h("beta2")))
    weight.sub_(h("lr") / h("correction1") * mean / (square.sqrt() / h("correction2").sqrt() + h("eps")))


class Rule(NamedTuple):
    """How a torch optimizer is written for stacks: what it keeps for each weight, and which settings it needs so."""

    update: Callable[..., None]
    slots: int
    fixed: dict[str, Any]


RULES: dict[type, Rule] = {
    torch.optim.SGD: Rule(_sgd, 1, {"dampening": 0, "maximize": False}),
    torch.optim.Adam: Rule(_adam, 2, {"amsgrad": False, "maximize": False}),
    torch.optim.AdamW: Rule(_adam, 2, {"amsgrad": False, "maximize": False}),
}


class Stack:
    """The nets of several configs that differ in numbers of the optimizer, the schedule and in the seed alone."""

    _graph: Any
    _static: tuple[Tensor, Tensor] | None  # the batch that the recorded step reads
    _warm: int

    def __init__(self, configs: Sequence[DictConfig], device: torch.device) -> None:
        first = configs[0]
        torch.set_float32_matmul_precision(first.float32_matmul_precision)
        self.device, self.models = device, [_model(config) for config in configs]
        self.model = copy.deepcopy(self.models[0]).to(device)  # whose code runs, with the weights of all
        self.autocast = str(first.precision) == "bf16-mixed"
        named = [dict(model.named_parameters()) for model in self.models]
        self.matrices = {f"net.{name}" for name, _, decays in decayed_parameters(self.model.net) if decays}
        self.weights = self._stacked(named, lambda name: named[0][name].requires_grad)
        others = [dict(m.net.named_buffers(prefix="net")) | dict(m.named_parameters()) for m in self.models]
        self.decays = self.weights.keys() if self.model.decay_norms_and_biases else self.matrices
        self.rest = self._stacked(others, lambda name: name not in self.weights)  # buffers, and what is not trained
        self.best_weights, self.best_rest = _clone(self.weights), _clone(self.rest)

        self.optimizers = [model.make_optimizer([torch.nn.Parameter(torch.zeros(()))]) for model in self.models]
        self.flags, self.rule = self.optimizers[0].defaults, RULES[type(self.optimizers[0])]
        self.slots = [{name: torch.zeros_like(w) for name, w in self.weights.items()} for _ in range(self.rule.slots)]
        self.hyper = self._hyper()

        self.data = build(first, "data")
        self.data.device = device
        self.data.prepare_data()
        self.seeds = list(dict.fromkeys(int(config.data.seed) for config in configs))
        self._data: dict[int, Any] = {}  # the training batches by seed
        self._fixed: dict[str, Any] = {}  # those of val and test
        self.which = torch.tensor([self.seeds.index(int(config.data.seed)) for config in configs], device=device)
        self.epochs, self.step = int(first.trainer.max_epochs), 0
        self.totals = {name: torch.zeros_like(self.hyper["steps"]) for name in ("loss", "weight", "value", "samples")}
        self._forget_graph()

    def __len__(self) -> int:
        return len(self.models)

    def _stacked(self, named: list[Tensors], chosen: Callable[[str], bool]) -> Tensors:
        names = [name for name in named[0] if chosen(name)]
        return {name: torch.stack([own[name].detach() for own in named]).to(self.device) for name in names}

    def _hyper(self) -> Tensors:
        """The numbers in which the optimizers of the nets may differ, and the steps they have taken; each [nets]."""
        defaults = [optimizer.defaults for optimizer in self.optimizers]
        found = {name: [d[name] for d in defaults] for name in _NUMBERS if name in self.flags}
        for i in range(len(self.flags.get("betas", ()))):
            found[f"beta{i + 1}"] = [d["betas"][i] for d in defaults]
        found["steps"] = [0] * len(defaults)
        options: dict[str, Any] = {"device": self.device, "dtype": torch.float64}
        return {name: torch.tensor(list(map(float, values)), **options) for name, values in found.items()}

    def load(self) -> None:
        """Loads the training data, and gives each seed its own order of them.

        Raises:
            DataError
        """
        self.data.setup("fit")
        for seed in self.seeds:
            own = copy.copy(self.data)  # shares what is loaded
            own.seed = seed
            loader = self._data[seed] = own.train_dataloader()
            if loader.num_workers:  # all together as many as asked for
                loader.num_workers = max(1, loader.num_workers // len(self.seeds))
        steps = len(next(iter(self._data.values())))
        self._factors = []
        for model, optimizer in zip(self.models, self.optimizers, strict=True):
            moves = model.scheduler is not None and model.scheduler.changes
            built = model.scheduler.build(optimizer, self.epochs * steps, steps) if moves else None
            self._factors.append(built and built[0]["scheduler"].lr_lambdas[0])

    # -- training

    def train_epoch(self, epoch: int, watch: Callable[[], None]) -> list[dict[str, float]]:
        """One pass over the training samples; returns the mean of the loss and of the task's own value of each net.

        watch: called between the steps.
        """
        self.model.train()
        for total in self.totals.values():
            total.zero_()
        loaders = list(self._data.values())
        for loader in loaders:
            loader.sampler.set_epoch(epoch)
        rates = self._rates(len(loaders[0]))
        for number, parts in enumerate(zip(*loaders, strict=True)):
            x, y = parts[0] if len(parts) == 1 else (torch.stack(tensors) for tensors in zip(*parts, strict=True))
            if rates is not None:
                self.hyper["lr"].copy_(rates[number])
            self._train(x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True))
            self.step += 1
            watch()
        loss, value = self.totals["loss"] / self.totals["weight"], self.totals["value"] / self.totals["samples"]
        names = self.model.train_metrics.names
        return [dict(zip(names, pair, strict=True)) for pair in torch.stack([loss, value], 1).float().tolist()]

    def _rates(self, steps: int) -> Tensor | None:
        """The learning rates of an epoch, [steps, nets]; None where they stand still."""
        if not any(self._factors):
            return None
        peaks = [float(o.defaults["lr"]) for o in self.optimizers]
        pairs = list(zip(peaks, self._factors, strict=True))
        table = [[lr * (f(s) if f else 1.0) for lr, f in pairs] for s in range(self.step, self.step + steps)]
        return torch.tensor(table, dtype=torch.float64).to(self.device)

    def _train(self, x: Tensor, y: Tensor) -> None:
        """A step of every net on a batch x [B, …], y [B], or on one for each seed, [seeds, B, …]."""
        if self._static is None and self.device.type == "cuda":
            self._static = (x.clone(), y.clone())
        if self._static is None or self._static[0].shape != x.shape:
            self._compute(x, y)
        elif self._warm < _WARM_UP:
            self._warm += 1
            aside, here = torch.cuda.Stream(), torch.cuda.current_stream()
            aside.wait_stream(here)
            with torch.cuda.stream(aside):
                self._compute(x, y)
            here.wait_stream(aside)
        else:
            self._static[0].copy_(x)
            self._static[1].copy_(y)
            if self._graph is None:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph):
                    self._compute(*self._static)
            self._graph.replay()

    def _compute(self, x: Tensor, y: Tensor) -> None:
        own = len(self.seeds) > 1
        x = self._input(x.flatten(0, 1), y).view(x.shape) if own else self._input(x, y)
        if own:
            x, y = x[self.which], y[self.which]

        def loss(weights: Tensors, rest: Tensors, x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            output, mean, weight = self._output(weights, rest, x, y)
            with self._autocast():
                value = self.model.train_value(output, y)
            counted = mean.detach()
            if self.model.l1:
                mean = mean + self.model.l1 * sum(w.abs().sum() for n, w in weights.items() if n in self.matrices)
            return mean, (counted, weight, value)

        axes = (0, 0, 0, 0) if own else (0, 0, None, None)
        gradients, (_, (mean, weight, value)) = vmap(grad_and_value(loss, has_aux=True), axes)(
            self.weights, self.rest, x, y
        )
        self._update(gradients)
        self.totals["loss"] += mean * weight
        self.totals["weight"] += weight
        self.totals["value"] += value.sum(1, dtype=torch.float64)
        self.totals["samples"] += value.shape[1]

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast, cache_enabled=False)

    def _output(self, weights: Tensors, rest: Tensors, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of one net: its output, its mean loss, and what that mean weighs."""
        with self._autocast():
            output = functional_call(self.model, (weights, rest), (x,))
            mean, weight = self.model.criterion(output, y)
        return output, mean, weight if isinstance(weight, Tensor) else torch.full_like(mean.detach(), weight)

    def _input(self, x: Tensor, y: Tensor) -> Tensor:
        batch = (x, y)
        if hasattr(self.data, "on_after_batch_transfer"):
            batch = self.data.on_after_batch_transfer(batch, 0)
        return batch[0].to(self.model.dtype)

    def _update(self, gradients: Tensors) -> None:
        hyper = self.hyper
        hyper["steps"] += 1
        values = hyper | {f"correction{i}": 1 - hyper[f"beta{i}"] ** hyper["steps"] for i in (1, 2) if "beta1" in hyper}
        for name, weight in self.weights.items():
            own = values if name in self.decays else values | {"weight_decay": torch.zeros_like(values["weight_decay"])}

            def h(what: str, weight: Tensor = weight, own: Tensors = own) -> Tensor:
                return own[what].to(weight.dtype).view(-1, *[1] * (weight.ndim - 1))

            self.rule.update(weight, gradients[name], [slot[name] for slot in self.slots], h, self.flags)

    def _forget_graph(self) -> None:
        self._graph, self._static, self._warm = None, None, 0

    def keep(self, places: list[int]) -> None:
        """Goes on with these nets alone."""
        chosen = torch.tensor(places, device=self.device)
        stacked = [self.weights, self.rest, self.best_weights, self.best_rest, self.hyper, self.totals, *self.slots]
        for tensors in stacked:
            for name, value in tensors.items():
                tensors[name] = value[chosen]
        self.which = self.which[chosen]
        self.models, self.optimizers, self._factors = (
            [values[i] for i in places] for values in (self.models, self.optimizers, self._factors)
        )
        self._forget_graph()

    # -- what comes of it

    @torch.no_grad()
    def evaluate(self, split: Split, best: bool = False) -> list[dict[str, float]]:
        """All metrics of each net on `val` or `test`, with the weights as they are or at their best."""
        self.model.eval()
        weights, rest = (self.best_weights, self.best_rest) if best else (self.weights, self.rest)

        batches: list[tuple[Tensor, ...]] = []
        if split not in self._fixed:  # its processes, if there are any, stay for the next epoch
            self._fixed[split] = self.data.dataloader(split)
        for x, y in self._fixed[split]:
            x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
            batches.append((*vmap(self._output, (0, 0, None, None))(weights, rest, self._input(x, y), y), y))
        outputs, losses, counts, targets = zip(*batches, strict=True)
        output, target = torch.cat(outputs, 1).cpu(), torch.cat(targets).cpu()
        loss, count = (torch.stack(values, 1).double().cpu() for values in (losses, counts))
        total = count.sum(1)
        means = (loss * count).sum(1) / total
        found = []
        for place, model in enumerate(self.models):
            metrics = getattr(model, f"{split}_metrics")
            metrics.update(preds=output[place], target=target, value=means[place], weight=total[place])
            found.append({name: float(v) for name, v in metrics.compute().items() if v.numel() == 1})
            metrics.reset()
        return found

    def is_best(self, place: int) -> None:
        """Keeps the weights of a net as its best ones."""
        for best, now in ((self.best_weights, self.weights), (self.best_rest, self.rest)):
            for name, value in now.items():
                best[name][place].copy_(value[place])

    def state_dict(self, place: int, best: bool = False) -> Tensors:
        """Of one net, as its own model has it."""
        weights, rest = (self.best_weights, self.best_rest) if best else (self.weights, self.rest)
        model = self.models[place]
        own = dict(model.named_parameters()) | dict(model.named_buffers())
        with torch.no_grad():  # into the model: of weights that share their numbers, only one name stands in a stack
            for name, value in (weights | rest).items():
                own[name].copy_(value[place])
        return copy.deepcopy(dict(model.state_dict()))


def _model(config: DictConfig) -> Any:
    pl.seed_everything(config.seed, verbose=False)
    model = build(config, "model")
    return model.double() if str(config.precision) == "64" else model


def _clone(tensors: Tensors) -> Tensors:
    return {name: value.clone() for name, value in tensors.items()}
