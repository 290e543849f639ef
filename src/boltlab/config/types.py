"""Whether a plain value of a config fits the annotation of an argument."""

import difflib
import inspect
import json
import operator
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt, Le, Lt


class Built:
    """Stands for an object that a `_target_` node will become: its class, or None where that cannot be told."""

    def __init__(self, target: Any):
        self.kind = target if inspect.isclass(target) else None


UNKNOWN = object()  # a value whose mistake is listed already
# Arguments of Lightning's Trainer whose range it does not look at before it divides by them, or never.
_count = Annotated[int, Ge(1)]
BOUNDED: dict[str, Any] = {
    **dict.fromkeys(("accumulate_grad_batches", "num_nodes"), _count),
    "check_val_every_n_epoch": _count | None,
    "gradient_clip_val": Annotated[float, Ge(0)] | None,
    "val_check_interval": _count | Annotated[float, Gt(0), Le(1)] | str | dict | None,
    **dict.fromkeys(("min_epochs", "min_steps", "log_every_n_steps"), Annotated[int, Ge(0)] | None),
    "num_sanity_val_steps": Annotated[int, Ge(-1)] | None,
}


def type_problem(value: Any, annotation: Any) -> str | None:
    """Says why a plain value does not fit an annotation; None where it fits or where nothing can be told."""
    if annotation is inspect.Parameter.empty or annotation is Any or value is UNKNOWN:
        return None
    if isinstance(value, Built):
        return _of_built(value, annotation)
    if holds_built(value) or _fits(value, annotation):
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
        of_object = any(error["type"].startswith(("is_instance", "callable", "is_subclass")) for error in e.errors())
        if of_object and isinstance(value, dict):
            return "takes an object: its `_target_` is missing"
        return _expected(value, annotation)
    except (TypeError, PydanticUserError):
        return None
    return None


def _of_built(value: Built, annotation: Any) -> str | None:
    if inspect.isclass(annotation) and value.kind is not None and not issubclass(value.kind, annotation):
        return f"takes a {annotation.__name__}, `_target_` names {value.kind.__name__}"
    return None


# What YAML's plain values fit without being asked: the annotation → the types of the value.
_PLAIN = {bool: (bool,), int: (int,), float: (float, int), str: (str,), Path: (str,), list: (list,), dict: (dict,)}
_LIMITS = {Ge: operator.ge, Gt: operator.gt, Le: operator.le, Lt: operator.lt}


def _fits(value: Any, annotation: Any) -> bool:
    """True where a value surely fits a common annotation. All else is for pydantic, whose import takes longer than
    the whole check: only a mistake or a rare annotation needs it."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in _OF_PARTS and parts:
        return _OF_PARTS[origin](value, parts)
    if annotation is None or annotation is type(None):
        return value is None
    return annotation is Any or (isinstance(annotation, type) and type(value) in _PLAIN.get(annotation, ()))


def _any_fits(value: Any, parts: tuple[Any, ...]) -> bool:
    return any(_fits(value, part) for part in parts)


def _each_fits(value: Any, parts: tuple[Any, ...]) -> bool:
    return type(value) is list and all(_fits(element, parts[0]) for element in value)


def _tuple_fits(value: Any, parts: tuple[Any, ...]) -> bool:
    if Ellipsis in parts:
        return _each_fits(value, parts)
    return type(value) is list and len(value) == len(parts) and all(map(_fits, value, parts))


def _dict_fits(value: Any, parts: tuple[Any, ...]) -> bool:
    return type(value) is dict and all(_fits(k, parts[0]) and _fits(v, parts[1]) for k, v in value.items())


# The origin of an annotation → whether a value fits its arguments.
_OF_PARTS: dict[Any, Callable[[Any, tuple[Any, ...]], bool]] = {
    typing.Union: _any_fits,
    types.UnionType: _any_fits,
    Literal: lambda value, parts: any(type(value) is type(part) and value == part for part in parts),
    Annotated: lambda value, parts: _fits(value, parts[0]) and all(_within(value, limit) for limit in parts[1:]),
    list: _each_fits,
    Sequence: _each_fits,
    tuple: _tuple_fits,
    dict: _dict_fits,
}


def _within(value: Any, limit: Any) -> bool:
    return type(limit) in _LIMITS and bool(_LIMITS[type(limit)](value, *astuple(limit)))


def holds_built(value: Any) -> bool:
    if isinstance(value, dict):
        return any(holds_built(v) for v in value.values())
    if isinstance(value, list):
        return any(holds_built(v) for v in value)
    return isinstance(value, Built) or value is UNKNOWN


def in_words(value: Any) -> Any:
    """A value with the text of each number and truth value in it."""
    if isinstance(value, list):
        return [in_words(part) for part in value]
    return str(value) if isinstance(value, bool | int | float) else value


def from_environment(written: Any, value: Any) -> Any:
    """A value with the numbers and truth values that texts of the environment stand for. written: with its references,
    of which one at least is `${oc.env:…}`."""
    if isinstance(written, list) and isinstance(value, list):
        return [from_environment(*pair) for pair in zip(written, value, strict=True)]
    if not (isinstance(value, str) and str(written).startswith("${")):
        return value
    from omegaconf._utils import get_yaml_loader

    try:
        read = yaml.load(value, get_yaml_loader())
    except yaml.YAMLError:
        return value
    return read if isinstance(read, bool | int | float) else value


def _expected(value: Any, annotation: Any) -> str:
    literals, others = _alternatives(annotation)
    # What YAML can write comes first; classes are named only where there is nothing else.
    writable = [name for name in others if name.split()[0] in _WRITABLE or "[" in name]
    names = list(dict.fromkeys([*map(str, literals), *(writable or others)]))
    message = f"takes {'one of ' if literals else ''}{', '.join(names)}"
    return message + _hint(value, literals, others)


def _hint(value: Any, literals: list[Any], others: list[str]) -> str:
    near = difflib.get_close_matches(str(value), [str(x) for x in literals], n=1, cutoff=0.6)
    if near:
        return f": did you mean {near[0]!r}?"
    if isinstance(value, float) and value.is_integer() and "int" in others:
        return f": write {int(value)}"
    if type(value) in (int, float, bool) and "str" in others and not _has_numbers(others):
        return "; a text that looks like another value stands in quotes"
    if isinstance(value, str) and _has_numbers(others) and _is_number(value):
        return "; a number in quotes is text: drop the quotes"
    return ""


def _has_numbers(names: list[str]) -> bool:
    return any(name.split()[0] in ("int", "float") for name in names)


def takes_numbers(annotation: Any) -> bool:
    return _has_numbers(_alternatives(annotation)[1])


_WRITABLE = ("bool", "int", "float", "str", "Path", "list", "dict", "null")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _alternatives(annotation: Any) -> tuple[list[Any], list[str]]:
    """The literal values and the names of the types that an annotation allows."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return list(parts), []
    if origin in (typing.Union, types.UnionType):
        found = [_alternatives(part) for part in parts]
        return [x for literals, _ in found for x in literals], [x for _, others in found for x in others]
    if annotation is type(None):
        return [], ["null"]
    if origin is Annotated:
        kind, *limits = parts
        bounds = [f"{_BOUNDS[b]} {getattr(limit, b)}" for b in _BOUNDS for limit in limits if hasattr(limit, b)]
        return [], [" ".join([kind.__name__, *bounds])]
    name = None if origin else getattr(annotation, "__name__", None)
    return [], [name or str(annotation).replace("typing.", "")]


_BOUNDS = {"ge": "from", "gt": "above", "le": "up to", "lt": "below"}


def show(value: Any) -> str:
    text = value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False, default=lambda v: "…")
    return text if len(text) <= 60 else text[:57] + "…"
