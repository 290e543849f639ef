"""The core: what `train`, `resume=` and `-m` import for a plain module with the default callbacks."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from plain.conftest import overrides
from waiting import HANG

import boltlab

PACKAGE = Path(boltlab.__file__).parent
MOST_LINES = 9_900  # of boltlab itself, as `wc` counts them

CODE = """
import sys
from boltlab.__main__ import main
given = sys.argv[1:]
for arguments in (given, ["resume=latest", "trusted=[cells]", "trainer.max_epochs=2"], ["-m", "seed=1,2", *given]):
    assert main(["train", *arguments]) == 0
print("imported", *(m.__file__ for n, m in sys.modules.items() if n.partition(".")[0] == "boltlab" and m.__file__))
"""


@pytest.mark.slow
def test_the_core_is_small_and_imports_no_optional_feature(cells, tmp_path):
    given = [*overrides("vae"), "trainer.max_epochs=1", "trusted=[cells]", "trainer.enable_progress_bar=false"]
    done = subprocess.run(
        [sys.executable, "-c", CODE, *given],
        cwd=shutil.copytree(cells, tmp_path / "cells"),
        env={**os.environ, "PYTHONPATH": str(tmp_path / "cells" / "src")},
        capture_output=True,
        text=True,
        timeout=HANG,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    imported = {Path(name) for name in done.stdout.splitlines()[-1].split()[1:]}
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in imported) <= MOST_LINES

    features = (PACKAGE.parents[1] / "docs" / "features.md").read_text(encoding="utf-8")
    optional = {PACKAGE.parents[1] / path for path in re.findall(r"`(src/boltlab/\S+\.py)`", features)}
    chosen = yaml.safe_load((PACKAGE / "configs" / "callbacks" / "default.yaml").read_text())["defaults"]
    by_default = {PACKAGE / "callbacks" / f"{name}.py" for name in chosen}
    assert len(optional) > 15 and not (imported & optional) - by_default
