"""Public names of a package whose modules are imported when a name is asked for."""

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any


def public(package: str, file: str) -> tuple[list[str], Callable[[str], Any]]:
    """`__all__` and `__getattr__` of a package, from the stub beside its `__init__.py`, which type checkers read too:
    `from boltlab.metrics.means import MeanLoss as MeanLoss`."""
    stub = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    where = {alias.name: node.module or "" for node in imports for alias in node.names}
    # A module of an optional feature may have been deleted.
    there = {path.stem for path in Path(file).parent.glob("*.py")}
    where = {name: module for name, module in where.items() if module.rpartition(".")[2] in there}

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(where[name]), name)

    return sorted(where), get
