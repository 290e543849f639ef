"""Learning-rate schedules as functions of the optimizer step, each with an optional linear warm-up.

A schedule is a factor on the optimizer's own `lr`, given by a formula of the step alone. So its state is one number,
nothing drifts, and a run that is resumed or made longer follows the curve that its config describes.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau

from boltlab.ground.errors import UserError

Steps = Annotated[int, Ge(0)]
FromZero = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]


class Schedule:
    """Base of the schedules: the warm-up, the lengths, and what Lightning wants to be given.

    The warm-up lasts `warmup_steps` optimizer steps or `warmup_epochs` (fractions allowed) and rises linearly: step s
    (0, 1, …) of w takes the part (s + 1) / (w + 1).
    """

    # Pairs of arguments that give the same length, in steps and in epochs.
    lengths: ClassVar[list[tuple[str, str]]] = [("warmup_steps", "warmup_epochs")]

    def __init__(self, warmup_steps: Steps | None = None, warmup_epochs: FromZero | None = None) -> None:
        self.warmup_steps, self.warmup_epochs = warmup_steps, warmup_epochs
        self.__post_init__()

    def __post_init__(self) -> None:
        """Of the schedules below, which are dataclasses of their arguments, the warm-up's last."""
        for name, message in self.check_arguments(vars(self)):
            raise ValueError(f"{name} {message}")

    @property
    def changes(self) -> bool:
        """Whether the rate ever moves: if not, nothing needs to be done at each step."""
        return True

    @classmethod
    def check_arguments(cls, arguments: dict[str, Any]) -> list[tuple[str, str]]:
        """A length given twice."""
        return [
            (epochs, f"gives the same length as {steps}: set one of the two to null")
            for steps, epochs in cls.lengths
            if arguments.get(steps) is not None and arguments.get(epochs) is not None
        ]

    def build(self, optimizer: Optimizer, total_steps: float, steps_per_epoch: float) -> list[dict[str, Any]]:
        """Configurations for Lightning.

        `total_steps` optimizer steps of the whole run and `steps_per_epoch` may be infinite where they are not known.

        Raises:
            UserError: the schedule needs a length that is not known.
        """
        warmup = self._steps(self.warmup_steps, self.warmup_epochs, steps_per_epoch)
        self.factor(0, warmup, total_steps, steps_per_epoch)  # what is wrong shows here, not in the middle of a run

        # A plain function, no object: LambdaLR would put an object's attributes into the checkpoint.
        def factor(step: int) -> float:
            return self.factor(step, warmup, total_steps, steps_per_epoch)

        return [{"scheduler": LambdaLR(optimizer, factor), "interval": "step"}]

    def factor(self, step: int, warmup: int, total_steps: float, steps_per_epoch: float) -> float:
        """Part of the optimizer's learning rate at optimizer step 0, 1, …"""
        return min(1.0, (step + 1) / (warmup + 1)) * self.decay(step, warmup, total_steps, steps_per_epoch)

    def decay(self, step: int, warmup: int, total_steps: float, steps_per_epoch: float) -> float:
        """The factor without its warm-up."""
        raise NotImplementedError

    def _steps(self, steps: int | None, epochs: float | None, steps_per_epoch: float) -> int:
        if epochs is None:
            return steps or 0
        return round(epochs * self._known(steps_per_epoch, "an epoch: give it in steps, not in epochs"))

    def _known(self, length: float, what: str = "the run: set trainer.max_epochs or trainer.max_steps") -> float:
        if not math.isfinite(length):
            raise UserError(f"the {type(self).__name__} schedule needs the length of {what}")
        return length


class Constant(Schedule):
    """The optimizer's learning rate as it is."""

    @property
    def changes(self) -> bool:
        return bool(self.warmup_steps or self.warmup_epochs)

    def decay(self, step: int, warmup: int, total_steps: float, steps_per_epoch: float) -> float:
        return 1.0


@dataclass(eq=False)
class Step(Schedule):
    """Times `gamma` after every `every_steps` steps or `every_epochs` epochs; by default each third of the run."""

    lengths: ClassVar[list[tuple[str, str]]] = [*Schedule.lengths, ("every_steps", "every_epochs")]

    gamma: Positive = 0.1
    every_steps: Annotated[int, Ge(1)] | None = None
    every_epochs: Annotated[float, Gt(0)] | None = None
    warmup_steps: Steps | None = None
    warmup_epochs: FromZero | None = None

    def decay(self, step: int, warmup: int, total_steps: float, steps_per_epoch: float) -> float:
        every = self._steps(self.every_steps, self.every_epochs, steps_per_epoch)
        every = every or math.ceil(self._known(total_steps) / 3)
        return float(self.gamma ** (step // every))


@dataclass(eq=False)
class MultiStep(Schedule):
    """Times `gamma` at each milestone, in steps or epochs; by default at 1/2 and 3/4 of the run (He et al. 2015)."""

    lengths: ClassVar[list[tuple[str, str]]] = [*Schedule.lengths, ("milestones_steps", "milestones_epochs")]

    gamma: Positive = 0.1
    milestones_steps: list[int] | None = None
    milestones_epochs: list[float] | None = None
    warmup_steps: Steps | None = None
    warmup_epochs: FromZero | None = None

    def decay(self, step: int, warmup: int, total_steps: float, steps_per_epoch: float) -> float:
        if self.milestones_epochs is not None:
            passed = [step >= self._steps(None, epochs, steps_per_epoch) for epochs in self.milestones_epochs]
        elif self.milestones_steps is not None:
            passed = [step >= steps for steps in self.milestones_steps]
        else:
            passed = [step >= round(part * self._known(total_steps)) for part in (0.5, 0.75)]
        return float(self.gamma ** sum(passed))


@dataclass(eq=False)
class Exponential(Schedule):
    """Falls by the factor `gamma_per_epoch` in every epoch, a little at every step."""

    gamma_per_epoch: Positive = 0.9
    warmup_steps: Steps | None = None
    warmup_epochs: FromZero | None = None

    def decay(self, step: int, warmup: int, total_steps: float, steps_per_epoch: float) -> float:
        return float(self.gamma_per_epoch ** (step / self._known(steps_per_epoch, "an epoch")))


@dataclass(eq=False)
class Cosine(Schedule):
    """Half a cosine from the whole rate when the warm-up ends to `final_factor` of it (Loshchilov and Hutter 2016)."""

    final_factor: FromZero = 0.0
    warmup_steps: Steps | None = None
    warmup_epochs: FromZero | None = None

    def decay(self, step: int, warmup: int, total_steps: float, steps_per_epoch: float) -> float:
        return _cosine(1.0, self.final_factor, (step - warmup) / max(1.0, self._known(total_steps) - warmup))


@dataclass(eq=False)
class OneCycle(Schedule):
    """Up along half a cosine during the warm-up, down along another to almost 0 at the last (Smith and Topin 2017).

    The optimizer's `lr` is the peak; the run begins at `lr / div_factor` and ends at `lr / div_factor /
    final_div_factor`. Without a length, the warm-up takes 30% of the run. Momentum stays as it is.
    """

    div_factor: Positive = 25.0
    final_div_factor: Positive = 1e4
    warmup_steps: Steps | None = None
    warmup_epochs: FromZero | None = None

    def factor(self, step: int, warmup: int, total_steps: float, steps_per_epoch: float) -> float:
        last = self._known(total_steps) - 1
        rise = warmup or round(0.3 * total_steps)
        if step < rise:
            return _cosine(1 / self.div_factor, 1.0, step / rise)
        return _cosine(1.0, 1 / self.div_factor / self.final_div_factor, (step - rise) / max(1.0, last - rise))


def _cosine(start: float, end: float, progress: float) -> float:
    """From `start` at progress 0 to `end` at 1, constant outside."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, max(0.0, progress)))) / 2


@dataclass(eq=False)
class Plateau(Schedule):
    """Times `gamma` after more than `patience_epochs` epochs in which the monitored metric got no better.

    Looks at the metric once an epoch, where there is a new value of it: epochs without a validation do not count. The
    warm-up goes by steps. The rate does not fall below `minimum_lr`.
    """

    monitor: str
    mode: Literal["min", "max"]
    gamma: Annotated[float, Gt(0), Lt(1)] = 0.1
    patience_epochs: Steps = 5
    minimum_lr: FromZero = 0.0
    warmup_steps: Steps | None = None
    warmup_epochs: FromZero | None = None

    def build(self, optimizer: Optimizer, total_steps: float, steps_per_epoch: float) -> list[dict[str, Any]]:
        plateau = ReduceLROnPlateau(optimizer, self.mode, self.gamma, self.patience_epochs, min_lr=self.minimum_lr)
        # strict=False: with trainer.check_val_every_n_epoch > 1 there is nothing to look at after the first epochs.
        found: list[dict[str, Any]] = [
            {"scheduler": plateau, "interval": "epoch", "monitor": self.monitor, "strict": False}
        ]
        if warmup := self._steps(self.warmup_steps, self.warmup_epochs, steps_per_epoch):
            # LinearLR multiplies the current rate and leaves it alone afterwards, so the two do not undo each other.
            linear = LinearLR(optimizer, start_factor=1 / (warmup + 1), total_iters=warmup)
            found.append({"scheduler": linear, "interval": "step"})
        return found
