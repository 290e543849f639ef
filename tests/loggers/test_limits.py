"""What our limits refuse is what the trackers' own validators refuse."""

import pytest
import wandb

from boltlab.loggers import limits

TAGS = ["a", "", "a" * 64, "a" * 65, "ä" * 64, "a/b", "a,b", "/a", "a/../b", "..", "a b", "x" * 250, "x" * 251, "a\nb"]
PROJECTS = ["digits", "", "a/b", "a\\b", "a#b", "50%", "who?", "a:b", "p" * 128, "p" * 129, "ä ö", "p" * 501]


def refuses(validator, *arguments, **keywords):
    try:
        validator(*arguments, **keywords)
    except Exception:
        return True
    return False


@pytest.mark.parametrize("tag", TAGS)
def test_tags(tag):
    assert bool(limits.of_wandb({"tags": ["good", tag]})) == refuses(wandb.Settings, run_tags=[tag])
    validation = pytest.importorskip("mlflow.utils.validation")
    assert bool(limits.of_mlflow({"tags": [tag]})) == refuses(validation._validate_tag, tag, "")


@pytest.mark.parametrize("name", PROJECTS)
def test_projects(name):
    assert bool(limits.of_wandb({"project": name})) == refuses(wandb.Settings, project=name)
    validation = pytest.importorskip("mlflow.utils.validation")
    assert bool(limits.of_mlflow({"experiment_name": name})) == refuses(validation._validate_experiment_name, name)


@pytest.mark.parametrize(
    ("logger", "key"), [("wandb", "logger.wandb.tags"), ("mlflow", "logger.mlflow.tags"), ("[csv,wandb]", "project")]
)
def test_it_is_said_before_the_start(boltlab, tmp_path, logger, key):
    given = ["project=a/b"] if key == "project" else [f"tags=['{'a' * 300}']"]
    code, _, err = boltlab("train", "data=digits", "model=linear", f"logger={logger}", *given)
    assert code == 2 and key in err and not (tmp_path / "logs").exists()
