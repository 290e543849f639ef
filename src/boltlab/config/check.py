"""The check of a config before anything is built: every `_target_` node against the signature that it names.

The `__init__` signature is the schema: unknown, missing and mistyped arguments are found here, all at once. A class may
add three things of its own, each a static or class method that builds nothing:

    discover(arguments) -> dict                        values for what stands at "auto" and only the data can tell
    check_arguments(arguments) -> [(argument, message)]  mistakes that several arguments make together
    logged_metrics(arguments) -> set or dict           the metric names that can be monitored; a dict says of each
                                                       whether larger is better, None where its name tells that"""

import inspect
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from boltlab.config import words
from boltlab.config.devices import process_count
from boltlab.config.locate import locate
from boltlab.config.modes import mode_key, settle
from boltlab.config.rules import RULES
from boltlab.config.sources import not_chosen
from boltlab.config.types import (
    BOUNDED,
    UNKNOWN,
    Built,
    from_environment,
    holds_built,
    in_words,
    show,
    takes_numbers,
    type_problem,
)
from boltlab.ground.errors import ConfigError, Mistake, UserError, suggest

# What `boltlab train` finds by itself where it stands at "auto".
SEARCHED = ("optimizer.lr", "data.batch_size")


class Checker:
    """Walks a config, collects its mistakes and every call (path, target, plain arguments) that it will make."""

    def __init__(self, config: DictConfig, searched: tuple[str, ...] = (), texts: set[str] | None = None):
        self.config = config
        self.texts = set() if texts is None else texts  # keys that take a text and hold what was read as a number
        self.searched = searched  # the keys that may stand at "auto" although their type is another
        self.found: list[Mistake] = []
        self.unknown_roots = {"run_dir"}  # filled in when the run starts; and those whose mistake is listed already
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []

    def add(self, where: str, message: str) -> None:
        self.found.append(Mistake(where, message))

    def roots(self, fields: Mapping[str, Any]) -> None:
        """Checks the root keys against those of the verb, each with its annotation."""
        for key in map(str, self.config):
            if key not in fields:
                near = suggest(f"there is no key {key!r}", key, list(fields), f"keys: {', '.join(fields)}")
                self.add(f"{key}={show(self.config[key])}", words.KEYS.get(key, near))
        for key, annotation in fields.items():
            if OmegaConf.is_missing(self.config, key):
                self.add(key, f"is missing: give {key}=…")
                continue
            with suppress(OmegaConfBaseException):  # the walk names what does not resolve
                value = _plain(self.config.get(key))
                value, message = self._fitted("", key, value, annotation)
                if message:
                    self.unknown_roots.add(key)
                    is_group = value is None and annotation is dict
                    self.add(f"{key}={show(value)}", not_chosen(key) if is_group else message)

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
                plain: dict[str, Any] = {}
                for key in map(str, data):
                    with suppress(OmegaConfBaseException):  # the walk names what does not resolve
                        plain[key] = _plain(data[key])
                values = discover(plain)
                data.update({key: values[key] for key in wanted if key in values and not _has_syntax(values[key])})
        except ConfigError:
            pass  # the walk names it with its key path
        except UserError as e:
            self.add("data", str(e))
        else:
            if discover is None:
                return
        # What refers to them is no mistake of its own.
        self.unknown_roots |= {f"data.{key}" for key in wanted if data.get(key) == "auto"}

    def walk(self, node: Any, path: str) -> Any:
        """Checks a node and all below it; returns its plain value, or `Built` for what will be an object."""
        if isinstance(node, ListConfig):
            return [self._child(node, i, f"{path}.{i}") for i in range(len(node))]
        values = {str(key): self._child(node, key, f"{path}.{key}" if path else str(key)) for key in node}
        name = values.pop("_target_", None)
        if name is None:
            return values
        if name is UNKNOWN:
            return Built(None)
        try:
            target = locate(name)
        except ConfigError as e:
            self.found += [Mistake(f"{path}._target_={name}", m.message) for m in e.mistakes]
            return Built(None)
        partial = values.get("_partial_") is True
        arguments = {key: value for key, value in values.items() if not key.startswith("_")}
        before = len(self.found)
        self._call(name.rsplit(".", 1)[-1], target, arguments, path, partial)
        if len(self.found) == before:
            self.calls.append((path, target, arguments))
        return Built(None if partial else target)

    def _child(self, parent: Any, key: Any, path: str) -> Any:
        if OmegaConf.is_missing(parent, key):
            if "." in path:  # the root keys are named by `roots`
                self.add(path, f"is missing: give {path}=…")
            return UNKNOWN
        reference = OmegaConf.is_interpolation(parent, key)
        if reference and str(parent._get_node(key)._value()).strip("${}") in self.unknown_roots:
            return UNKNOWN
        try:
            child = parent[key]
        except OmegaConfBaseException as e:
            if not self._needs_classes(parent, key):
                self.add(path, str(e).splitlines()[0])
            return UNKNOWN
        if not OmegaConf.is_config(child):
            written = str(parent._get_node(key)._value())
            if isinstance(child, str) and "${" in child and ("\\${" in written or written.startswith("${oc.")):
                self.add(f"{path}={show(child)}", "holds ${, which a saved config may not: the run could not be read")
            return child
        if not reference:
            return self.walk(child, path)
        # `optimizer: ${optimizer}` is checked where it stands, once, and not again where it is used.
        return Checker(self.config).walk(child, path)

    def _fitted(self, path: str, key: str, value: Any, annotation: Any) -> tuple[Any, str | None]:
        """A value as its annotation wants it, and what is wrong with it. What a variable of the environment holds is a
        text, and may stand for a number; what the command line says may look like a number, and stand for a text."""
        message = type_problem(value, annotation)
        if message is None or holds_built(value):
            return value, message
        parent = OmegaConf.select(self.config, path) if path else self.config
        written: Any = OmegaConf.to_container(parent, resolve=False)
        if "${oc.env:" in str(written[key]):
            value = from_environment(written[key], value)
            message = type_problem(value, annotation)
            if message is None:
                parent[key] = value
        elif type_problem(in_words(value), annotation) is None and not takes_numbers(annotation):
            self.texts.add(f"{path}.{key}" if path else key)
        return value, message

    def _call(self, short: str, target: Any, arguments: dict[str, Any], path: str, partial: bool) -> None:
        parameters = _parameters(target)
        if parameters is None:
            return
        known = {p.name: p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        is_open = any(p.kind is p.VAR_KEYWORD for p in parameters)
        for key, value in arguments.items():
            if value == "auto" and (f"{path}.{key}" in self.searched or key == mode_key(target)):
                continue
            if key in known:
                arguments[key] = self._argument(short, path, key, value, known[key].annotation)
            elif not is_open:
                self._add_of(f"{path}.{key}", value, _unknown_argument(short, key, known))
        for name in [] if partial else _missing(known, arguments):
            self.add(f"{path}.{name}", f"{short} needs it: give +{path}.{name}=…")

    def _argument(self, short: str, path: str, key: str, value: Any, annotation: Any) -> Any:
        """The value as the argument takes it."""
        limited = BOUNDED.get(key, annotation) if short == "Trainer" else annotation
        value, message = self._fitted(path, key, value, limited)
        if message and not (value is None and self._needs_classes(OmegaConf.select(self.config, path), key)):
            self._add_of(f"{path}.{key}", value, f"{short} {message}")
        return value

    def _needs_classes(self, parent: Any, key: Any) -> bool:
        """Says once of a model that needs classes that the data have none."""
        if str(parent._get_node(key)._value()) != "${data.num_classes}":
            return False
        data = str(self.config.data.get("_target_")).rpartition(".")[2]
        said = f"needs classes, and {data} has none here: choose one that predicts numbers, such as model=mlp_regressor"
        if Mistake("model", said) not in self.found:
            self.add("model", said)
        return True

    def _add_of(self, where: str, value: Any, message: str) -> None:
        whole = holds_built(value) or isinstance(value, dict)
        self.add(where if whole else f"{where}={show(value)}", message)

    def together(self, open_mode: bool = False, modes: bool = True) -> None:
        """Mistakes that only several values make. open_mode: the root's is at auto; modes: whether any matters."""
        for key in self.searched:
            if OmegaConf.select(self.config, key) == "auto" and process_count(self.config) > 1:
                self.add(f"{key}=auto", "is searched by one process: give a number, found with trainer.devices=1")
        if modes and isinstance(self.config.get("monitor"), str):
            self._modes(open_mode)
        for rule in RULES:
            self.found += [Mistake(where, message) for where, message in rule(self.config, self.calls)]

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
            monitor, key = arguments.get("monitor"), mode_key(target)
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


def _unknown_argument(short: str, key: str, known: dict[str, inspect.Parameter]) -> str:
    return suggest(f"{short} takes no argument {key!r}", key, list(known), f"it takes: {', '.join(known)}")


def _has_syntax(value: Any) -> bool:
    """Whether names found in data would be read as a config's syntax. They stand in no config, then: the data module
    finds them again where it is built, and its state holds them."""
    return isinstance(value, list) and any("${" in str(text) or text == "???" for text in value)


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _missing(known: dict[str, inspect.Parameter], arguments: dict[str, Any]) -> list[str]:
    needed = [p for p in known.values() if p.default is p.empty and p.kind is not p.POSITIONAL_ONLY]
    return [p.name for p in needed if p.name not in arguments]


def _parameters(target: Any) -> list[inspect.Parameter] | None:
    """The parameters of a class or function; None where they cannot be told, as of some builtins."""
    try:
        return list(inspect.signature(target, eval_str=True).parameters.values())
    except NameError:  # an annotation that names what is imported for type checkers only
        return list(inspect.signature(target).parameters.values())
    except ValueError:
        return None
