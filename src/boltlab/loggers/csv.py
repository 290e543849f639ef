"""metrics.csv: one row a step, one column a metric, complete on disk after every call."""

import csv
import io
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from boltlab.ground.files import read_json


class CSVLogger(Logger):
    """Writes ``<dir>/metrics.csv``. Values logged at the same step share a row, so an epoch's training and validation
    metrics stand side by side. Rows are flushed at once: a killed process loses none.

    Lightning's own CSVLogger warns about a folder that holds other files, deletes an earlier metrics.csv, and keeps
    up to 100 steps in memory. This one continues a file that is there: rows of later steps than the one it
    continues at belong to a part of training that is done again and are dropped.

    Raises:
        OSError: the folder cannot be written, with the path in the message.
    """

    def __init__(self, dir: str | Path) -> None:
        super().__init__()
        self._dir = Path(dir)
        self._path = self._dir / "metrics.csv"
        self._columns: list[str] = []
        self._row: dict[str, Any] = {}  # the newest row, which later values of the same step are added to
        self._row_start = 0  # its position in the file, in bytes
        self._end = 0  # and that of the file's end

    @property
    def name(self) -> str:
        return ""  # Lightning names folders after this one

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return os.fspath(self._dir)

    @property
    def log_dir(self) -> str:
        """Where modules save files of their own, as with Lightning's loggers of files."""
        return self.save_dir

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Writes nothing: config.yaml stands in the same folder."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = self._row.get("step", -1) + 1 if step is None else step
        if not self._columns:
            self._open(step)
        if self._row.get("step") == step:
            self._row.update(metrics)
        else:
            self._row = {"step": step, **metrics}
            self._row_start = self._end
        if new := [name for name in metrics if name not in self._columns]:
            # A new column changes every line; it happens a few times a run, when validation and test first log.
            rows = self._read(before_byte=self._row_start)
            self._columns += new
            self._rewrite(rows)
        line = self._lines([self._row])
        # As few system calls as it takes: this stands in the training loop.
        file = os.open(self._path, os.O_WRONLY | getattr(os, "O_BINARY", 0))
        try:
            os.lseek(file, self._row_start, os.SEEK_SET)
            written = os.write(file, line)
            while written < len(line):  # on a disk that is nearly full; the next call says so
                written += os.write(file, line[written:])
            if self._row_start + len(line) < self._end:
                os.ftruncate(file, self._row_start + len(line))
        except OSError as e:
            raise OSError(e.errno, e.strerror, os.fspath(self._path)) from e
        finally:
            os.close(file)
        self._end = self._row_start + len(line)

    def _open(self, step: int) -> None:
        """Starts the file, or takes up one that an earlier part of the run has left."""
        self._dir.mkdir(parents=True, exist_ok=True)
        rows = [row for row in self._kept() if int(row["step"]) <= step]
        self._columns = list(dict.fromkeys(["step", "epoch", *(rows[0] if rows else [])]))
        same = rows.pop() if rows and int(rows[-1]["step"]) == step else None
        self._rewrite(rows)
        if same is not None:  # what was logged before the interruption, of the step whose rest is logged now
            self._row, self._row_start = {**same, "step": step}, self._end

    def _kept(self) -> list[dict[str, Any]]:
        """The rows that are there; of a file that a power cut has damaged, those that are whole."""
        try:
            rows = self._read()
            whole = all(
                int(row["step"]) >= 0 and all(float(cell or 0) or True for cell in row.values()) for row in rows
            )
            if whole and not any(None in row.values() for row in rows):
                return rows
        except FileNotFoundError:
            begun = (read_json(self._dir / "summary.json").get("resumed") or [{}])[-1]
            if isinstance(begun, dict) and begun.get("checkpoint"):
                print(f"{self._path} is gone: it begins anew", file=sys.stderr)
            return []
        except (ValueError, TypeError, KeyError, csv.Error):
            pass
        from boltlab.loggers.csv_salvage import salvage

        return salvage(self._path)

    def _read(self, before_byte: int | None = None) -> list[dict[str, Any]]:
        text = self._path.read_bytes()[:before_byte].decode()
        # A last line without its end is what a killed process was writing.
        return list(csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1])))

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        content = self._lines([dict(zip(self._columns, self._columns, strict=True)), *rows])
        beside = self._path.with_name("metrics.csv.new")
        try:
            beside.write_bytes(content)
            beside.replace(self._path)
        except OSError as e:
            beside.unlink(missing_ok=True)
            raise OSError(e.errno, e.strerror, os.fspath(self._path)) from e
        self._row_start = self._end = len(content)

    def _lines(self, rows: list[dict[str, Any]]) -> bytes:
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        return text.getvalue().encode()
