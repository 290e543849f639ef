"""Fixtures of the tests that kill: see tests/warm.py."""

import os
import subprocess
import sys

import pytest
from warm import SERVER, Child


@pytest.fixture(scope="session")
def warm_server():
    # Its children end without saving what coverage counts, and W&B's service of another test may be gone.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COV", "WANDB_SERVICE", "_WANDB"))}
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=kept,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    yield server
    server.stdin.close()
    server.wait(60)
    server.stdout.close()


@pytest.fixture
def warm(warm_server, tmp_path):
    """Starts `boltlab <arguments>`: a Child."""

    def start(*arguments, before="", folder=tmp_path, **environment):
        return Child(warm_server, arguments, folder, before, environment)

    return start
