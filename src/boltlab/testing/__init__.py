"""Tests that a project's own modules and data modules inherit: a class in a test file names a config, and adds nothing.

    import boltlab.testing

    class TestMyNet(boltlab.testing.ModuleTests, boltlab.testing.DataModuleTests):
        config = "experiment=my_net data=small_part model.width=8"

A check that does not fit is removed by `test_… = None` in the class.
"""

import pytest

pytest.register_assert_rewrite("boltlab.testing.data_modules", "boltlab.testing.modules")

from boltlab.testing.data_modules import DataModuleTests  # noqa: E402
from boltlab.testing.modules import ModuleTests  # noqa: E402

__all__ = ["DataModuleTests", "ModuleTests"]
