import os
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
        assert line in out and f"boltlab {verb} {example}\n" in out
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
        (("trian",), "boltlab: there is no verb 'trian': did you mean 'train'? verbs: train, sweep, eval, "),
        (("train", "--fast"), "boltlab train: there is no option '--fast'; overrides are key=value"),
        (("eval", "-m", "run=latest"), "only boltlab train takes it"),
    ],
)
def test_a_wrong_verb_or_option_ends_with_2(boltlab, arguments, message):
    code, _, err = boltlab(*arguments)
    assert code == 2 and message in err


def test_cfg_prints_the_composed_config(boltlab_process):
    done = boltlab_process("train", "--cfg", "job", "seed=7", "model=mlp")
    assert done.returncode == 0 and "seed: 7" in done.stdout and "project.models.mlp.MLP" in done.stdout


HEAVY = ("torch", "torchvision", "torchmetrics", "lightning", "wandb", "sklearn", "scipy", "numpy", "matplotlib", "PIL")
HEAVY += ("pydantic", "rich", "pandas", "mlflow", "tensorboard", "timm")


def imported_by(code: str, **environment: str) -> set[str]:
    """The packages that a process has imported when `code` has run."""
    script = f"import sys\n{code}\nprint('imported', *sys.modules)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
    return {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()[1:]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        (("--help",), ("hydra", "omegaconf", "yaml")),
        (("--version",), ("hydra", "omegaconf", "yaml")),
        (("trian",), ("hydra", "omegaconf", "yaml")),
        (("train", "--help"), ()),
        (("train", "--cfg", "job", "model=resnet18", "optimizer.lr=0.1"), ()),
        (("train", "modle=cnn"), ()),
        (("train", "model.net.dorp=0.1"), ()),
        (("train", "-m", "optimizer.lrr=0.1,0.2"), ()),
        (("eval", "modle=cnn"), ()),
        (("runs", "limt=3"), ()),
        (("train", "--fast"), ()),
    ],
    ids=" ".join,
)
def test_what_only_answers_imports_nothing_heavy(arguments, more):
    code = f"from boltlab.__main__ import main\nmain({list(arguments)!r})"
    assert imported_by(code).isdisjoint(HEAVY + more)


@pytest.mark.parametrize("line", ["boltlab tr", "boltlab train model=", "boltlab train optimizer=adam scheduler."])
def test_completion_imports_nothing_heavy(line):
    code = "from boltlab.__main__ import main\ntry: main(['-sc', 'query=bash'])\nexcept SystemExit: pass"
    assert imported_by(code, COMP_LINE=line, COMP_POINT=str(len(line))).isdisjoint(HEAVY)


@pytest.mark.slow
def test_before_the_first_step_nothing_is_imported_that_can_wait():
    code = """
import lightning.pytorch, os, sklearn.datasets
from torch.optim.optimizer import register_optimizer_step_post_hook
before = set(sys.modules)
def end(*_):
    print("imported", *(name for name in sys.modules if name not in before), flush=True)
    os._exit(0)
register_optimizer_step_post_hook(end)
from boltlab.__main__ import main
main(["train", "trainer.accelerator=cpu"])
"""
    late = {"wandb", "pydantic", "matplotlib", "mlflow", "tensorboard", "timm", "setuptools"}
    assert imported_by(code).isdisjoint(late)


def test_the_console_script_is_the_same_command():
    script = Path(sys.executable).with_name("boltlab")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == f"boltlab {package.__version__}\n"


def test_a_command_ends_as_python_ends_but_for_taking_objects_apart():
    code = """
import atexit, os, sys, threading, time
from boltlab.processes.exits import leave
class Kept:
    def __del__(self):
        os.write(1, b"taken apart\\n")
kept = Kept()
def thread():
    time.sleep(0.2)
    os.write(1, b"thread\\n")
threading.Thread(target=thread).start()
atexit.register(lambda: (os.write(1, b"exit function\\n"), print("buffered")))
leave(7)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "thread\nexit function\nbuffered\n", "")


@pytest.mark.parametrize("stream", ["closed", "read by nobody"])
def test_a_command_ends_with_its_code_where_what_it_prints_has_no_reader(stream):
    reader, writer = os.pipe()
    os.close(reader)
    close = "sys.stdout.close()" if stream == "closed" else "print('said')"
    code = f"import sys; from boltlab.processes.exits import leave; {close}; leave(3)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=writer, stderr=-1, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (3, b"")


FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")


@pytest.mark.parametrize("where", ["| head -1", ">&-", pytest.param("> /dev/full", marks=FULL)])
def test_a_listing_ends_well_where_nobody_takes_it(tmp_path, where):
    command = f"set -o pipefail; {sys.executable} -m boltlab --help {where}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert ("stdout takes no more (No space left on device)" in done.stderr) == ("full" in where)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["| head -1", ">&-", pytest.param("> /dev/full", marks=FULL)])
def test_a_training_goes_on_where_nobody_takes_what_it_prints(tmp_path, where):
    options = "data=digits model=linear logger=csv trainer.accelerator=cpu trainer.max_epochs=1"
    command = f"set -o pipefail; {sys.executable} -m boltlab train {options} {where}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    (folder,) = Path("logs/train").iterdir()
    assert '"status": "finished"' in (folder / "summary.json").read_text()
    assert ("stdout takes no more" in done.stderr) == (where != ">&-")
