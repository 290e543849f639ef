"""What an optimizer itself refuses, seen before it has anything to optimize."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from boltlab.config.types import show


def refused(calls: Sequence[tuple[str, Any, dict[str, Any]]]) -> Iterator[tuple[str, str]]:
    """Key, with its value, and message of each argument without which an optimizer (path, class, arguments) is made."""
    for path, target, given in calls:
        arguments = {key: value for key, value in given.items() if value != "auto"}  # lr is searched
        endless = [key for key, value in arguments.items() if isinstance(value, float) and not math.isfinite(value)]
        for key in endless:  # most of torch's own checks let nan pass
            yield f"{path}.{key}={show(arguments[key])}", f"{target.__name__} takes a finite number"
        if not endless and (refusal := _refusal(target, arguments)):
            for key, value in arguments.items():
                if _refusal(target, {k: v for k, v in arguments.items() if k != key}) != refusal:
                    yield f"{path}.{key}={show(value)}", f"{target.__name__}: {refusal}"


def _refusal(target: Any, arguments: dict[str, Any]) -> str | None:
    """Why an optimizer of one weight cannot be made; None also where that cannot be told."""
    made: Any = torch.optim.Optimizer
    whole = made.add_param_group
    made.add_param_group = getattr(whole, "__wrapped__", whole)  # the other imports torch._dynamo, in a second
    try:
        target([("net.weight", torch.nn.Parameter(torch.zeros(2, 2)))], **arguments)
    except ValueError as e:
        return str(e)
    except Exception:  # it wants other parameters
        return None
    finally:
        made.add_param_group = whole
    return None
