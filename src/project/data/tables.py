"""Tables without a file: scikit-learn's diabetes, and synthetic classes."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from boltlab.data import TableDataModule
from sklearn.datasets import load_diabetes, make_classification
from torch import Tensor


@dataclass(kw_only=True, eq=False, repr=False)
class Diabetes(TableDataModule):
    """442 patients, ten measurements, progress of the disease after a year (25..346): regression.

    Source: Efron et al., "Least Angle Regression", Annals of Statistics 32 (2004); scikit-learn carries it. The raw
    columns are read, for scikit-learn's scaled ones were standardized with the test rows included.
    """

    input_shape: tuple[int] | Literal["auto"] = (10,)
    task: Literal["classification", "regression"] = field(init=False, default="regression")

    def table(self) -> tuple[Tensor, Tensor]:
        x, y = load_diabetes(return_X_y=True, scaled=False)
        return torch.from_numpy(x), torch.from_numpy(y)


@dataclass(kw_only=True, eq=False, repr=False)
class SyntheticClasses(TableDataModule):
    """Gaussian clusters on the corners of a hypercube (scikit-learn's make_classification): classification.

    The rows depend on `table_seed` alone. num_informative: features that tell the classes apart; the others are noise.
    """

    num_rows: int = 10_000
    num_features: int = 100
    num_informative: int = 20
    class_separation: float = 2.0
    table_seed: int = 0

    located_by: ClassVar[tuple[str, ...]] = (
        "num_rows", "num_features", "num_informative", "class_separation", "table_seed"
    )  # fmt: skip

    @classmethod
    def discover(cls, arguments: dict[str, Any]) -> dict[str, Any]:
        num_classes = arguments.get("num_classes", 10)
        return {
            "input_shape": [arguments.get("num_features", 100)],
            "class_names": [str(label) for label in range(num_classes)] if isinstance(num_classes, int) else "auto",
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        self.num_classes = self.num_classes if isinstance(self.num_classes, int) else 10
        self.input_shape = (self.num_features,)
        if not isinstance(self.class_names, list):
            self.class_names = [str(label) for label in range(self.num_classes)]

    def table(self) -> tuple[Tensor, Tensor]:
        x, y = make_classification(
            n_samples=self.num_rows,
            n_features=self.num_features,
            n_informative=self.num_informative,
            n_redundant=0,
            n_classes=self.num_classes,
            n_clusters_per_class=1,
            class_sep=self.class_separation,
            random_state=self.table_seed,
        )
        return torch.from_numpy(x), torch.from_numpy(y).long()
