"""What is printed: plain lines of bounded length, and tables; and what a cell of a CSV file holds."""

from collections.abc import Iterable, Sequence
from typing import Any


def line(value: Any, most: int = 200) -> str:
    """As one line: a text from anybody may hold what moves the cursor."""
    text = "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in str(value))
    return text if len(text) <= most else f"{text[: most - 1]}…"


def plain(text: str) -> str:
    """The text in its lines, without what moves the cursor or is no character."""
    return text if text.isprintable() else "\n".join(line(part, len(part)) for part in text.split("\n"))


def cell(value: Any) -> Any:
    """Of a CSV file: a text from anybody that a spreadsheet would run as a formula begins with an apostrophe."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def print_table(columns: Sequence[Any], rows: Iterable[Sequence[Any]], **options: Any) -> None:
    """Texts as they stand, or rich's. On a pipe every column stays whole, so that the table can be searched."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    table = Table(*(escape(c) if isinstance(c, str) else c for c in columns), box=None, **options)
    for row in rows:
        table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    Console(width=None if Console().is_terminal else 1000, highlight=False).print(table)
