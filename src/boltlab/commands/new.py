"""`boltlab new FOLDER [--package NAME]`: a project of one's own, which depends on this engine as a package.

What a project begins with are this repository's own files, or the copies of them that a wheel carries; `template/` has
the rest: what belongs to a folder, as its pyproject.toml.
"""

import argparse
import importlib.util
import json
import keyword
import re
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NoReturn

from boltlab import __version__
from boltlab.ground.errors import ConfigError, Mistake, UserError

_PACKAGE = Path(__file__).resolve().parents[1]
_TEMPLATE = _PACKAGE / "template"
# As `[tool.hatch.build.targets.wheel.force-include]` copies them.
SHARED: tuple[str, ...] = ("src/project", "configs", "tests/project/test_project.py", ".pre-commit-config.yaml")
SHARED += tuple(f"tests/project/golden/test_project.Test{name}.yaml" for name in ("Diabetes", "Digits"))
SHARED += ("examples/houses.csv", "scripts/in_venv.sh", "scripts/slurm.sbatch", "scripts/torchrun.sh")
OWN = ("pyproject.toml", "Makefile", "README.md", ".ci/run", ".github/workflows/test.yaml", ".gitignore")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError([Mistake("boltlab new", f"{message}: boltlab new ../cells [--package cells]")])


def main(arguments: list[str]) -> int:
    parser = _Parser(prog="boltlab new", add_help=False, allow_abbrev=False)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--package")
    given = parser.parse_args(arguments)
    root = given.folder.expanduser().resolve()
    package = _checked(given.package or re.sub(r"\W", "_", root.name, flags=re.ASCII))
    make(root, package)
    print(f"made     {given.folder}: the package {package}, with its configs and tests")
    print(f"engine   {engine()}")
    print(f"next     cd {given.folder} && make train")
    return 0


def _checked(package: str) -> str:
    """Raises ConfigError: a package cannot have that name, or one has it."""
    problem = None
    if not package.isidentifier() or not package.isascii() or keyword.iskeyword(package):
        problem = "is no name of a Python package: letters, digits and _"
    elif importlib.util.find_spec(package) is not None:
        problem = "can be imported already, so that this name means another package: choose one"
    if problem:
        raise ConfigError([Mistake(f"--package {package}", problem)])
    return package


def make(root: Path, package: str) -> None:
    """Writes the project into an empty or a new folder.

    Raises:
        UserError: there is something in the folder, or it cannot be written.
    """
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} is not empty: boltlab new makes a folder, and changes none")
    try:
        for source, path in _files():
            place = str(path).replace("src/project", f"src/{package}").replace("tests/project", "tests")
            _write(source, root / place, package)
        (root / "logs").mkdir()
        (root / "logs" / ".gitkeep").touch()
    except OSError as e:
        raise UserError(f"{e.filename or root} cannot be written: {e.strerror}") from e
    if shutil.which("git") and not any((folder / ".git").exists() for folder in root.parents):
        subprocess.run(["git", "init", "--quiet", "--initial-branch", "main"], cwd=root, check=False)


def _files() -> Iterator[tuple[Path, Path]]:
    """(where it is, where it belongs in a project) of every file."""
    top = _TEMPLATE if (_TEMPLATE / SHARED[0]).is_dir() else _PACKAGE.parents[1]
    for begin, names in ((top, SHARED), (_TEMPLATE, OWN)):
        for path in (file for name in names for file in _below(begin / name)):
            relative = path.relative_to(begin)
            private = relative.parts[:2] == ("configs", "local") and path.name != "README.md"
            if not private and not any(part.endswith(("cache", "cache__")) for part in relative.parts):
                yield path, relative


def _below(path: Path) -> list[Path]:
    return [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]


def _write(source: Path, path: Path, package: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = source.read_text(encoding="utf-8")
    text = re.sub(r"\bproject\.(models|data|callbacks)\b", rf"{package}.\1", text)
    text = re.sub(r"(?m)^( *project): boltlab$", rf"\1: {package}", text)  # in golden texts
    text = text.replace("src/project", f"src/{package}").replace("@package@", package).replace("@engine@", engine())
    path.write_text(text, encoding="utf-8")
    path.chmod(source.stat().st_mode & 0o777)


def engine() -> str:
    """This engine as a dependency: the address or folder that it was installed from, else its version."""
    try:
        said = json.loads(distribution("boltlab").read_text("direct_url.json") or "null")
    except (PackageNotFoundError, ValueError):
        said = None
    if not said:
        return f"boltlab=={__version__}"
    version = said.get("vcs_info", {})
    url = f"{version['vcs']}+{said['url']}@{version['commit_id']}" if version else said["url"]
    return f"boltlab @ {url}"
