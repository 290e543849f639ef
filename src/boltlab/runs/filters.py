"""Filters of runs: `model=mlp val_acc>0.9`, as the command line has them."""

import math
import operator
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

from boltlab.ground.errors import ConfigError, Mistake, suggest
from boltlab.runs.index import Row, config_keys

_FILTER = re.compile(r"(?P<key>[^=<>!~]+?)(?P<how><=|>=|!=|!~|==?|<|>|~)(?P<value>.*)", re.DOTALL)
_ORDERED: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def is_filter(word: str) -> bool:
    """Whether a word has the form of a filter."""
    return _FILTER.fullmatch(word) is not None


def select(rows: Sequence[Row], filters: Sequence[str]) -> list[Row]:
    """The rows that every filter lets through: `data=mnist`, `best_val_acc>0.99`, `optimizer.lr<=0.1`, `name~lenet`
    (contains), `seed!=3`, `name!~old`, `tags=good` (one of them), `started>=2026-11-20`.

    Two numbers are compared as numbers, everything else as text, upper and lower case alike for `~`. A run that lacks
    the key has no value there: only `!=`, `!~` and `=null` let it through.

    Raises:
        ConfigError: with all filters that cannot be read, or whose key no run has.
    """
    mistakes: list[Mistake] = []
    tests = []
    for text in filters:
        fits = _FILTER.fullmatch(text)
        if fits is None:
            mistakes.append(Mistake(text, "is no filter: key=value, or one of != < <= > >= ~ (contains) !~"))
            continue
        key, how, value = fits["key"].strip(), fits["how"].replace("==", "="), fits["value"].strip()
        if how + value[:1] in ("=>", "=<", "=~", "~="):
            mistakes.append(
                Mistake(text, f"has no operator {how + value[:1]}: there are = != < <= > >= ~ (contains) !~")
            )
            continue
        if rows:
            mistakes += unknown_key(rows, key, text)
        wanted = _number(value)
        if wanted is None and key in ("started", "ended"):
            with suppress(ValueError):
                wanted = datetime.fromisoformat(value).timestamp()
        if how in _ORDERED and wanted is None:
            mistakes.append(Mistake(text, f"{value!r} is no number{' and no date' * (key in ('started', 'ended'))}"))
        tests.append((key, how, value, wanted))
    if mistakes:
        raise ConfigError(mistakes)
    return [row for row in rows if all(_fits(row.get(key), how, value, wanted) for key, how, value, wanted in tests)]


def unknown_key(rows: Sequence[Row], key: str, where: str) -> list[Mistake]:
    """The mistake of a key that no row has, if it is one, with the nearest that there is."""
    if any(key in row for row in rows):
        return []
    names = sorted({name for row in rows for name in row.values} | {"tags", "note"})
    if key in names:
        return []
    known = sorted(config_keys(rows) - set(names))
    if inside := [name for name in known if name.startswith(f"{key}.")]:
        value = where.removeprefix(f"{key}=")
        cure = "" if value == where else f"; did you mean '{key}._target_~{value.lstrip('=')}'?"
        return [Mistake(where, f"{key} is a group, and no value: {', '.join(inside[:6])}{cure}")]
    otherwise = f"keys: {', '.join(names)}, and those of the configs, like optimizer.lr"
    if nearest := _nearest(key, names, known):
        return [Mistake(where, f"no run has {key!r}: did you mean {nearest!r}? {otherwise}")]
    return [Mistake(where, suggest(f"no run has {key!r}", key, [*names, *known], otherwise))]


def _nearest(key: str, names: list[str], known: list[str]) -> str | None:
    """best: best_val_acc; lr: optimizer.lr, and not model.optimizer.lr."""
    if "." in key:
        return None
    nearest = [name for name in names if name.startswith(key)]
    inner = [name for name in known if name.endswith(f".{key}")]
    return next(iter([*nearest, *sorted(inner, key=lambda name: name.count("."))]), None)


def _fits(value: Any, how: str, text: str, wanted: float | None) -> bool:
    if how.startswith("!"):
        return not _fits(value, how[1:], text, wanted)
    if how in _ORDERED:
        return is_number(value) and bool(_ORDERED[how](value, wanted))
    if isinstance(value, list) and any(_fits(part, how, text, wanted) for part in value):
        return True
    if how == "~":
        return value is not None and text.casefold() in as_text(value).casefold()
    if wanted is not None and is_number(value):
        return bool(value == wanted)
    if value is None or isinstance(value, bool):
        text = text.casefold()  # True is true
    return as_text(value) == (text.replace(" ", "") if isinstance(value, list) else text)


def as_text(value: Any) -> str:
    """A value as it is written in a config or on the command line: true, null, [1,2]."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return f"[{','.join(map(as_text, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _number(text: str) -> float | None:
    """None also for `nan`, which is compared as a text: as a number it is equal to none."""
    try:
        return None if math.isnan(number := float(text)) else number
    except ValueError:
        return None


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
