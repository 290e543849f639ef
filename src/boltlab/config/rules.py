"""Mistakes that several values of a config make together."""

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from boltlab.config.devices import process_count
from boltlab.config.types import show

# What a config will call: path, target, plain arguments.
Calls = Sequence[tuple[str, Any, dict[str, Any]]]
Option = Callable[[DictConfig, Calls], str | None]
Found = Iterator[tuple[str, str]]  # key, with its value, and message


class Pair(NamedTuple):
    """Two options that torch or Lightning cannot combine, which nothing of ours can mend.

    Each is a function that gives key and value where a config has the option; the first is named as the mistake."""

    one: Option
    other: Option
    cure: str
    reason: str  # of torch 2.15 or Lightning 2.6.6: a part of what it says where nobody refuses the pair before


def _where(key: str, holds: Callable[[Any], Any]) -> Option:
    def said(config: DictConfig, calls: Calls) -> str | None:
        value = OmegaConf.select(config, key)
        return f"{key}={show(value)}" if value is not None and holds(value) else None

    return said


def _averages_weights(config: DictConfig, calls: Calls) -> str | None:
    for path, target, _ in calls:
        names = [kind.__name__ for kind in getattr(target, "__mro__", ())]
        if getattr(target, "averages_weights", False) or "WeightAveraging" in names:  # Lightning's
            return path
    return None


def _zero_in_float16(config: DictConfig, calls: Calls) -> str | None:
    for path, target, arguments in calls:
        if path == "optimizer" and (parameter := inspect.signature(target).parameters.get("eps")):
            eps = arguments.get("eps", parameter.default)
            return f"optimizer.eps={eps}" if isinstance(eps, float) and eps <= 2**-25 else None
    return None


_SHARDED = _where("trainer.strategy.tensor_parallel_size", lambda size: size > 0)
# tests/test_option_pairs.py trains all other pairs of the options that people combine, and these to see their reasons.
PAIRS = [
    Pair(
        _where("trainer.precision", lambda p: str(p) not in ("32", "32-true", "bf16-mixed", "bf16-true", "16-true")),
        _SHARDED,
        "32, bf16-mixed, bf16-true or 16-true",
        "The `ModelParallelStrategy` does not support `Fabric(..., precision=",
    ),
    Pair(_averages_weights, _SHARDED, "trainer=ddp", "FSDP does not support deepcopy"),
    Pair(
        _where("trainer.accumulate_grad_batches", lambda batches: batches > 1),
        _where("trainer.strategy.static_graph", bool),
        "1, or trainer.strategy.static_graph=false",
        "expect_autograd_hooks_ INTERNAL ASSERT FAILED",
    ),
    Pair(
        _where("precision", lambda precision: precision == "16-true"),
        _zero_in_float16,
        "float16 rounds it to 0, and it is divided by: bf16-true, optimizer=sgd or +optimizer.eps=1e-4",
        "the training loss is nan",
    ),
]


def of_classes(config: DictConfig, calls: Calls) -> Found:
    """What the classes say of their own arguments."""
    for path, target, arguments in calls:
        for argument, message in getattr(target, "check_arguments", lambda _: [])(arguments):
            yield f"{path}.{argument}={show(arguments.get(argument))}", message


def of_the_trainer(config: DictConfig, calls: Calls) -> Found:
    """What the command gives to the Trainer, so that nobody else can."""
    given = config.get("trainer") or {}
    for key in ("callbacks", "logger"):
        if key in given:
            yield f"trainer.{key}", f"{key} are chosen by the group of that name"
    if "plugins" in given:
        yield "trainer.plugins", "plugins are the train command's own"


def a_checkpoint_to_test(config: DictConfig, calls: Calls) -> Found:
    trainer = config.get("trainer")
    if not config.get("test") or trainer is None or trainer.get("fast_dev_run"):
        return
    kept = [name for name, node in (config.get("callbacks") or {}).items() if "dirpath" in (node or {})]
    if kept and trainer.get("enable_checkpointing") is False:
        yield "trainer.enable_checkpointing=false", f"contradicts callbacks {', '.join(kept)}: leave them out"
    elif not kept:
        yield "test=true", "tests a checkpoint, and no callback saves one: callbacks=[best], or test=false"
    elif trainer.get("max_epochs") == 0:
        yield "trainer.max_epochs=0", "leaves no checkpoint to test: test=false"


def of_optimizers(config: DictConfig, calls: Calls) -> Found:
    torch: Any = sys.modules.get("torch")  # which any optimizer has imported
    kind = torch.optim.Optimizer if torch else ()
    found = [call for call in calls if inspect.isclass(call[1]) and issubclass(call[1], kind)]
    if found:
        from boltlab.config.optimizers import refused

        yield from refused(found)


def refused_pairs(config: DictConfig, calls: Calls) -> Found:
    for pair in PAIRS:
        if (where := pair.one(config, calls)) and (other := pair.other(config, calls)):
            yield where, f"cannot be combined with {other}: {pair.cure}"


def no_processes_of_lightning(config: DictConfig, calls: Calls) -> Found:
    strategy = (config.get("trainer") or {}).get("strategy")
    if isinstance(strategy, str) and (plain := re.sub("_(spawn|fork|notebook)", "", strategy)) != strategy:
        yield f"trainer.strategy={strategy}", f"starts processes, which boltlab does itself: {plain}"


def tensor_parallel(config: DictConfig, calls: Calls) -> Found:
    group = _processes_of_a_batch(config)
    if group is None:
        return
    where, processes = f"trainer.strategy.tensor_parallel_size={group}", process_count(config)
    if processes % group:
        yield where, f"does not divide {processes} process{'es' * (processes > 1)}: see trainer.devices"
    for path, target, _ in calls:
        if group > 1 and path == "model.net" and not hasattr(target, "tensor_parallel_plan"):
            cure = "1, or model=vit_tiny"
            yield where, f"{target.__name__} has no tensor_parallel_plan(), which divides layers: {cure}"


def whole_shares(config: DictConfig, calls: Calls) -> Found:
    """A global batch is divided over the processes; that of a plain data module is of each process."""
    batch_size = (config.get("data") or {}).get("batch_size")
    shards = any(path == "data" and hasattr(target, "num_train_batches") for path, target, _ in calls)
    if not shards or config.get("trainer") is None or not isinstance(batch_size, int):
        return
    processes = max(1, process_count(config) // (_processes_of_a_batch(config) or 1))
    if batch_size % processes:
        near = batch_size + processes - batch_size % processes
        message = f"is the global batch, divided over {processes} processes: take a multiple, for example {near}"
        yield f"data.batch_size={batch_size}", message


def _processes_of_a_batch(config: DictConfig) -> int | None:
    strategy = (config.get("trainer") or {}).get("strategy")
    return strategy.get("tensor_parallel_size") if isinstance(strategy, DictConfig) else None


def one_task(config: DictConfig, calls: Calls) -> Found:
    """A module that says that it predicts numbers, on data that have classes."""
    model, data = (next((call for call in calls if call[0] == path), None) for path in ("model", "data"))
    if model is None or data is None or getattr(model[1], "task", None) != "regression":
        return
    if isinstance(number := data[2].get("num_classes"), int):
        said = f"{model[1].__name__} predicts a number, and {data[1].__name__} has {number} classes"
        yield "model", f"{said}: choose a classifier, such as model=mlp, or other data"


RULES: list[Callable[[DictConfig, Calls], Found]] = [
    of_classes,
    of_the_trainer,
    a_checkpoint_to_test,
    of_optimizers,
    refused_pairs,
    no_processes_of_lightning,
    tensor_parallel,
    whole_shares,
    one_task,
]
