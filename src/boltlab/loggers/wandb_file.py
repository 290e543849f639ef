"""What wandb has written of a run into files: of one that was killed, what reaches the server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from boltlab.loggers.resumed import Points, Rows, lacking

_BLOCK = 32768  # bytes of a block of W&B's file
_HEADER = 7  # and of its header, and of the one before each piece of a record: checksum, 2 bytes of length, kind
_WHOLE, _FIRST, _LAST = 1, 2, 4  # kinds of pieces; others lie between the first and the last one


def lost(dir: Path, id: str, rows: Rows) -> tuple[Rows, Points]:
    """Of what was logged, what the files of a run's earlier parts lack, and what they have of what comes next. A part
    that was killed before W&B was up has no file."""
    known = {point for path in dir.glob(f"*run-*-{id}/*.wandb") for point in _points(path)}
    return lacking(rows, known), known


def _points(path: Path) -> Iterator[tuple[str, int]]:
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    for content in _contents(path.read_bytes()):
        record: Any = Record.FromString(content)
        items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
        step = items.pop("trainer/global_step", None)
        if step is not None:
            yield from ((name, int(step)) for name in items)


def _contents(data: bytes) -> Iterator[bytes]:
    """The records of W&B's file, which is in LevelDB's format for logs; the last one may be torn."""
    at, content = _HEADER, b""
    while at + _HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER:  # no room for another header
            at += _BLOCK - at % _BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        piece = data[at + _HEADER : at + _HEADER + length]
        if not length or len(piece) < length:
            return
        content = piece if kind in (_WHOLE, _FIRST) else content + piece
        if kind in (_WHOLE, _LAST):
            yield content
        at += _HEADER + length
