"""What the benchmarks share: cases timed in turns, and the table ours / peer / ratio / goal."""

import os
import platform
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version


def in_turns(cases: Mapping[str, Callable[[], float]], rounds: int = 5) -> dict[str, list[float]]:
    """What each case measures, once a round; every round begins with another case.

    A busy machine then disturbs all cases alike, and `ratio` compares what stood side by side.
    """
    names = list(cases)
    measured: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            measured[name].append(cases[name]())
    return measured


def ratio(ours: list[float], peer: list[float]) -> float:
    """Median over the rounds of ours / peer."""
    return statistics.median(a / b for a, b in zip(ours, peer, strict=True))


@dataclass
class Row:
    """One comparison: values of each round in one unit, and the goal as text ("at most 1.60")."""

    what: str
    ours: list[float]
    peer: list[float]
    goal: str = ""


def show(title: str, unit: str, rows: list[Row]) -> None:
    """Prints a Markdown table: the medians, the median of the ratios and the goal."""
    print(f"\n### {title}\n\n| what | ours, {unit} | peer, {unit} | ours / peer | goal |")
    print("| --- | ---: | ---: | ---: | --- |")
    for row in rows:
        ours, peer = statistics.median(row.ours), statistics.median(row.peer)
        print(f"| {row.what} | {ours:.4g} | {peer:.4g} | {ratio(row.ours, row.peer):.2f} | {row.goal} |", flush=True)


def machine(*packages: str) -> str:
    """One line: processor, cores, Python and the packages' versions."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), name)
    versions = ", ".join(f"{package} {version(package)}" for package in packages)
    return f"{name}, {cores} cores, Python {platform.python_version()}, {versions}"
