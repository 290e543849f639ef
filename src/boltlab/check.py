"""The check of a config before anything is built: every `_target_` node against the signature that it names.

The `__init__` signature is the schema: unknown, missing and mistyped arguments are found here, all at once. A class may
add three things of its own, each a static or class method that builds nothing:

    discover(arguments) -> dict                        values for what stands at "auto" and only the data can tell
    check_arguments(arguments) -> [(argument, message)]  mistakes that several arguments make together
    logged_metrics(arguments) -> set or dict           the metric names that can be monitored; a dict says of each
                                                       whether larger is better, None where its name tells that
"""

import difflib
import importlib
import inspect
import json
import operator
import pkgutil
import re
import traceback
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from annotated_types import Ge, Gt, Le, Lt
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from boltlab import words
from boltlab.errors import UserError


@dataclass(frozen=True)
class Mistake:
    """One mistake: the key path (with the value that was given), what is wrong and how to mend it."""

    where: str
    message: str


class ConfigError(UserError):
    """All mistakes of a config at once; the command exits with 2."""

    def __init__(self, mistakes: list[Mistake]):
        self.mistakes = list(dict.fromkeys(mistakes))
        super().__init__("\n".join(f"  {m.where}\n      {m.message}" for m in self.mistakes))


def suggest(problem: str, word: str, names: list[str], otherwise: str) -> str:
    """The problem, the nearest of the names where one is near, and what else helps."""
    swapped = [name for name in names if sorted(name) == sorted(word)]  # two letters changed places
    near = swapped or difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return f"{problem}: did you mean {near[0]!r}? {otherwise}" if near else f"{problem}; {otherwise}"


# Last words of metric names that say what is better; what has another last word is not guessed.
_LARGER_IS_BETTER = {"acc", "accuracy", "f1", "auroc", "precision", "recall", "iou", "r2"}
_SMALLER_IS_BETTER = {"loss", "mse", "mae", "rmse", "error", "perplexity"}


def direction(metric: str, known: Mapping[str, bool | None]) -> Literal["min", "max"] | None:
    """What is better of a metric: as `known` has it, whose values are torchmetrics' `higher_is_better`, or as the last
    word of its name says; None where neither does."""
    larger = known.get(metric)
    if larger is None:  # without what Lightning appends
        word = re.split(r"[\W_]+", re.sub(r"(_step|_epoch)?(/dataloader_idx_\d+)?$", "", metric.lower()))[-1]
        larger = True if word in _LARGER_IS_BETTER else False if word in _SMALLER_IS_BETTER else None
    return None if larger is None else "max" if larger else "min"


def settle(key: str, mode: str, metric: str, known: Mapping[str, bool | None]) -> tuple[str, list[Mistake]]:
    """The mode of a metric, min or max, where `mode` is one of these or auto; and what is wrong with it."""
    better = direction(metric, known)
    if mode != "auto" and better in (None, mode):
        return mode, []
    if mode == "auto" and better is not None:
        return better, []
    message = f"nothing says whether {metric} is better when it is larger or smaller: {key}=max or {key}=min"
    if better is not None:
        what = "smaller" if better == "min" else "larger"
        message = f"{metric} is better when it is {what}: {key}={better}, or leave {key}=auto"
    return mode, [Mistake(f"{key}={mode}", message)]


class _Built:
    """Stands for an object that a `_target_` node will become: its class, or None where that cannot be told."""

    def __init__(self, target: Any):
        self.kind = target if inspect.isclass(target) else None


# What `boltlab train` finds by itself where it stands at "auto".
SEARCHED = ("optimizer.lr", "data.batch_size")

_UNKNOWN = object()  # a value whose mistake is listed already


class Checker:
    """Walks a config, collects its mistakes and every call (path, target, plain arguments) that it will make."""

    def __init__(self, config: DictConfig, searched: tuple[str, ...] = ()):
        self.config = config
        self.searched = searched  # the keys that may stand at "auto" although their type is another
        self.found: list[Mistake] = []
        self.unknown_roots = {"run_dir"}  # filled in when the run starts; and those whose mistake is listed already
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []

    def add(self, where: str, message: str) -> None:
        self.found.append(Mistake(where, message))

    def roots(self, fields: Mapping[str, Any]) -> None:
        """Checks the root keys against the fields of the verb's dataclass."""
        for key in map(str, self.config):
            if key not in fields:
                near = suggest(f"there is no key {key!r}", key, list(fields), f"keys: {', '.join(fields)}")
                self.add(f"{key}={_show(self.config[key])}", words.KEYS.get(key, near))
        for key, spec in fields.items():
            if OmegaConf.is_missing(self.config, key):
                self.add(key, f"is missing: give {key}=…")
            elif not OmegaConf.is_interpolation(self.config, key):
                value = self.config.get(key)
                value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
                if message := type_problem(value, spec.type):
                    self.unknown_roots.add(key)
                    self.add(f"{key}={_show(value)}", message)

    def groups(self) -> None:
        for key in ("data", "model", "optimizer", "trainer"):
            node = self.config.get(key)
            if isinstance(node, DictConfig) and not node.get("_target_"):
                self.add(key, "names no class: its `_target_` is missing")
        for group in ("callbacks", "logger"):
            for name, node in (self.config.get(group) or {}).items():
                if not (isinstance(node, DictConfig) and node.get("_target_")):
                    ours = words.CHOICES.get((group, name))
                    message = f"names no class: its `_target_` is missing; to leave it out: '~{group}.{name}'"
                    self.add(f"{group}.{name}", f"{message}; it {ours}" if ours else message)

    def discover(self) -> None:
        data = self.config.data
        wanted = [key for key in ("num_classes", "class_names", "input_shape") if data.get(key) == "auto"]
        try:
            discover = getattr(locate(data._target_), "discover", None) if wanted else None
            if discover is not None:
                values = discover(self._plain(data))
                data.update({key: values[key] for key in wanted if key in values})
        except ConfigError:
            pass  # the walk names it with its key path
        except UserError as e:
            self.add("data", str(e))

    def _plain(self, node: DictConfig) -> dict[str, Any]:
        """A node's own arguments as plain values; what does not resolve is left out: the walk names it."""
        plain: dict[str, Any] = {}
        for key in map(str, node):
            try:
                plain[key] = OmegaConf.to_container(node[key]) if OmegaConf.is_config(node[key]) else node[key]
            except OmegaConfBaseException:
                continue
        return plain

    def walk(self, node: Any, path: str) -> Any:
        """Checks a node and all below it; returns its plain value, or `_Built` for what will be an object."""
        if isinstance(node, ListConfig):
            return [self._child(node, i, f"{path}.{i}") for i in range(len(node))]
        values = {str(key): self._child(node, key, f"{path}.{key}" if path else str(key)) for key in node}
        name = values.pop("_target_", None)
        if name is None:
            return values
        if name is _UNKNOWN:
            return _Built(None)
        try:
            target = locate(name)
        except ConfigError as e:
            self.found += [Mistake(f"{path}._target_={name}", m.message) for m in e.mistakes]
            return _Built(None)
        partial = values.get("_partial_") is True
        arguments = {key: value for key, value in values.items() if not key.startswith("_")}
        before = len(self.found)
        self._call(name.rsplit(".", 1)[-1], target, arguments, path, partial)
        if len(self.found) == before:
            self.calls.append((path, target, arguments))
        return _Built(None if partial else target)

    def _child(self, parent: Any, key: Any, path: str) -> Any:
        if OmegaConf.is_missing(parent, key):
            if "." in path:  # the root keys are named by `roots`
                self.add(path, f"is missing: give {path}=…")
            return _UNKNOWN
        reference = OmegaConf.is_interpolation(parent, key)
        if reference and str(parent._get_node(key)._value()).strip("${}") in self.unknown_roots:
            return _UNKNOWN
        try:
            child = parent[key]
        except OmegaConfBaseException as e:
            self.add(path, str(e).splitlines()[0])
            return _UNKNOWN
        if not OmegaConf.is_config(child):
            return child
        if not reference:
            return self.walk(child, path)
        # `optimizer: ${optimizer}` is checked where it stands, once, and not again where it is used.
        return Checker(self.config).walk(child, path)

    def _call(self, short: str, target: Any, arguments: dict[str, Any], path: str, partial: bool) -> None:
        try:
            signature = inspect.signature(target, eval_str=True)
        except NameError:  # an annotation that names what is imported for type checkers only
            signature = inspect.signature(target)
        except ValueError:  # some builtins have none
            return
        every = signature.parameters.values()
        parameters = {p.name: p for p in every if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        is_open = any(p.kind is p.VAR_KEYWORD for p in every)
        for key, value in arguments.items():
            where = (
                f"{path}.{key}" if _holds_built(value) or isinstance(value, dict) else f"{path}.{key}={_show(value)}"
            )
            if key not in parameters:
                if not is_open:
                    allowed = f"it takes: {', '.join(parameters)}"
                    self.add(where, suggest(f"{short} takes no argument {key!r}", key, list(parameters), allowed))
            elif value == "auto" and (f"{path}.{key}" in self.searched or key == _mode_key(target)):
                continue
            elif message := type_problem(value, parameters[key].annotation):
                self.add(where, f"{short} {message}")
        if partial:
            return
        for key, parameter in parameters.items():
            if (
                parameter.default is parameter.empty
                and key not in arguments
                and parameter.kind is not parameter.POSITIONAL_ONLY
            ):
                self.add(f"{path}.{key}", f"{short} needs it: give +{path}.{key}=…")

    def together(self, open_mode: bool = False, modes: bool = True) -> None:
        """Mistakes that only several values together make.

        open_mode: the root's is at auto; modes: whether any matters.
        """
        for key in self.searched:
            if OmegaConf.select(self.config, key) == "auto" and process_count(self.config) > 1:
                self.add(f"{key}=auto", "is searched by one process: give a number, found with trainer.devices=1")
        for path, target, arguments in self.calls:
            for argument, message in getattr(target, "check_arguments", lambda _: [])(arguments):
                self.add(f"{path}.{argument}={_show(arguments.get(argument))}", message)
        for key in ("callbacks", "logger", "plugins"):
            if key in (self.config.get("trainer") or {}):
                what = "are chosen by the group of that name" if key != "plugins" else "are the train command's own"
                self.add(f"trainer.{key}", f"{key} {what}")
        if modes and isinstance(self.config.get("monitor"), str):
            self._modes(open_mode)
        self._needs_a_checkpoint()
        for pair in PAIRS:
            if (where := pair.one(self)) and (other := pair.other(self)):
                self.add(where, f"cannot be combined with {other}: {pair.cure}")
        group = self._strategy()
        batch_size = (self.config.get("data") or {}).get("batch_size")
        # A plain data module's is of each process.
        shards = any(path == "data" and hasattr(target, "num_train_batches") for path, target, _ in self.calls)
        if shards and self.config.get("trainer") is not None and isinstance(batch_size, int):
            processes = max(1, process_count(self.config) // group)
            if batch_size % processes:
                near = batch_size + processes - batch_size % processes
                message = (
                    f"is the global batch, divided over {processes} processes: take a multiple, for example {near}"
                )
                self.add(f"data.batch_size={batch_size}", message)

    def _modes(self, open_mode: bool) -> None:
        """Fills in which way each monitored metric gets better, where that is not said, and refuses the wrong way."""
        config, known = self.config, self._logged()
        if known and config.monitor not in known:
            names = sorted(known)
            message = suggest("nothing logs this metric", config.monitor, names, f"logged: {', '.join(names)}")
            self.add(f"monitor={config.monitor}", message)
            return
        config.mode, mistakes = settle("mode", "auto" if open_mode else config.mode, config.monitor, known)
        self.found += mistakes
        for path, target, arguments in self.calls:
            monitor, key = arguments.get("monitor"), _mode_key(target)
            if key is None or not isinstance(monitor, str):
                continue
            node: Any = OmegaConf.select(config, path)
            said = node.get(key, "auto")
            if key in node and node._get_node(key)._value() == "${mode}":
                said = "auto"
            if said in ("auto", config.mode) and monitor == config.monitor:
                node[key] = "${mode}"
            else:
                node[key], mistakes = settle(f"{path}.{key}", said, monitor, known)
                self.found += mistakes

    def _logged(self) -> dict[str, bool | None]:
        """Every metric that can be monitored, and whether it is better when it is larger, where its class says that."""
        known: dict[str, bool | None] = {}
        for _, target, arguments in self.calls:
            if callable(getattr(target, "logged_metrics", None)):
                logged = target.logged_metrics(arguments)
                known |= logged if isinstance(logged, Mapping) else dict.fromkeys(logged)
        return known

    def _strategy(self) -> int:
        """What tensor parallelism cannot be combined with; returns how many processes share each batch."""
        trainer = self.config.get("trainer") or {}
        strategy = trainer.get("strategy")
        if isinstance(strategy, str) and (plain := re.sub("_(spawn|fork|notebook)", "", strategy)) != strategy:
            self.add(f"trainer.strategy={strategy}", f"starts processes, which boltlab does itself: {plain}")
        if not isinstance(strategy, DictConfig):
            return 1
        group: int | None = strategy.get("tensor_parallel_size")
        if group is None:
            return 1
        where, processes = f"trainer.strategy.tensor_parallel_size={group}", process_count(self.config)
        if processes % group:
            self.add(where, f"does not divide {processes} process{'es' * (processes > 1)}: see trainer.devices")
        for path, target, _ in self.calls:
            if group > 1 and path == "model.net" and not hasattr(target, "tensor_parallel_plan"):
                message = f"{target.__name__} has no tensor_parallel_plan(), which divides layers: 1, or model=vit_tiny"
                self.add(where, message)
        return group

    def _needs_a_checkpoint(self) -> None:
        trainer = self.config.get("trainer")
        if not self.config.get("test") or trainer is None or trainer.get("fast_dev_run"):
            return
        kept = [name for name, node in (self.config.get("callbacks") or {}).items() if "dirpath" in (node or {})]
        if kept and trainer.get("enable_checkpointing") is False:
            self.add("trainer.enable_checkpointing=false", f"contradicts callbacks {', '.join(kept)}: leave them out")
        elif not kept:
            self.add("test=true", "tests a checkpoint, and no callback saves one: callbacks=[best], or test=false")
        elif trainer.get("max_epochs") == 0:
            self.add("trainer.max_epochs=0", "leaves no checkpoint to test: test=false")


class Pair(NamedTuple):
    """Two options that torch or Lightning cannot combine, which nothing of ours can mend.

    Each of the two is a function that gives key and value where a config has the option; the first is named as the
    mistake.
    """

    one: Callable[[Checker], str | None]
    other: Callable[[Checker], str | None]
    cure: str
    reason: str  # of torch 2.15 or Lightning 2.6.6: a part of what it says where nobody refuses the pair before


def _where(key: str, holds: Callable[[Any], Any]) -> Callable[[Checker], str | None]:
    def said(checker: Checker) -> str | None:
        value = OmegaConf.select(checker.config, key)
        return f"{key}={_show(value)}" if value is not None and holds(value) else None

    return said


def _averages_weights(checker: Checker) -> str | None:
    for path, target, _ in checker.calls:
        names = [kind.__name__ for kind in getattr(target, "__mro__", ())]
        if getattr(target, "averages_weights", False) or "WeightAveraging" in names:  # Lightning's
            return path
    return None


def _zero_in_float16(checker: Checker) -> str | None:
    for path, target, arguments in checker.calls:
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


def _mode_key(target: Any) -> str | None:
    """The argument that says whether the metric in the argument `monitor` is to be min or max."""
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # some builtins have none
        return None
    key = "monitor_mode" if "monitor_mode" in parameters else "mode"
    # Where its default is something else, so is what it means.
    known = "monitor" in parameters and key in parameters
    return key if known and parameters[key].default in ("min", "max", inspect.Parameter.empty) else None


def locate(name: Any) -> Callable[..., Any]:
    """The class or function that a `_target_` names.

    Raises:
        ConfigError: nothing has that name, or a package is not installed.
    """
    if not isinstance(name, str) or "." not in name:
        raise ConfigError([Mistake("_target_", f"is no dotted path of a class or function: {name!r}")])
    parts = name.split(".")
    thing: Any = None
    for depth in range(len(parts)):
        part, path = parts[depth], ".".join(parts[: depth + 1])
        if depth and hasattr(thing, part):
            thing = getattr(thing, part)
            continue
        try:
            thing = importlib.import_module(path) if depth == 0 or inspect.ismodule(thing) else None
        except ModuleNotFoundError as e:
            if e.name and not path.startswith(e.name):
                message = f"needs the package {e.name!r}, which is not installed"
            elif depth == 0:
                message = f"there is no package {part!r}; is it installed?"
            else:
                message = suggest(
                    f"{'.'.join(parts[:depth])} has no {part!r}", part, _names(thing), "check the spelling"
                )
            raise ConfigError([Mistake("_target_", message)]) from e
        except UserError:
            raise
        except Exception as e:  # whatever a module does when it is imported
            frames = traceback.extract_tb(e.__traceback__)
            at = next((f for f in reversed(frames) if parts[0] in Path(f.filename).parts), frames[-1])
            message = f"{path} cannot be imported: {type(e).__name__}: {e} ({at.filename}, line {at.lineno})"
            raise ConfigError([Mistake("_target_", message)]) from e
        if thing is None:
            raise ConfigError([Mistake("_target_", f"{'.'.join(parts[:depth])} has no {part!r}")])
    if not callable(thing):
        raise ConfigError([Mistake("_target_", f"{name} is a {type(thing).__name__}, not a class or function")])
    return thing


def _names(module: Any) -> list[str]:
    return [*dir(module), *(m.name for m in pkgutil.iter_modules(getattr(module, "__path__", [])))]


def type_problem(value: Any, annotation: Any) -> str | None:
    """Says why a plain value does not fit an annotation; None where it fits or where nothing can be told."""
    if annotation is inspect.Parameter.empty or annotation is Any or value is _UNKNOWN:
        return None
    if isinstance(value, _Built):
        if inspect.isclass(annotation) and value.kind is not None and not issubclass(value.kind, annotation):
            return f"takes a {annotation.__name__}, `_target_` names {value.kind.__name__}"
        return None
    if _holds_built(value) or _fits(value, annotation):
        return None
    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError

    try:
        adapter: TypeAdapter[Any] = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticUserError, TypeError, ValueError, NameError):
        return None
    try:
        # JSON's rules are YAML's: a list may fill a tuple, text a path, but "0.1" is no number and 32.5 no integer.
        adapter.validate_json(json.dumps(value), strict=True)
    except ValidationError as e:
        if any(
            error["type"].startswith(("is_instance", "callable", "is_subclass")) for error in e.errors()
        ) and isinstance(value, dict):
            return "takes an object: its `_target_` is missing"
        return _expected(value, annotation)
    except (TypeError, PydanticUserError):
        return None
    return None


# What YAML's plain values fit without being asked: the annotation → the types of the value.
_PLAIN = {bool: (bool,), int: (int,), float: (float, int), str: (str,), Path: (str,), list: (list,), dict: (dict,)}
_LIMITS = {Ge: operator.ge, Gt: operator.gt, Le: operator.le, Lt: operator.lt}


def _fits(value: Any, annotation: Any) -> bool:
    """True where a value surely fits a common annotation. All else is for pydantic, whose import takes longer than
    the whole check: only a mistake or a rare annotation needs it."""
    kind, origin, parts = type(value), typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(kind is type(part) and value == part for part in parts)
    if origin is Annotated:
        return _fits(value, parts[0]) and all(_within(value, limit) for limit in parts[1:])
    if origin is tuple and Ellipsis not in parts:
        return kind is list and len(value) == len(parts) and all(map(_fits, value, parts))
    if origin in (list, tuple, Sequence):
        return kind is list and all(_fits(v, parts[0]) for v in value)
    if origin is dict:
        return kind is dict and all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items())
    if annotation is None or annotation is type(None):
        return value is None
    return annotation is Any or (isinstance(annotation, type) and kind in _PLAIN.get(annotation, ()))


def _within(value: Any, limit: Any) -> bool:
    return type(limit) in _LIMITS and bool(_LIMITS[type(limit)](value, *astuple(limit)))


def _holds_built(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_built(v) for v in value.values())
    if isinstance(value, list):
        return any(_holds_built(v) for v in value)
    return isinstance(value, _Built) or value is _UNKNOWN


def _expected(value: Any, annotation: Any) -> str:
    literals, others = _alternatives(annotation)
    # What YAML can write comes first; classes are named only where there is nothing else.
    writable = [name for name in others if name.split()[0] in _WRITABLE or "[" in name]
    names = list(dict.fromkeys([*map(str, literals), *(writable or others)]))
    message = f"takes {'one of ' if literals else ''}{', '.join(names)}"
    near = difflib.get_close_matches(str(value), [str(x) for x in literals], n=1, cutoff=0.6)
    if near:
        message += f": did you mean {near[0]!r}?"
    elif isinstance(value, str) and set(others) & {"int", "float"} and _is_number(value):
        message += "; a number in quotes is text: drop the quotes"
    return message


_WRITABLE = ("bool", "int", "float", "str", "Path", "list", "dict", "null")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _alternatives(annotation: Any) -> tuple[list[Any], list[str]]:
    """The literal values and the names of the types that an annotation allows."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return list(typing.get_args(annotation)), []
    if origin in (typing.Union, types.UnionType):
        literals: list[Any] = []
        others: list[str] = []
        for part in typing.get_args(annotation):
            more_literals, more_others = _alternatives(part)
            literals += more_literals
            others += more_others
        return literals, others
    if annotation is type(None):
        return [], ["null"]
    if origin is Annotated:
        kind, *limits = typing.get_args(annotation)
        bounds = [f"from {limit.ge}" for limit in limits if hasattr(limit, "ge")]
        bounds += [f"above {limit.gt}" for limit in limits if hasattr(limit, "gt")]
        bounds += [f"below {limit.lt}" for limit in limits if hasattr(limit, "lt")]
        return [], [" ".join([kind.__name__, *bounds])]
    return [], [
        getattr(annotation, "__name__", str(annotation)) if origin is None else str(annotation).replace("typing.", "")
    ]


def _show(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, default=lambda v: "…")
    return text if len(text) <= 60 else text[:57] + "…"


def process_count(config: DictConfig) -> int:
    """How many processes the config asks for: devices of one node times nodes."""
    devices, accelerator = config.trainer.get("devices", "auto"), config.trainer.get("accelerator", "auto")
    if isinstance(devices, (list, ListConfig)):
        devices = len(devices)
    elif isinstance(devices, str) and devices.isdigit():
        devices = int(devices)
    elif not isinstance(devices, int) or devices == -1:
        import torch

        on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
        devices = torch.cuda.device_count() if on_gpu else 1
    return max(1, int(devices)) * int(config.trainer.get("num_nodes", 1))
