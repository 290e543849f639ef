"""Tables: a base for data modules of them, and CSV files; all fit in memory."""

import csv
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor

from boltlab.data.base import DataModule, Split
from boltlab.data.loader import TensorData
from boltlab.data.splits import listed
from boltlab.ground.errors import DataError

LARGEST = torch.finfo(torch.float32).max


@dataclass(kw_only=True, eq=False, repr=False)
class TableDataModule(DataModule):
    """Base of the tables; a subclass defines `table()`. Yields x float32 [B,F] and y int64 [B] or float32 [B].

    Every feature is standardized with the mean and standard deviation of the training rows alone, which stand in
    `mean` and `std` [F] once a split is loaded. The target of a regression keeps its unit unless `standardize_target`,
    which then uses `target_mean` and `target_std`, again of the training rows. Checkpoints hold all four and the names
    of the features: `eval` applies them to rows of any other table.
    DataError names the first number that float32 cannot hold, as it is or standardized: nan, infinite or too large.

    test_fraction, val_fraction: share of all rows set aside for testing, and of the others for validation;
        stratified by class in classification.
    """

    input_shape: tuple[int] | Literal["auto"] = "auto"
    test_fraction: float | int = 0.2
    standardize_target: bool = False

    mean: Tensor = field(init=False)
    std: Tensor = field(init=False)
    target_mean: float = field(init=False, default=0.0)
    target_std: float = field(init=False, default=1.0)

    def table(self) -> tuple[Tensor, Tensor]:
        """All rows: features float64 [N,F], and the target, int64 [N] or float64 [N]."""
        raise NotImplementedError

    @property
    def feature_columns(self) -> list[str] | None:
        """Names of the features in the order of x; None where they have none."""
        return None

    def cell(self, row: int, column: int | None = None) -> str:
        """Where a number of the table stands, for people; without a column, the target."""
        return f"{type(self).__name__}: {'target' if column is None else f'feature {column}'}, row {row}"

    @cached_property
    def _splits(self) -> dict[Split, TensorData]:
        x, y = self.table()
        x, y = x.double(), y.double() if y.is_floating_point() else y
        for values in (x, y):
            self._refuse(~(values.abs() <= LARGEST), values, "is no finite number of float32")
        rows = self.three_splits(y, self.test_fraction)
        if "mean" not in self.fitted:
            self._fit(x[rows["train"]], y[rows["train"]])
        self.mean, self.std = self.fitted["mean"], self.fitted["std"]
        if len(self.mean) != x.shape[1]:
            raise DataError(f"the run was trained on {len(self.mean)} feature columns, this table has {x.shape[1]}")
        x = self._standardized(x, self.mean, self.std)
        if y.is_floating_point():
            self.target_mean, self.target_std = self.fitted["target_mean"], self.fitted["target_std"]
            y = self._standardized(y, self.target_mean, self.target_std)
        data = TensorData(x, y)
        return {split: data.subset(indices) for split, indices in rows.items()}

    def _fit(self, x: Tensor, y: Tensor) -> None:
        if self.whole:
            raise DataError(f"{type(self).__name__}: what the run has fitted on its training rows is not known")
        std = x.std(0, correction=0)
        std = torch.where(std > 0, std, 1.0)  # a constant column becomes 0
        self.fitted |= {"features": self.feature_columns, "mean": x.mean(0), "std": std}
        if y.is_floating_point():
            mean, deviation = (y.mean().item(), y.std(correction=0).item()) if self.standardize_target else (0.0, 1.0)
            self.fitted |= {"target_mean": mean, "target_std": deviation or 1.0}

    def _standardized(self, values: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
        scaled = (values - mean) / std
        self._refuse(scaled.abs() > LARGEST, values, "is too large for float32 once it is standardized")
        return scaled.float()

    def _refuse(self, wrong: Tensor, values: Tensor, why: str) -> None:
        if wrong.any():
            place, count = wrong.nonzero()[0].tolist(), int(wrong.sum())
            more = f" ({count} such numbers)" if count > 1 else ""
            raise DataError(f"{self.cell(*place)}: {values[tuple(place)]:.6g} {why}{more}")

    def load(self, split: Split) -> TensorData:
        return self._splits[split]


@dataclass(kw_only=True, eq=False, repr=False)
class CSV(TableDataModule):
    """A CSV file (UTF-8) with numeric feature columns and one target column.

    columns: names of the columns of a file without a header row; None reads them from its first row.
    delimiter, decimal: what divides cells, "tab" as well as a character; and what stands before a number's decimals.
    skip_lines: lines on top that are no part of the table.
    missing: cells, in any case, that hold no value; each is an error in a column that is used.
    target: the column to predict: any text in classification (sorted: the classes), a number in regression.
    features: the columns to predict from; None takes all others. Of a trained run they are those of its training, found
        by name, in whatever order another file has them.
    DataError names the column and line of what is missing or not a number.
    """

    path: str
    target: str
    task: Literal["classification", "regression"] = field()
    features: list[str] | None = None
    columns: list[str] | None = None
    delimiter: str = ","
    decimal: Literal[".", ","] = "."
    skip_lines: Annotated[int, Ge(0)] = 0
    missing: list[str] = field(default_factory=lambda: ["", "na", "nan", "null", "none", "?"])

    @classmethod
    def discover(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        if not all(isinstance(arguments.get(name), str) for name in ("path", "target", "task")):
            return {}  # the check of the arguments names what is missing
        about_the_file = ("path", "target", "task", "features", "columns", "num_classes", "class_names")
        how_to_read = ("delimiter", "decimal", "skip_lines", "missing")
        module = cls(**{name: arguments[name] for name in about_the_file + how_to_read if name in arguments})
        return {name: getattr(module, name) for name in ("input_shape", "num_classes", "class_names")}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.path = os.path.expanduser(self.path)
        if self.input_shape == "auto":
            self.input_shape = (len(self.feature_columns),)
        if self.task == "regression":
            self.num_classes = self.class_names = None
        elif self.class_names in ("auto", None) or self.num_classes in ("auto", None):
            texts = self._column(self.target)
            self.class_names = sorted(set(texts), key=_numbers_by_value)
            forms = Counter(unicodedata.normalize("NFC", name) for name in self.class_names)
            if twice := [name for name, count in forms.items() if count > 1]:
                said = f"writes {listed(twice, None)} in two forms of Unicode, which would be two classes"
                raise DataError(f"{self.path}: column {self.target!r} {said}")
            self.num_classes = len(self.class_names)

    def files(self, split: Split) -> list[tuple[str, str]]:
        return [(Path(self.path).name, self.path)]

    def _read(self) -> list[tuple[int, list[str]]]:
        """(line number, cells) of each line that is not empty, the header included."""
        path = Path(self.path)
        if not path.is_file():
            raise DataError(f"data.path={self.path} does not exist (looked for {path.absolute()})")
        try:
            with path.open(encoding="utf-8-sig", newline="") as file:
                above = sum(1 for _ in islice(file, self.skip_lines))
                mark = "\t" if self.delimiter in ("tab", "\\t") else self.delimiter
                reader = csv.reader(file, delimiter=mark, skipinitialspace=True, strict=True)
                return [(above + reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(cells)]
        except UnicodeDecodeError as error:
            cure = f"iconv -f WINDOWS-1252 -t UTF-8 {path.name}, if Windows has written it"
            raise DataError(f"{path} is no CSV file in UTF-8: {error}; {cure}") from error
        except (OSError, csv.Error, TypeError) as error:
            raise DataError(f"{path} is no CSV file in UTF-8: {error}") from error

    @cached_property
    def _rows(self) -> tuple[list[str], list[tuple[int, list[str]]]]:
        """(column names, [(line number, cells)])"""
        path, rows = Path(self.path), self._read()
        names = list(self.columns) if self.columns is not None else rows.pop(0)[1] if rows else []
        if not rows:
            raise DataError(f"{path} has no rows")
        named = names[:-1] if names and not names[-1] else names
        if all(not cells[-1] and len(cells) == len(named) + 1 for _, cells in rows):  # a delimiter ends each line
            names, rows = named, [(line, cells[:-1]) for line, cells in rows]
        if len(set(names)) < len(names):
            raise DataError(f"{path}: two columns have the same name: {', '.join(names)}")
        for line, cells in rows:
            if len(cells) != len(names):
                said = f"{len(cells)} cells, but {len(names)} columns: {', '.join(names)}"
                raise DataError(f"{path}, line {line}: {said}{self._other_format(names, len(cells) > len(names))}")
        return names, rows

    def _other_format(self, names: list[str], short: bool = False) -> str:
        """The key that reads the file, as its header looks. short: it has fewer cells than a row."""
        mark = next((mark for mark in ";\t|," if len(names) == 1 and mark in names[0]), None)
        if mark is not None:
            return f" ('data.delimiter=\"{mark}\"')".replace('"\t"', "tab")
        if short or names[0].startswith("#"):
            return " (data.skip_lines=1, if the header is not the first line)"
        return "" if self.columns is not None else " (a file without a header row needs data.columns=[…])"

    @property
    def feature_columns(self) -> list[str]:
        """Names of the features, in the order of x."""
        names, asked = self._rows[0], self._asked_features
        wanted = [*(asked or []), self.target]
        if unknown := [name for name in wanted if name not in names]:
            has = f"it has {', '.join(map(repr, names))}{self._other_format(names)}"
            raise DataError(f"{self.path} has no column {unknown[0]!r}; {has}")
        if asked is not None and self.target in asked:
            raise DataError(f"data.target={self.target} is also among data.features")
        features = asked if asked is not None else [name for name in names if name != self.target]
        if not features:
            raise DataError(f"{self.path} has no column besides the target {self.target!r}")
        return list(features)

    @property
    def _asked_features(self) -> Sequence[str] | None:
        """Those that the run was trained on, else those of the config; None where neither names any."""
        trained = self.fitted.get("features")
        if trained and self.features is not None and set(self.features) != set(trained):
            raise DataError(f"data.features={self.features}: the run was trained on {trained}")
        return trained or self.features

    def _column(self, name: str) -> list[str]:
        names, rows = self._rows
        if name not in names:
            _ = self.feature_columns  # says so
        place = names.index(name)
        none = {text.lower() for text in self.missing}
        if empty := [(line, cells[place]) for line, cells in rows if cells[place].lower() in none]:
            missing = "a missing value" if len(empty) == 1 else f"{len(empty)} missing values, the first"
            a_class = self.task == "classification" and name == self.target and empty[0][1]
            cure = f": {a_class!r}; if that is a class: 'data.missing=[\"\"]'" if a_class else ""
            raise DataError(f"{self.path}: column {name!r} has {missing} in line {empty[0][0]}{cure}")
        return [cells[place] for _, cells in rows]

    def _numbers(self, name: str) -> Tensor:
        numbers = []
        for (line, _), text in zip(self._rows[1], self._column(name), strict=True):
            try:
                # With a decimal comma, a point would divide thousands; Python takes "1_0" for 10, nobody else does.
                wrong = "_" in text or (self.decimal == "," and "." in text)
                numbers.append(float("nan" if wrong else text.replace(self.decimal, ".")))
            except ValueError:
                numbers.append(float("nan"))
            if numbers[-1] - numbers[-1] != 0:  # infinite, or not a number
                hint = "" if name == self.target else "; data.features=[…] leaves it out"
                if "," in text and self.decimal == ".":
                    hint += "; 'data.decimal=\",\"', if the comma stands before the decimals"
                raise DataError(f"{self.path}: column {name!r}, line {line}: {text!r} is not a number{hint}")
        return torch.tensor(numbers, dtype=torch.float64)

    def cell(self, row: int, column: int | None = None) -> str:
        name = self.target if column is None else self.feature_columns[column]
        return f"{self.path}: column {name!r}, line {self._rows[1][row][0]}"

    def table(self) -> tuple[Tensor, Tensor]:
        x = torch.stack([self._numbers(name) for name in self.feature_columns], dim=1)
        if self._asked_features is None:
            self._say_counting(x)
        if self.task == "regression":
            return x, self._numbers(self.target)
        label = {name: index for index, name in enumerate(self.class_names or [])}
        texts = self._column(self.target)
        if unknown := sorted(set(texts) - label.keys()):
            named = f"{listed(unknown, None)} in column {self.target!r} {'is' if len(unknown) == 1 else 'are'}"
            raise DataError(f"{self.path}: {named} not among data.class_names ({listed(list(label), None)})")
        return x, torch.tensor([label[text] for text in texts])

    def _say_counting(self, x: Tensor) -> None:
        """Names columns that number the rows, as an index does: in a file that is sorted they tell the target."""
        counting = [name for name, column in zip(self.feature_columns, x.T, strict=True) if (column.diff() == 1).all()]
        if counting and len(x) > 2 and self._rank_and_world_size()[0] == 0:
            names = f"{listed(counting, None)} number{'s' * (len(counting) == 1)} the rows"
            print(f"{self.path}: column {names}; data.features=[…] leaves out an index", flush=True)


def _numbers_by_value(text: str) -> tuple[int, float, str]:
    number = re.fullmatch(r"[+-]?\d+(\.\d+)?", text)
    return (0, float(text), text) if number else (1, 0.0, text)
