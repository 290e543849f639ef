"""The checks that boltlab brings, on small configs of this project. docs/testing.md of boltlab says what they check."""

import boltlab.testing


class TestDigits(boltlab.testing.ModuleTests, boltlab.testing.DataModuleTests):
    config = "data=digits model=mlp augment=basic data.max_samples=300 callbacks=[best,last]"


class TestDiabetes(boltlab.testing.ModuleTests, boltlab.testing.DataModuleTests):
    config = "data=diabetes model=mlp_regressor callbacks=[best,last] monitor=val_loss"
    overfit = "optimizer.lr=0.03"
