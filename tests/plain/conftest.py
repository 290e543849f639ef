"""A project of its own, `cells`, with six plain modules, copied and installed as `pip install -e` would do it."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from boltlab import runs

# kind: data, model, what is monitored
KINDS = {
    "vae": ("digits", "vae", "val_loss"),
    "gan": ("digits", "gan", "val_loss"),
    "labels": ("labels", "labels", "val/auroc"),
    "lstm": ("sequences", "lstm", "val_acc"),
    "forecaster": ("series", "forecaster", "val_loss"),
    "lit": ("digits", "lit", "val/acc"),
}
QUICK = ("logger=csv", "trainer.accelerator=cpu", "trainer.max_epochs=2", "precision=32")


def overrides(kind):
    data, model, monitor = KINDS[kind]
    return (f"data=cells_{data}", f"model=cells_{model}", f"monitor={monitor}", *QUICK)


def install(root, site, editable=True, name="cells"):
    """What an installer leaves of a project in a site-packages folder."""
    info = site / f"{name}-0.3.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.3\n")
    (info / "direct_url.json").write_text(json.dumps({"url": root.as_uri(), "dir_info": {"editable": editable}}))


def forget():
    for name in [name for name in sys.modules if name.partition(".")[0] == "cells"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The root of the project, installed editable, its package importable."""
    folder = tmp_path_factory.mktemp("cells").resolve()
    root = Path(shutil.copytree(Path(__file__).parent / "project", folder / "cells"))
    install(root, folder / "site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("site.getsitepackages", lambda: [str(folder / "site")])
        patch.syspath_prepend(root / "src")
        forget()
        yield root
    forget()


@pytest.fixture(scope="module")
def trained(cells):
    """The run folder of a kind, trained once."""
    made = {}

    def run(kind):
        if kind not in made:
            from boltlab.__main__ import main

            here = Path.cwd()
            os.chdir(cells)
            try:
                assert main(["train", *overrides(kind)]) == 0
                made[kind] = next(runs.folders("logs")).resolve()
            finally:
                os.chdir(here)
        return made[kind]

    return run


@pytest.fixture
def inside(cells, monkeypatch):
    """Lets a test run in the project's folder."""
    monkeypatch.chdir(cells)
    return cells
