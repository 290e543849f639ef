"""The shipped modules and data modules pass the checks that a project's classes inherit."""

import pytest

import boltlab.testing

pytestmark = [pytest.mark.slow, pytest.mark.floats]


class TestClassifier(boltlab.testing.ModuleTests, boltlab.testing.DataModuleTests):
    config = "data=digits augment=basic data.max_samples=300 model=mlp callbacks=[best,last]"
    test_its_config_is_golden = None


class TestRegressor(boltlab.testing.ModuleTests, boltlab.testing.DataModuleTests):
    config = "data=diabetes model=mlp_regressor callbacks=[best,last] monitor=val_loss"
    overfit = "optimizer.lr=0.03"
    test_its_config_is_golden = None
