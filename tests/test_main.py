import subprocess
import sys
from pathlib import Path

import pytest

import boltlab as package
from boltlab.__main__ import VERBS


def test_help_lists_every_verb_with_an_example(boltlab):
    code, out, _ = boltlab("--help")
    assert code == 0
    for verb, (line, example) in VERBS.items():
        assert line in out and example in out and example.startswith(f"boltlab {verb} ")
    assert boltlab()[0] == 2


def test_help_of_a_verb_shows_groups_choices_and_keys(boltlab):
    code, out, _ = boltlab("train", "--help")
    assert code == 0
    for text in ("resnet18", "cifar10", "mnist_mlp", "adamw", "cosine", "wandb", "monitor=", "seed=0"):
        assert text in out
    assert "_classifier" not in out


def test_version(boltlab):
    assert boltlab("--version")[1] == f"boltlab {package.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trian",), "boltlab: there is no verb 'trian': did you mean 'train'? verbs: train, eval, "),
        (("train", "--fast"), "boltlab train: there is no option '--fast'; overrides are key=value"),
        (("eval", "-m", "run=latest"), "only boltlab train takes it"),
    ],
)
def test_a_wrong_verb_or_option_ends_with_2(boltlab, arguments, message):
    code, _, err = boltlab(*arguments)
    assert code == 2 and message in err


def test_cfg_prints_the_composed_config(boltlab_process):
    done = boltlab_process("train", "--cfg", "job", "seed=7", "model=mlp")
    assert done.returncode == 0 and "seed: 7" in done.stdout and "boltlab.models.mlp.MLP" in done.stdout


def test_the_console_script_is_the_same_command():
    script = Path(sys.executable).with_name("boltlab")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == f"boltlab {package.__version__}\n"
