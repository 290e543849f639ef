"""The resolved config of every shipped experiment is a committed text: a changed default is seen."""

import pytest
from stand_in import make_images

import boltlab.testing
from boltlab.config.sources import groups


@pytest.mark.parametrize("experiment", groups()["experiment"])
def test_the_config_of_an_experiment_is_golden(experiment, request, tmp_path):
    (tmp_path / "examples").symlink_to(request.config.rootpath / "examples")
    make_images(tmp_path)
    kind = type(experiment, (boltlab.testing.ModuleTests,), {"config": f"experiment={experiment} data_dir=."})
    kind().test_its_config_is_golden(request)
