"""How much memory there is for data."""

from contextlib import suppress
from pathlib import Path

from boltlab.ground.errors import DataError

SHARE = 0.8  # of the memory that is free


def available_memory() -> int | None:
    """Bytes that this process can still take, by the system and by its control groups; None where nobody tells."""
    found = []
    with suppress(OSError):
        sizes = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(sizes["MemAvailable"].split()[0]) * 1024)
        group = Path("/sys/fs/cgroup") / Path("/proc/self/cgroup").read_text().strip().rpartition("::")[2].lstrip("/")
        for folder in (group, *group.parents[:-3]):  # up to /sys/fs/cgroup; the limit of a Slurm job is a parent's
            if (folder / "memory.max").exists() and (limit := (folder / "memory.max").read_text().strip()) != "max":
                cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / "memory.current").read_text()) - int(cached["inactive_file"])
                found.append(int(limit) - used)
    return min(found, default=None)


def fits_in_memory(size: int) -> bool:
    free = available_memory()
    return free is None or size <= SHARE * free


def refuse_without_room(count: int, size: int, processes: int) -> None:
    """DataError unless each of `processes` on this machine has room for `count` images, which take `size` bytes."""
    if not fits_in_memory(processes * size):
        needed, free = processes * size / 1e9, (available_memory() or 0) / 1e9
        raise DataError(
            f"data.cache=memory: {count} images in each of {processes} processes need {needed:.3g} GB of memory,"
            f" {free:.3g} GB are free; data.cache=disk keeps them in a file"
        )
