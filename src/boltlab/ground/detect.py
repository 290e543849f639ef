"""Keys and tokens that are known by their form, and what code or a settings file sets to a literal secret."""

import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from boltlab.ground.credentials import URL, is_secret_name

# A name, what it is set to in quotes, or without them at the end of a line.
_ASSIGNED = re.compile(
    r"""(?<![\w.-])([\w.-]{1,80})["']?(?:\s+string)?\s*(?::|:?=)\s*"""
    r"""(?:["'`]([\w!#%&*+/=?@^~.:$-]{12,})["'`]|([\w!#%&*+/=?@^~-]{12,})["']?\s*[,;)}]*\s*$)""",
    re.MULTILINE,
)
_TOKEN = re.compile("token$", re.IGNORECASE)
_BITS, _SHORTEST = 3.2, 10  # of a character of a random text; characters of a URL's password


@functools.cache
def _rules() -> list[tuple[list[str], str]]:
    content = json.loads(Path(__file__).with_name("tokens.json").read_text(encoding="utf-8"))
    return [(words, pattern) for _, words, pattern in content["rules"]]


def tokens(text: str) -> Iterator[str]:
    """Each key or token in a text."""
    for words, pattern in _rules():
        if any(word in text for word in words):
            yield from (match["value"] for match in re.finditer(pattern, text))


def in_code(text: str) -> bool:
    """Whether lines of code or settings hold a secret. A name alone says little there: its value must look random."""
    passwords = [match["password"] for match in URL.finditer(text)]
    if next(tokens(text), None) or any(len(word) >= _SHORTEST and word[0] not in "{<$%[" for word in passwords):
        return True
    named = ((match[1], match[2] or match[3]) for match in _ASSIGNED.finditer(text))
    return any((is_secret_name(name) or _TOKEN.search(name)) and _random(value) for name, value in named)


def _random(value: str) -> bool:
    if not (re.search(r"\d", value) and re.search("[A-Za-z]", value)):
        return bool(re.search("[a-z]", value) and re.search("[A-Z]", value) and _entropy(value) > _BITS + 1)
    return _entropy(value) > _BITS


def _entropy(value: str) -> float:
    shares = [value.count(character) / len(value) for character in set(value)]
    return -sum(share * math.log2(share) for share in shares)
