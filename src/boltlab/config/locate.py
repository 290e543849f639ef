"""The class or function that a `_target_` names."""

import importlib
import inspect
import pkgutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from boltlab.ground.errors import ConfigError, Mistake, UserError, suggest


def locate(name: Any) -> Callable[..., Any]:
    """The class or function that a `_target_` names.

    Raises:
        ConfigError: nothing has that name, or a package is not installed.
    """
    if not isinstance(name, str) or "." not in name:
        raise ConfigError([Mistake("_target_", f"is no dotted path of a class or function: {name!r}")])
    parts = name.split(".")
    thing: Any = None
    for depth, part in enumerate(parts):
        thing = getattr(thing, part) if depth and hasattr(thing, part) else _imported(parts[: depth + 1], thing)
    if not callable(thing):
        raise ConfigError([Mistake("_target_", f"{name} is a {type(thing).__name__}, not a class or function")])
    return thing


def _imported(parts: list[str], parent: Any) -> Any:
    """The module of that path. parent: what the path without its last part names.

    Raises:
        ConfigError: there is none, or its import fails.
    """
    path, above, last = ".".join(parts), ".".join(parts[:-1]), parts[-1]
    if above and not inspect.ismodule(parent):
        raise ConfigError([Mistake("_target_", f"{above} has no {last!r}")])
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as e:
        if e.name and not path.startswith(e.name):
            message = f"needs the package {e.name!r}, which is not installed"
        elif not above:
            message = f"there is no package {last!r}; is it installed?"
        else:
            names = [*dir(parent), *(m.name for m in pkgutil.iter_modules(getattr(parent, "__path__", [])))]
            message = suggest(f"{above} has no {last!r}", last, names, "check the spelling")
        raise ConfigError([Mistake("_target_", message)]) from e
    except UserError:
        raise
    except Exception as e:  # whatever a module does when it is imported
        raise ConfigError([Mistake("_target_", _of_import(path, e))]) from e


def _of_import(path: str, error: Exception) -> str:
    """Says where the import of a module failed: in its own package where that is on the way."""
    frames = traceback.extract_tb(error.__traceback__)
    package = path.split(".")[0]
    at = next((frame for frame in reversed(frames) if package in Path(frame.filename).parts), frames[-1])
    return f"{path} cannot be imported: {type(error).__name__}: {error} ({at.filename}, line {at.lineno})"
