"""git.patch: the uncommitted changes of a clone, as git applies them elsewhere."""

import math
import os
import re
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from boltlab.ground import credentials, detect

MOST_OF_FILE, MOST_OF_PATCH = 1_000_000, 20_000_000  # bytes of a file, and of all, that git.patch takes
# A name, what it is set to in quotes, or without them at the end of a line.
_ASSIGNED = re.compile(
    r"""(?<![\w.-])([\w.-]{1,80})["']?(?:\s+string)?\s*(?::|:?=)\s*"""
    r"""(?:["'`]([\w!#%&*+/=?@^~.:$-]{12,})["'`]|([\w!#%&*+/=?@^~-]{12,})["']?\s*[,;)}]*\s*$)""",
    re.MULTILINE,
)
_TOKEN = re.compile("token$", re.IGNORECASE)
_BITS, _SHORTEST = 3.2, 10  # of a character of a random text; characters of a URL's password


def make(
    git: Callable[..., bytes], folder: Path, commit: str, changed: dict[str, list[str]]
) -> tuple[bytes, tuple[str, ...]]:
    """The changed files, each with what git's status says of it, as a patch; and those that are left out. It is made in
    an index and a store of objects of its own, so that git's stay, and of these files alone, so that no other is
    read. git: runs it in `folder`, with these arguments and variables."""
    top, objects = os.fsdecode(git("rev-parse", "--show-toplevel", "--git-path", "objects"))[:-1].split("\n")
    left_out = _left_out(git, Path(top), changed)
    taken = os.fsencode("".join(f"{path}\0" for path in changed if path not in left_out))
    with tempfile.TemporaryDirectory() as scratch:
        about = Path(scratch) / "objects" / "info"
        about.mkdir(parents=True)
        (about / "alternates").write_bytes(os.fsencode(folder / objects) + b"\n")
        own = {"GIT_INDEX_FILE": f"{scratch}/index", "GIT_OBJECT_DIRECTORY": f"{scratch}/objects"}
        git("read-tree", commit, **own)
        git("-C", top, "update-index", "--add", "--remove", "--replace", "-z", "--stdin", stdin=taken, **own)
        # Unlike `git diff`, this takes no heed of how people set their diffs to look.
        plain = ("--no-color", "--no-ext-diff", "--no-textconv", "--find-renames")
        patch = git("diff-index", "--cached", "--patch", "--binary", *plain, commit, **own)
    parts = re.split(rb"^(?=diff --git )", patch, flags=re.MULTILINE)
    secrets = [_secret_of(part) for part in parts]
    left_out += filter(None, secrets)
    return b"".join(part for part, name in zip(parts, secrets, strict=True) if not name), tuple(sorted(left_out))


def _secret_of(part: bytes) -> str:
    """The name of a file whose new lines hold a secret; empty where they hold none."""
    head, _, body = part.decode(errors="replace").partition("\n@@ ")
    added = "\n".join(line[1:] for line in body.split("\n") if line.startswith("+"))
    return head.rpartition("\n+++ ")[2].strip('"\t').removeprefix("b/") if in_code(added) else ""


def _left_out(git: Callable[..., bytes], top: Path, changed: dict[str, list[str]]) -> list[str]:
    """The changed files that are no part of the patch: those that hold keys or passwords by their names, large ones,
    unread, what may not be read, and clones of something else."""
    names = {word for about in changed.values() for word in about if len(word) >= 40}  # of what was committed
    answer = git("cat-file", "--batch-check=%(objectname) %(objectsize)", stdin="\n".join(names).encode())
    committed = {name: int(size) for name, size in map(str.split, answer.decode().splitlines()) if size.isdigit()}
    sizes = {path: max((committed.get(word, 0) for word in about), default=0) for path, about in changed.items()}
    for path in changed:
        with suppress(OSError):  # removed
            found = os.lstat(top / path)
            if stat.S_ISREG(found.st_mode):
                sizes[path] = max(sizes[path], found.st_size if os.access(top / path, os.R_OK) else MOST_OF_FILE + 1)
    left_out, most = [], MOST_OF_PATCH
    for path, size in sorted(sizes.items(), key=lambda item: item[1]):
        if credentials.private(path) or path.endswith("/") or size > min(MOST_OF_FILE, most):
            left_out.append(path)
        else:
            most -= size
    return left_out


def in_code(text: str) -> bool:
    """Whether lines of code or settings hold a secret. A name alone says little there: its value must look random."""
    passwords = [match["password"] for match in credentials.URL.finditer(text)]
    if next(detect.tokens(text), None) or any(len(word) >= _SHORTEST and word[0] not in "{<$%[" for word in passwords):
        return True
    named = ((match[1], match[2] or match[3]) for match in _ASSIGNED.finditer(text))
    return any((credentials.is_secret_name(name) or _TOKEN.search(name)) and _random(value) for name, value in named)


def _random(value: str) -> bool:
    if not (re.search(r"\d", value) and re.search("[A-Za-z]", value)):
        return bool(re.search("[a-z]", value) and re.search("[A-Z]", value) and _entropy(value) > _BITS + 1)
    return _entropy(value) > _BITS


def _entropy(value: str) -> float:
    shares = [value.count(character) / len(value) for character in set(value)]
    return -sum(share * math.log2(share) for share in shares)
