"""Keys and tokens that are known by their form, in any text; the rules are data, with their source and licence."""

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path


@functools.cache
def _rules() -> list[tuple[list[str], str]]:
    content = json.loads(Path(__file__).with_name("tokens.json").read_text(encoding="utf-8"))
    return [(words, pattern) for _, words, pattern in content["rules"]]


def tokens(text: str) -> Iterator[str]:
    """Each key or token in a text."""
    for words, pattern in _rules():
        if any(word in text for word in words):
            yield from (match["value"] for match in re.finditer(pattern, text))
