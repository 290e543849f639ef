"""How far a long work on files has come."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(total: int, done: int, what: str, shown: bool) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, else a line a minute."""
    from rich import get_console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = get_console()
    if not shown:
        yield lambda n: None
    elif console.is_terminal:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(what, total=total, completed=done)
            yield lambda n: bar.advance(task, n)
    else:
        state = {"done": done, "said": time.monotonic()}

        def advance(n: int) -> None:
            state["done"] += n
            if time.monotonic() - state["said"] >= 60:
                state["said"] = time.monotonic()
                print(f"{what}: {state['done']:.0f} of {total}", flush=True)

        yield advance
