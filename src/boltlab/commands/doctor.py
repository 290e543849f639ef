"""`boltlab doctor`: is this machine fit for training, and are the files of an image folder; each fault with its cure.

A check returns rows; only a `fail` makes the exit code 1. The network is never asked and no key is ever printed.
"""

import importlib
import netrc
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from inspect import signature
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple

from omegaconf import DictConfig

from boltlab.commands.predictions import place
from boltlab.ground.texts import print_table

# Under src/boltlab in a clone; an installed wheel has no lock beside it, and nothing is compared then.
LOCK = Path(__file__).resolve().parents[3] / "requirements.lock"
MORE = LOCK.with_name("requirements-dev.lock")  # whose packages may be missing
GIB = 1024**3
SHOWN_NAMES = 6
SHOWN_PROBLEMS = 50


class Row(NamedTuple):
    """One line of the report."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    cure: str = ""


def main(overrides: list[str]) -> int:
    """Checks the machine and, with `data=…`, a data set; 0 if nothing failed, else 1."""
    from boltlab.config.compose import compose

    return run(compose("doctor", overrides).config)


def run(config: DictConfig) -> int:
    """Prints a table of every check; `config` has `log_dir` and perhaps `data`."""
    rows = [check_python(), *check_torch(), *check_precision(), *check_requirements(), *check_lock()]
    rows += [check_git(), check_wandb(), *check_disk(Path(config.log_dir)), *check_shared_memory()]
    rows += [] if config.get("data") is None else check_data(config.data)
    print_rows(rows)
    return int(any(row.status == "fail" for row in rows))


def print_rows(rows: list[Row]) -> None:
    """The rows as a table, what is wrong again below it with its cure, and a last line with the counts."""
    from rich.console import Console
    from rich.text import Text

    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = [(Text(row.status, colours[row.status]), row.name, row.detail) for row in rows]
    print_table(("", "", ""), table, pad_edge=False, show_header=False)
    wrong = [row for row in rows if row.status != "ok"]
    console = Console(highlight=False, soft_wrap=True)
    for cure, to_cure in groupby(wrong, key=lambda row: row.cure):
        said = [Text(f"{row.status}: {row.name}: {row.detail}", colours[row.status]) for row in to_cure]
        console.print("", *said, Text(f"  {cure}"), sep="\n")
    failed = sum(row.status == "fail" for row in rows)
    console.print(f"\n{len(rows) - len(wrong)} ok, {len(wrong) - failed} to look at, {failed} failed")


def check_python() -> Row:
    """The interpreter, the system and the processor cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    detail = f"{platform.python_version()} on {platform.system()} {platform.machine()}, {cores} cores"
    if (3, 11) <= sys.version_info < (3, 14):
        return Row("python", "ok", detail)
    return Row("python", "fail", detail, "boltlab needs Python 3.11, 3.12 or 3.13: make clean train PYTHON=python3.12")


def check_torch() -> list[Row]:
    """PyTorch and each accelerator with its memory."""
    import torch

    build = torch.version.cuda or torch.version.hip
    detail = f"{torch.__version__}, {f'built for CUDA/ROCm {build}' if build else 'built without CUDA'}"
    rows = [Row("torch", "ok", detail)]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(i)
            free, total = torch.cuda.mem_get_info(i)
            row = Row(f"cuda:{i}", "ok", f"{device.name}, {total / GIB:.1f} GiB, {free / GIB:.1f} GiB free")
            if free < total / 4:
                cure = f"Another process holds most of it: see nvidia-smi, or leave {i} out of CUDA_VISIBLE_DEVICES."
                row = row._replace(status="warn", cure=cure)
            rows.append(row)
    elif torch.backends.mps.is_available():
        limit = torch.mps.recommended_max_memory() / GIB
        rows.append(Row("mps", "ok", f"Apple {platform.machine()}, {limit:.1f} GiB usable"))
    elif shutil.which("nvidia-smi"):
        cure = (
            "nvidia-smi is there, but torch sees no GPU. Look whether CUDA_VISIBLE_DEVICES hides it, whether the "
            f"driver is new enough for CUDA {build}, and whether torch was built with CUDA at all."
        )
        rows.append(Row("accelerator", "warn", "an NVIDIA driver, but no GPU for torch", cure))
    else:
        rows.append(Row("accelerator", "ok", f"none: training runs on the CPU, {torch.get_num_threads()} threads"))
    return rows


def check_precision() -> list[Row]:
    """What each number format does on the device that training would take, measured with a small matrix product."""
    import torch

    from boltlab.training.flops import matmul

    device = place("auto")
    size = {"cuda": 4096, "mps": 2048}.get(device.type, 512)
    formats = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if device.type != "cuda":
        del formats["tf32"]  # a format of NVIDIA's tensor cores
    rows, base = [], None
    for name, dtype in formats.items():
        try:
            speed, error = matmul(device, dtype, size, tf32=name == "tf32")
        except RuntimeError as e:
            said = str(e).splitlines()[0]
            rows.append(Row(name, "warn", f"not on this {device.type}: {said}", "Leave precision=auto or 32."))
            continue
        base = base or speed
        detail = f"{speed:.3g} TFLOP/s on {device.type}, {speed / base:.2g} times fp32"
        if error > 0.05:
            rows.append(Row(name, "fail", f"{detail}, but wrong by {error:.0%}", f"Do not train in {name} here."))
        else:
            rows.append(Row(name, "ok", detail))
    return rows


def check_requirements() -> list[Row]:
    """What pyproject.toml asks for and the environment has not; some floors keep out versions with malware."""
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(text) for text in metadata.requires("boltlab") or []]
    except metadata.PackageNotFoundError:
        return [Row("boltlab", "fail", "not installed", "pip install -e .")]
    rows = []
    for requirement in requirements:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _version(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            detail = f"{version or 'missing'}, needed is {requirement.specifier}"
            cure = f'pip install "{requirement.name}{requirement.specifier}"'
            rows.append(Row(requirement.name, "fail", detail, cure))
    return rows


def check_lock(lock: Path = LOCK, more: Path = MORE) -> list[Row]:
    """The installed versions against the locks; nothing where there is none, outside a clone."""
    if not lock.is_file():
        return []
    from packaging.version import Version

    found: dict[str, list[str]] = {"missing": [], "older": [], "newer": []}
    needed = dict(read_lock(lock))
    locked = needed | ({name: v for name, v in read_lock(more) if _version(name)} if more.is_file() else {})
    for name, version in locked.items():
        have = _version(name)
        if have is None:
            found["missing"].append(f"{name} {version}")
        elif Version(have).public != Version(version).public:  # 2.15.0+cpu is 2.15.0
            kind = "older" if Version(have) < Version(version) else "newer"
            found[kind].append(f"{name} {have} for {version}")
    cure = "make install, or: pip install --require-hashes -r requirements-dev.lock"
    rows = [Row("lock", "warn", f"{kind}: {_short(names)}", cure) for kind, names in found.items() if names]
    return rows or [Row("lock", "ok", f"{len(locked)} packages as locked")]


def read_lock(lock: Path) -> Iterator[tuple[str, str]]:
    """Name and version of every package in the lock that is for this system and Python."""
    from packaging.requirements import Requirement

    for line in lock.read_text(encoding="utf-8").splitlines():
        if line[:1].isalnum():
            requirement = Requirement(line.rstrip(" \\"))
            if requirement.marker is None or requirement.marker.evaluate():
                yield requirement.name, next(iter(requirement.specifier)).version


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _short(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


def check_git() -> Row:
    """git, which each run asks for its commit and the uncommitted changes."""
    if shutil.which("git"):
        return Row("git", "ok", "found")
    return Row("git", "warn", "not found: runs cannot record their commit", "Install git and put it on PATH.")


def check_wandb() -> Row:
    """Whether W&B would find a key, where it looks itself: the environment, then a netrc file."""
    mode = os.environ.get("WANDB_MODE", "")
    if mode in ("offline", "disabled", "dryrun"):
        return Row("wandb", "ok", f"WANDB_MODE={mode}")
    server = os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai"
    for name, what in (("WANDB_API_KEY", "a key in WANDB_API_KEY"), ("WANDB_IDENTITY_TOKEN_FILE", "a token file")):
        if os.environ.get(name):
            return Row("wandb", "ok", f"{what}, for {server}")
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]:
        try:
            login = netrc.netrc(str(path.expanduser())).authenticators(server.split("://")[-1].strip("/"))
        except FileNotFoundError:
            continue
        except (netrc.NetrcParseError, OSError, UnicodeDecodeError) as e:
            # The parser's own message can hold a piece of the line, and so of a key.
            line = getattr(e, "lineno", None) or "?"
            detail = f"{path}, line {line}, cannot be read: {type(e).__name__}"
            return Row("wandb", "warn", detail, "Mend the file, or: wandb login")
        if login and login[2]:
            return Row("wandb", "ok", f"a key in {path}, for {server}")
    cure = "Nothing needs it. To see runs online: wandb login. To leave W&B out: logger=csv"
    return Row("wandb", "ok", f"no key for {server}: runs are kept offline. {cure}")


def check_disk(log_dir: Path) -> list[Row]:
    """Whether runs can be written under `log_dir`, which need not exist yet, and how much."""
    existing = log_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    try:
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is a file")
        with tempfile.TemporaryFile(dir=existing):
            pass
        rows = [Row("log_dir", "ok", f"{log_dir} can be written")]
    except OSError as e:
        cure = "Choose another: log_dir=/somewhere, or set it in configs/local/default.yaml."
        rows = [Row("log_dir", "fail", f"{log_dir} cannot be written: {e}", cure)]
    free = shutil.disk_usage(existing).free / GIB
    row = Row("disk", "ok", f"{free:.1f} GiB free")
    if free < 5:
        cure = "Remove runs that are no longer needed: boltlab runs lists them."
        row = Row("disk", "fail" if free < 0.5 else "warn", row.detail, cure)
    return [*rows, row]


def check_shared_memory(folder: Path = Path("/dev/shm")) -> list[Row]:
    """Linux hands batches from worker to trainer through /dev/shm; a container often has 64 MiB of it."""
    if not folder.is_dir():
        return []
    size = shutil.disk_usage(folder).total / GIB
    if size >= 1:
        return [Row("/dev/shm", "ok", f"{size:.1f} GiB")]
    cure = "Loader workers die with a bus error when it is full: docker run --shm-size=8g, or data.num_workers=0"
    return [Row("/dev/shm", "warn", f"{size * 1024:.0f} MiB", cure)]


def check_data(data: DictConfig) -> list[Row]:
    """Every file of a data set made of files: its module offers `check_folder(root)`, which yields (path, reason)."""
    check_folder = getattr(importlib.import_module(str(data._target_).rpartition(".")[0]), "check_folder", None)
    if check_folder is None:
        return [Row("data", "ok", f"{data._target_} is no folder of files: nothing to check")]
    limit = {key: data[key] for key in ("max_pixels",) if key in data and key in signature(check_folder).parameters}
    problems = list(check_folder(data.root, **limit))
    if not problems:
        return [Row("data", "ok", f"every file under {data.root} can be read")]
    cure = "Mend or remove the file; data.max_bad_files=N leaves out up to N of them in training."
    rows = [Row("data", "fail", f"{path}: {reason}", cure) for path, reason in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        rows.append(Row("data", "fail", f"and {len(problems) - SHOWN_PROBLEMS} more", "Mend these, then run it again."))
    return rows
