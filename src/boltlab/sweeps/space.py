"""The search space of a sweep: the values that keys of a training may take, written as Hydra writes them for `-m`.

choice(a,b)  a,b  [a, b]       one of them; whole groups too: optimizer: choice(sgd,adamw)
range(start,stop,step)         equal steps, without stop
interval(low,high)             a number, with both ends; int(interval(1,8)) is a whole one
tag(log,interval(1e-4,0.1))    the same, drawn by its logarithm
{values: one of these, when: optimizer=sgd}    only where that other key of the space has this value, or one of a,b
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from boltlab.config.overrides import Values, sweep_values
from boltlab.ground.errors import ConfigError, Mistake, suggest

if TYPE_CHECKING:
    from optuna.trial import Trial


MANY = 1e6


@dataclass(frozen=True)
class Dimension:
    """One key, and the values that it may take where `when` (another key, and values of it) holds."""

    key: str
    values: Values
    when: tuple[str, tuple[str, ...]] | None = None

    @classmethod
    def of(cls, key: str, given: Any) -> "Dimension":
        """
        Raises:
            ConfigError: what is given cannot be read.
        """
        spec, where = given if isinstance(given, Mapping) else {"values": given}, f"sweep.space.{key}"
        if odd := [name for name in spec if name not in ("values", "when")] or sorted({"values"} - set(spec)):
            raise ConfigError([Mistake(where, f"takes values and when: {odd[0]!r} is unknown or missing")])
        when = spec.get("when")
        try:
            return cls(key, sweep_values(key, spec["values"]), None if when is None else condition_of(when))
        except ValueError as e:
            raise ConfigError([Mistake(f"{where}: {spec['values']}", str(e))]) from None

    def active(self, chosen: Mapping[str, Any]) -> bool:
        return self.when is None or str(chosen.get(self.when[0])) in self.when[1]

    def edges(self) -> list[str]:
        """Every choice, or both ends, as texts of the command line."""
        return list(self.values.texts or map(repr, (self.values.low, self.values.high)))

    def suggest(self, trial: "Trial") -> Any:
        v = self.values
        if v.texts:
            return trial.suggest_categorical(self.key, v.texts)
        if v.whole:
            return trial.suggest_int(self.key, int(v.low), int(v.high), log=v.log, step=int(v.step or 1))
        return trial.suggest_float(self.key, v.low, v.high, log=v.log, step=v.step)

    def all_values(self) -> list[Any]:
        """Of one that has no end of them, none."""
        v = self.values
        if v.texts or self.size() == math.inf:
            return list(v.texts)
        return [v.low + i * (v.step or 1) for i in range(int(self.size()))]

    def size(self) -> float:
        """How many values there are; inf for a continuous one."""
        v = self.values
        if v.texts:
            return len(v.texts)
        step = v.step or (1 if v.whole else 0)
        return math.floor((v.high - v.low) / step + 1e-9) + 1 if step else math.inf


def parse(space: Mapping[str, Any]) -> list[Dimension]:
    """The dimensions, each after the one that it depends on.

    Raises:
        ConfigError: with every mistake.
    """
    found: dict[str, Dimension] = {}
    mistakes: list[Mistake] = []
    for key, given in space.items():
        try:
            found[str(key)] = Dimension.of(str(key), given)
        except ConfigError as e:
            mistakes += e.mistakes
    mistakes += [mistake for d in found.values() for mistake in _condition_mistakes(d, found)]
    if mistakes:
        raise ConfigError(mistakes)

    def depth(d: Dimension) -> int:
        """How many others it depends on, one through another; in a circle, more than there are."""
        steps = 0
        while d.when is not None and steps <= len(found):
            d, steps = found[d.when[0]], steps + 1
        return steps

    if circle := [key for key, d in found.items() if depth(d) > len(found)]:
        raise ConfigError([Mistake("sweep.space", f"these depend on one another in a circle: {', '.join(circle)}")])
    return sorted(found.values(), key=depth)


def _condition_mistakes(d: Dimension, space: Mapping[str, Dimension]) -> list[Mistake]:
    if d.when is None:
        return []
    where, (parent, wanted) = f"sweep.space.{d.key}.when", d.when
    if parent not in space:
        return [Mistake(where, suggest(f"the space has no {parent!r}", parent, list(space), "when: key=a,b"))]
    texts = space[parent].values.texts
    wrong = [text for text in wanted if text not in texts]
    allowed = f"choices: {', '.join(texts) or 'none: only a choice can be a condition'}"
    return [Mistake(where, suggest(f"{parent} is never {text!r}", text, [], allowed)) for text in wrong[:1]]


def condition_of(text: Any) -> tuple[str, tuple[str, ...]]:
    """`optimizer=sgd,adamw`: the key, and the values of it."""
    name, _, words = str(text).partition("=")
    return name.strip(), tuple(word.strip() for word in words.split(","))


def points(space: list[Dimension]) -> Iterator[dict[str, Any]]:
    """Every point of a finite space, as a sampler draws it."""
    if not space:
        yield {}
        return
    *before, last = space
    for point in points(before):
        if not last.active(point):
            yield point
            continue
        for value in last.all_values():
            yield {**point, last.key: value}


def suggest_all(space: list[Dimension], trial: "Trial") -> dict[str, Any]:
    """What the sampler proposes for a trial: a value for each dimension that is active."""
    chosen: dict[str, Any] = {}
    for d in space:
        if d.active(chosen):
            chosen[d.key] = d.suggest(trial)
    return chosen


def overrides(params: Mapping[str, Any]) -> list[str]:
    """Params as overrides: groups first, so that a key of a group finds the choice that it belongs to."""
    texts = {key: value if isinstance(value, str) else repr(value) for key, value in params.items()}
    return [f"{key}={text}" for key, text in sorted(texts.items(), key=lambda item: "." in item[0])]


def params(space: list[Dimension], overrides: list[str]) -> dict[str, Any]:
    """The params that stand in overrides, as `suggest_all` gives them; an error where one is missing or is none."""
    given = dict(text.partition("=")[::2] for text in overrides)
    chosen: dict[str, Any] = {}
    for d in (d for d in space if d.active(chosen)):
        read = str if d.values.texts else int if d.values.whole else float
        chosen[d.key] = read(given[d.key])
    return chosen


def samples(space: list[Dimension]) -> Iterator[dict[str, str]]:
    """A few points in which every choice and every end stands at least once, for the check before a sweep starts."""

    def point(fixed: dict[str, str]) -> dict[str, str]:
        chosen: dict[str, str] = {}
        for d in space:
            if d.active(chosen):
                chosen[d.key] = fixed.get(d.key, d.edges()[0])
        return chosen

    by_key, seen = {d.key: d for d in space}, set()
    for d in space or [None]:  # type: ignore[list-item]
        for edge in d.edges() if d else [""]:
            fixed, child = {d.key: edge} if d else {}, d
            while child is not None and child.when is not None:
                fixed[child.when[0]] = child.when[1][0]
                child = by_key[child.when[0]]
            chosen = point(fixed)
            if (key := tuple(chosen.items())) not in seen:
                seen.add(key)
                yield chosen


def size(space: list[Dimension]) -> float:
    """How many different points there are; inf where a dimension is continuous, or nobody would train them all."""
    return sum(1 for _ in points(space)) if math.prod(d.size() for d in space) < MANY else math.inf
