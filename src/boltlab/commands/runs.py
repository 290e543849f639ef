"""`boltlab runs`: the runs as a table, filtered and sorted; and what is done to some of them: diff, rm, archive, …"""

import json
import math
import os
import re
import sys
from typing import Any

from boltlab.commands.predictions import as_csv
from boltlab.config.compose import compose
from boltlab.config.roots import ROOTS
from boltlab.ground.errors import ConfigError, Mistake, suggest
from boltlab.ground.texts import print_table
from boltlab.runs import Status
from boltlab.runs import index as history
from boltlab.runs import manage as runs_manage
from boltlab.runs import table as runs_table
from boltlab.runs.filters import is_filter, select, unknown_key

_KEYS = list(ROOTS["runs"])


def main(words: list[str]) -> int:
    """`boltlab runs [filter …] [key=value …]`, or `boltlab runs <action> <run> … [key=value …]`.

    Raises:
        ConfigError: with all words that mean nothing.
    """
    if words and words[0] in runs_manage.ACTIONS:
        return _act(*words)
    own = [word for word in words if _key(word) in _KEYS]
    options = compose("runs", [_listed(word) for word in own]).config
    filters = [word for word in words if word not in own]
    everything = history.rows(options.log_dir, options.verb)
    # Without a run, nothing tells which keys there are but our own.
    odd = [word for word in filters if not is_filter(word) or (not everything and _near(_key(word)))]
    if odd:
        raise ConfigError([_misspelt(word) for word in odd])
    return show(everything, _selected(everything, filters), options)


def _act(action: str, *words: str) -> int:
    own = [word for word in words if re.fullmatch(r"(log_dir|verb|yes)=\S*", word)]
    others = [word for word in words if word not in own]
    return runs_manage.ACTIONS[action](others, compose("runs", own).config)


def _key(word: str) -> str:
    return word.partition("=")[0]


def _near(key: str) -> bool:
    return "did you mean" in suggest("", key, _KEYS, "")


def _misspelt(word: str) -> Mistake:
    key, equals, _ = word.partition("=")
    if equals:
        return Mistake(word, suggest(f"there is no key {key!r}", key, _KEYS, f"keys: {', '.join(_KEYS)}"))
    actions = list(runs_manage.ACTIONS)
    allowed = f"a filter is key=value, or one of != < <= > >= ~ (contains) !~; actions: {', '.join(actions)}"
    return Mistake(word, suggest("is neither a filter nor an action", word, actions, allowed))


def _listed(word: str) -> str:
    """`columns=a,b` as `columns=[a,b]`."""
    key, _, value = word.partition("=")
    return f"{key}=[{value}]" if key == "columns" and value not in ("", "null") and value[0] not in "[\"'" else word


def _selected(everything: list[history.Row], filters: list[str]) -> list[history.Row]:
    try:
        return select(everything, filters)
    except ConfigError as e:  # a key of ours may be what was meant
        for at, mistake in enumerate(e.mistakes):
            if "no run has" in mistake.message and "did you mean" not in mistake.message and _near(_key(mistake.where)):
                e.mistakes[at] = _misspelt(mistake.where)
        raise ConfigError(e.mistakes) from None


def show(everything: list[history.Row], chosen: list[history.Row], options: Any) -> int:
    """Prints the chosen ones of all rows; what is no table goes to stderr where stdout is csv or json."""
    _check_keys(everything, options)
    groups = runs_table.grouped(chosen) if options.seeds else [[row] for row in chosen]
    if options.sort is not None:
        groups = runs_table.in_order(groups, options.sort)
    limit = options.limit if options.limit is not None else 20 if options.format == "table" else 0
    shown = groups[: limit or None]
    exported = options.format in ("csv", "json")
    if not groups:
        where = f"{options.log_dir}/{options.verb}"
        said = f"none of the {len(everything)} runs under {where} passes the filters"
        none = f"no run yet under {where}: train one with `boltlab train`"
        print(said if everything else none, file=sys.stderr if exported else sys.stdout)
    if exported:
        keys, rows = runs_table.records(shown, options.columns, options.seeds)
        _print(_as_csv(keys, rows) if options.format == "csv" else _as_json(rows))
    elif groups:
        _print_table(shown, options)
        if len(shown) < len(groups) and options.format == "table":
            print(f"{len(shown)} of {len(groups)}: limit=0 shows all")
    return 0


def _check_keys(everything: list[history.Row], options: Any) -> None:
    """Raises ConfigError: columns or a sort by what no run has."""
    problems = runs_table.column_mistakes(everything, options.columns) if everything else []
    if options.sort is not None and everything:
        problems += unknown_key(everything, options.sort.lstrip("+-"), f"sort={options.sort}")
    if problems:
        raise ConfigError(problems)


def _print_table(shown: list[list[history.Row]], options: Any) -> None:
    from rich.console import Console
    from rich.text import Text

    width = Console().width if Console().is_terminal and options.format == "table" else None
    columns, table = runs_table.cells(shown, options.columns, options.seeds, width)
    if options.format == "md":
        _print(_as_markdown(columns, table))
        return
    cells: list[list[Any]] = [list(row) for row in table]
    for row, group in zip(cells, shown, strict=True):
        if "status" in columns and len(group) == 1:
            at = columns.index("status")
            row[at] = Text(row[at], Status(group[0].status).colour)
    print_table(columns, cells)


def _print(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; what is left to flush at exit goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _as_csv(keys: list[str], rows: list[dict[str, Any]]) -> str:
    """A list is JSON, true and false as in a config, what a run lacks is empty."""
    values = ([row.get(key) for key in keys] for row in rows)
    lines = ([json.dumps(v) if isinstance(v, list | bool) else v for v in row] for row in values)
    return as_csv(keys, lines, lineterminator="\n")


def _as_json(rows: list[dict[str, Any]]) -> str:
    """A list of objects; what JSON has no number for is a text: "nan", "inf", "-inf"."""
    plain = [
        {key: str(v) if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()} for row in rows
    ]
    return json.dumps(plain, indent=1, allow_nan=True) + "\n"


def _as_markdown(columns: list[str], table: list[list[str]]) -> str:
    # GitHub renders what a cell says: links, images and tags from anybody stay text.
    lines = [[re.sub(r"([\\`*\[\]<>|&])", r"\\\1", cell) for cell in row] for row in (columns, *table)]
    lines.insert(1, ["---"] * len(columns))
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)
