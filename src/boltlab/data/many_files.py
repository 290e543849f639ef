"""Long work on many files: by threads, in the order of the files, with a bar that tells how far it has come."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
_PIECE = 1000  # files that a thread looks at in one call: a network's answers are waited for together


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


def of_each(paths: Sequence[str], look: Callable[[str], T]) -> list[T]:
    """What a short look at each file finds. Threads pay off, for on a network's file system each look waits."""

    def several(piece: Sequence[str]) -> list[T]:
        return [look(path) for path in piece]

    pieces = [paths[i : i + _PIECE] for i in range(0, len(paths), _PIECE)]
    with ThreadPoolExecutor(16) as pool:
        return [found for some in pool.map(several, pieces) for found in some]


def in_order(work: Callable[[str], T], files: Iterable[str], threads: int) -> Iterator[T]:
    """What `work` makes of each file, only a little ahead of whoever takes it."""
    waiting: deque[Future[T]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for file in files:
            waiting.append(pool.submit(work, file))
            if len(waiting) > 4 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
