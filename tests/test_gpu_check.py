"""scripts/gpu_check.py writes the outcome of each check, whatever a check does."""

import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check.py"


@pytest.fixture
def script(monkeypatch, tmp_path):
    for name in ("PYTORCH_NVML_BASED_CUDA_CHECK", "WANDB_MODE"):  # which the script sets
        monkeypatch.setenv(name, os.environ.get(name, ""))
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("OUT", str(tmp_path))
    return module


def raises(tiny):
    print("before it fails")
    assert tiny == 3, "three is asked for"


def hangs(tiny):
    os.system("sleep 600 &")
    time.sleep(600)


def dies(tiny):
    os._exit(9)


def measures(tiny):
    return {"tiny": tiny, "images/s": 12}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_each_outcome_is_written_and_the_next_check_runs(script, monkeypatch, tmp_path, capsys):
    checks = {"machine": (20, lambda tiny: {"device": script.NO_GPU}), "raises": (20, raises)}
    checks |= {"hangs": (0.1, hangs), "dies": (20, dies), "measures": (20, measures)}
    monkeypatch.setattr(script, "CHECKS", checks)
    monkeypatch.setattr(sys, "argv", ["gpu_check", *checks])
    assert script.main() == 1
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    outcomes = {name: one["outcome"] for name, one in found.items()}
    assert outcomes == {
        "machine": "passed",
        "raises": "failed",
        "hangs": "timed out",
        "dies": "died",
        "measures": "passed",
    }
    assert "three is asked for" in found["raises"]["reason"] and "before it fails" in found["raises"]["output"]
    assert found["dies"]["exit_code"] == 9
    assert found["measures"]["tiny"] and found["measures"]["figures"] == {"tiny": True, "images/s": 12}  # no GPU
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "gpu_check.json")


def test_an_unknown_check_is_named_with_those_that_there_are(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "resnets"])
    with pytest.raises(SystemExit) as left:
        script.main()
    assert left.value.code == 2 and "there is no check resnets; checks: machine, generator" in capsys.readouterr().err
