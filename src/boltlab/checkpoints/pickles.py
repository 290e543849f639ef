"""What a pickle would import and run, found without running it."""

import pickletools
import re
import zipfile
from contextlib import suppress
from typing import IO, Any

import torch


def imports(file: IO[bytes]) -> list[str]:
    """Functions and classes that unpickling a file would import, those that torch takes for harmless left out.

    The pickle is taken apart, never run. Reads what torch.save writes, in its present and its old format, and a plain
    pickle; a file that is neither imports nothing.
    """
    file.seek(0)
    with suppress(Exception):  # no archive, or a newer pickle protocol than torch's own
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    file.seek(0)
    found: set[str] = set()
    with suppress(Exception):  # where a pickle ends and something else follows
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                for name in archive.namelist():
                    if name.endswith(".pkl"):
                        with archive.open(name) as inner:
                            _add_imports(inner, found)
        else:
            file.seek(0)
            while True:  # torch's old format is one pickle after another
                _add_imports(file, found)
    return sorted(name for name in found if not _HARMLESS.fullmatch(name))


_HARMLESS = re.compile(r"torch\.(\w+Storage|_utils\._rebuild_\w+)|collections\.OrderedDict")


def _add_imports(file: Any, found: set[str]) -> None:
    texts: list[str] = []  # as they come; a module and a name stand right before the opcode that takes them
    memo: dict[int, str] = {}
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            found.add(str(argument).replace(" ", "."))
        elif opcode.name == "STACK_GLOBAL":
            found.add(".".join(texts[-2:]))
        elif opcode.name == "MEMOIZE":
            memo[len(memo)] = texts[-1] if texts else ""
        elif opcode.name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(str(argument))] = texts[-1] if texts else ""
        elif opcode.name in ("BINGET", "LONG_BINGET", "GET"):
            texts.append(memo.get(int(str(argument)), "?"))
        elif isinstance(argument, str):
            texts.append(argument)
