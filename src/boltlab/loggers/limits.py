"""What the trackers take for names and tags: what they refuse when a run starts would be recorded nowhere."""

import posixpath
import re
from collections.abc import Iterator
from typing import Any

Found = list[tuple[str, str]]  # argument, and what is wrong with it


def of_wandb(arguments: dict[str, Any]) -> Found:
    """As wandb.Settings refuses them."""
    found = [
        ("tags", f"W&B takes tags of 1 to 64 characters, and {tag[:80]!r} has {len(tag)}: see tags=…")
        for tag in _texts(arguments.get("tags"))
        if not 1 <= len(tag) <= 64
    ]
    for project in _texts([arguments.get("project")]):
        if (bad := sorted(set(project) & set("/\\#?%:"))) or len(project) > 128:
            why = f"and no {' '.join(bad)} in it" if bad else f"and this has {len(project)}"
            found.append(("project", f"W&B takes a name of at most 128 characters, {why}: project=…"))
    return found


def of_mlflow(arguments: dict[str, Any]) -> Found:
    """As mlflow.utils.validation refuses them."""
    found = []
    for tag in _texts(arguments.get("tags")):
        path = posixpath.normpath(tag)
        outside = path != tag or path == "." or path.startswith(("..", "/"))
        if outside or len(tag) > 250 or not re.fullmatch(r"[/\w.\- :]+", tag):
            rule = "1 to 250 letters, digits, spaces and _ - . : / between them"
            found.append(("tags", f"MLflow takes tags of {rule}, and not {tag[:80]!r}: see tags=…"))
    names = [name for name in _texts([arguments.get("experiment_name")]) if not 1 <= len(name) <= 500]
    message = "MLflow takes a name of 1 to 500 characters, not {}: project=…"
    return found + [("experiment_name", message.format(len(name))) for name in names]


def _texts(values: Any) -> Iterator[str]:
    yield from (value for value in values or [] if isinstance(value, str))
