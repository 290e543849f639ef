"""Groups that an experiment or another file sets and nothing uses."""

from collections.abc import Callable, Iterator
from typing import Any

from boltlab.ground.errors import Mistake


def of_files(
    choices: dict[str, Any], files: dict[str, Any], reasons: dict[str, str], compose: Callable[[list[str]], Any]
) -> Iterator[Mistake]:
    """Which of the chosen files, group -> choice, sets a group of `reasons`: what is composed with it alone differs
    from what is composed without any. `compose` gives config and choices of overrides."""
    kept = [f"{key}={choices[key]}" for key in ("data", "model") if isinstance(choices.get(key), str)]
    without = {key: f"~{key}" for key in files}
    default = compose([*kept, *without.values()])
    for key, choice in files.items():
        alone = compose([*kept, *(without | {key: f"{key}={choice}"}).values()])
        for group, reason in reasons.items():
            parts = zip(alone, default, strict=True)
            if default[0] and alone[0] and any(part.get(group) != other.get(group) for part, other in parts):
                yield Mistake(f"{key}={choice}", f"sets {group}, which {reason}; without it: '~{group}'")
