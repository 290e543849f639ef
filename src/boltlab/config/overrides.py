"""Overrides of the command line, read with Hydra's own grammar."""

import functools
import itertools
import math
import re
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from boltlab.config import words
from boltlab.config.roots import ROOTS
from boltlab.ground.errors import ConfigError, Mistake

MOST_JOBS = 10_000  # of one grid, where max_jobs=… does not raise it


def split_overrides(verb: str, overrides: list[str]) -> tuple[list[str], list[str]]:
    """The overrides of the verb's own root keys, and those that are meant for the config of a run."""
    own = {*ROOTS[verb], "hydra"}
    mine = [o for o in overrides if o.lstrip("+~").split("=")[0].split(".")[0].split("@")[0] in own]
    return mine, [o for o in overrides if o not in mine]


def keys(overrides: list[str]) -> list[str]:
    """The key of each override."""
    return [text.lstrip("+~").partition("=")[0] for text in overrides]


def names_launcher(override: str) -> bool:
    """Whether an override is about the launcher."""
    return keys([override])[0].split(".")[0] == "launcher"


def grid(overrides: list[str]) -> list[list[str]]:
    """The overrides of each job of `-m`: every combination of the values, the last one changing fastest.

    Raises:
        ConfigError: something cannot be read, or an override has no value at all.
    """
    parsed, mistakes = parse(overrides, sweep=True)
    values = [_single(o) for o in parsed]
    mistakes += [Mistake(o.input_line, "names no value") for o, texts in zip(parsed, values, strict=True) if not texts]
    if mistakes:
        raise ConfigError(mistakes)
    return list(map(list, itertools.product(*values)))


@dataclass(frozen=True)
class Values:
    """What a key may take: one of `texts` as the command line has them, or a number from `low` to `high`."""

    texts: tuple[str, ...] = ()
    low: float | int = 0
    high: float | int = 0
    step: float | int | None = None
    log: bool = False

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int)


def job_count(overrides: list[str]) -> float:
    """How many jobs `-m` makes of the overrides, without listing them; inf where a range has no end."""
    from hydra.errors import HydraException

    count: float = 1
    for text in overrides:
        with suppress(HydraException, ZeroDivisionError):  # `compose` says what is wrong with it
            override = read(text)
            values = override.value() if override.is_sweep_override() else None
            count *= range_size(values) if override.is_range_sweep() else len(getattr(values, "list", [0]))
    return count


def range_size(values: Any) -> float:
    """How many numbers a range of Hydra's has; inf where it has no end."""
    start, stop, step = (Decimal(part) for part in (values.start, values.stop, values.step))
    size = (stop - start) / step
    return max(0, math.ceil(size)) if size.is_finite() else math.inf


def as_text(override: str) -> str:
    """The override with quotes around what Hydra would read as a number or a truth value, in a list too."""
    key, equals, value = override.partition("=")
    if {"'", '"'} & set(value) or re.match(r"(range|interval|tag|sort|shuffle)\(", value):
        return override
    return key + equals + _NO_TEXT.sub(r'\1"\2"', value)


_NO_TEXT = re.compile(r"(^|[\[,:(]\s*)([+-]?(?:\.?\d[\w.+-]*|(?i:inf|nan))|(?i:true|false))(?=\s*[\],)}]|$)")


def as_texts(overrides: list[str], wanted: set[str]) -> list[str]:
    """The overrides, those of the `wanted` keys as texts."""
    return [as_text(text) if keys([text])[0] in wanted else text for text in overrides]


def sweep_values(key: str, given: Any) -> Values:
    """The values that a text of Hydra's syntax (`choice(a,b)`, `tag(log,interval(1e-4,1))`) or a list names.

    Raises:
        ValueError: it names none; the message says why.
    """
    from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, RangeSweep
    from hydra.errors import HydraException

    if isinstance(given, list):
        return Values(texts=tuple(dict.fromkeys(map(as_override, given))))
    try:
        override = read(f"{key}={given}")
    except HydraException as e:
        raise ValueError(f"cannot be read: {str(e).splitlines()[0]}") from e
    if not override.is_sweep_override():
        raise ValueError("names one value: give choice(a,b), range(start,stop,step) or interval(low,high)")
    values: Any = override.value()
    if isinstance(values, IntervalSweep):
        assert values.start is not None and values.end is not None
        low, high, log = values.start, values.end, "log" in values.tags
        if not low < high or (log and low <= 0):
            raise ValueError("is empty: low must be below high" + (", and above 0 for its logarithm" if log else ""))
        return Values(low=low, high=high, log=log)
    if isinstance(values, RangeSweep):
        return _range_values(values)
    if isinstance(values, ChoiceSweep):
        typed = read(as_text(override.input_line)).sweep_iterator()  # 1_0 may be a text, where the key takes one
        pairs = zip(override.sweep_iterator(), map(str, map(_unquoted, typed)), strict=True)
        texts = [text if "_" in text and not isinstance(value, str) else as_override(value) for value, text in pairs]
        return Values(texts=tuple(dict.fromkeys(texts)))
    raise ValueError("is a pattern: name the choices, choice(a,b,c)")


def _range_values(values: Any) -> Values:
    if not values.step:
        raise ValueError("never ends: its step is 0")
    size = range_size(values)
    if size < 2:
        raise ValueError(f"is {list(values.range())}: a range needs two values at least")
    if size > MOST_JOBS:
        raise ValueError(f"has {size:,} values: give interval(low,high), or a larger step")
    numbers = list(values.range())
    return Values(low=min(numbers), high=max(numbers), step=abs(values.step))


def _unquoted(value: Any) -> Any:
    return getattr(value, "text", value)


def as_override(value: Any) -> str:
    """A plain value as it is written behind the `=` of an override."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{','.join(map(as_override, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{as_override(part)}' for key, part in value.items())}}}"
    if isinstance(value, str):
        plain = re.fullmatch(r"(?!(?i:null|true|false|nan|inf)$)[A-Za-z_][\w./-]*", value)
        return value if plain else "'" + re.sub(r"(\\*)'", r"\1\1\\'", value) + "'"
    return repr(value)


def given(key: str, text: str) -> str:
    """The override that gives a key this text; without quotes where it needs none, as older studies have it."""
    from hydra.errors import HydraException

    with suppress(HydraException):
        if read(f"{key}={text}").value() == text:
            return f"{key}={text}"
    return f"{key}={as_override(text)}"


def split_space(overrides: list[str]) -> tuple[list[str], dict[str, str]]:
    """The overrides with one value, and those with several as a space: key -> what is written behind its `=`.

    Raises:
        ConfigError: something cannot be read.
    """
    from hydra.errors import HydraException

    fixed, space = [], {}
    for text in overrides:
        fixed.append(text)
        with suppress(HydraException):  # `compose` says what is wrong with it
            if read(text).is_sweep_override():
                key, _, values = fixed.pop().partition("=")
                space[key] = values
    return fixed, space


@functools.lru_cache(maxsize=1024)
def read(text: str) -> Any:
    """Hydra's reading of one override: `key_or_group`, `value()`, `is_delete()`, … It takes 1 ms, and the jobs of a
    sweep share all but a few, so it is kept: nobody may change it.

    Raises:
        HydraException: it cannot be read.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create().parse_override(text)


def parse(overrides: list[str], sweep: bool) -> tuple[list[Any], list[Mistake]]:
    from hydra.errors import HydraException

    parsed, mistakes = [], []
    for text in overrides:
        key, _, value = text.partition("=")
        try:
            override = read(text)
        except HydraException:
            no_pair = "is no key=value pair; boltlab <verb> --help shows the keys"
            mistakes.append(Mistake(text, f"cannot be read; {_quoted(key, value)}" if value else no_pair))
            continue
        if message := _problem(override, key, value, sweep):
            mistakes.append(Mistake(text, message))
        else:
            parsed.append(override)
    return parsed, mistakes


def _quoted(key: str, value: str) -> str:
    inner = f'"{value}"'
    if re.fullmatch(r"\[[^\[\]{}\"']*\]", value):  # in quotes as a whole, a list would be a text
        inner = '["' + '","'.join(part.strip() for part in value[1:-1].split(",")) + '"]'
    return f"quote it for the shell and for Hydra: '{key}={inner}'"


def _problem(override: Any, key: str, value: str, sweep: bool) -> str | None:
    """What is wrong with an override that can be read."""
    if key.lstrip("+~").startswith(("hydra.", "hydra/")):
        return words.HYDRA.get(re.split("[./]", key)[1], words.HYDRA["run"])
    if key == "run_dir":
        return "is filled in by the run; log_dir=… and name=… choose where it goes"
    if override.value() == "" and not {"'", '"'} & set(value) and not override.is_delete():
        return f"is empty: give a value, or {key}=null for none"
    return _problem_of_several(override, key, value, sweep) if override.is_sweep_override() else None


def _problem_of_several(override: Any, key: str, value: str, sweep: bool) -> str | None:
    from hydra.core.override_parser.types import ValueType

    if not override.is_discrete_sweep():
        return "names no list of values: write a,b,c or range(start,stop,step)"
    if override.value_type is ValueType.GLOB_CHOICE_SWEEP:
        return "is a pattern: name the choices, a,b,c"
    if override.value_type is ValueType.RANGE_SWEEP and not override.value().step:
        return "never ends: the step of range(start,stop,step) is 0"
    if not sweep:
        return f"names several values: add -m to run them all; if it is one text, {_quoted(key, value)}"
    return None


def choices_of(override: Any) -> list[Any]:
    """Every choice that a group override names: one, a list of several, or one of a sweep."""
    values = list(override.sweep_iterator()) if override.is_sweep_override() else [override.value()]
    return [choice for value in values for choice in (value if isinstance(value, list) else [value])]


def _single(override: Any) -> list[str]:
    """The override as texts of the command line with one value each."""
    if not override.is_sweep_override():
        return [override.input_line]
    key = override.input_line.partition("=")[0]
    return [f"{key}={value}" for value in override.sweep_string_iterator()] if override.is_discrete_sweep() else []


def variants(override: Any) -> list[str]:
    """The override with each of its values, as Hydra composes it: a key behind a `+` may be there already."""
    added = override.is_add() and not _names_group(override)
    return [f"+{text}" if added and not text.startswith("++") else text for text in _single(override)]


def _names_group(override: Any) -> bool:
    return override.package is not None or "/" in override.key_or_group


def first_text(override: Any) -> str:
    return next(iter(variants(override)), override.input_line)
