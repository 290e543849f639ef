"""What the README shows is run as written."""

import importlib
import re
import shlex
import sys
import types
from pathlib import Path

import pytest

import boltlab as package
from boltlab import runs
from boltlab.config import sources
from boltlab.config.compose import compose

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def table_commands():
    rows = re.findall(r"^\| `(\w+)(?: -m)?` \|.*\| `(boltlab [^`]+)` \|$", README, re.MULTILINE)
    return {verb + (" -m" if " -m " in command else ""): command for verb, command in rows}


QUICK = ["trainer.max_epochs=1", "logger=csv", "model=linear"]


def test_every_verb_stands_in_the_table():
    from boltlab.__main__ import VERBS

    assert {command.split()[1] for command in table_commands().values()} == set(VERBS)


@pytest.mark.slow
def test_the_commands_of_the_table_run(boltlab, tmp_path):
    import torch
    from PIL import Image

    assert boltlab("train", *QUICK)[0] == 0
    (tmp_path / "photos").mkdir()
    Image.fromarray(torch.randint(0, 255, (28, 28), dtype=torch.uint8).numpy()).save("photos/a.jpg")
    commands = table_commands()
    for verb in ("eval", "predict", "show", "runs", "report", "doctor"):
        code, out, err = boltlab(*shlex.split(commands[verb])[1:])
        # doctor's verdict depends on the machine that runs the test
        assert code == 0 or verb == "doctor", (verb, err)
        assert out
    assert all(Path(name).is_file() for name in ("classes.csv", "show.png", "report.html"))
    code, _, err = boltlab(*shlex.split(commands["train -m"])[1:], *QUICK, "test=false")
    assert code == 0, err
    assert len(list(runs.folders("logs"))) == 7


def test_the_train_command_of_the_table_composes():
    composed = compose("train", shlex.split(table_commands()["train"])[2:])
    assert composed.choices["model"] == "resnet18" and composed.config.optimizer.lr == 0.1


@pytest.mark.slow
def test_the_example_of_mistakes_is_what_is_printed(boltlab):
    (shown,) = [block for block in blocks("text") if block.startswith("$ boltlab train")]
    command, *expected = shown.splitlines()
    code, _, err = boltlab(*shlex.split(command)[2:])
    assert code == 2
    for line, printed in zip(expected, err.splitlines(), strict=True):
        assert printed.startswith(line.removesuffix("…")), (line, printed)


def test_the_groups_and_choices_of_the_table_are_those_that_exist():
    (section,) = re.findall(r"^## Configs\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)
    shown = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE))
    for group, choices in sources.groups().items():
        if group == "local":
            continue
        assert group in shown, group
        if group == "experiment":
            continue
        for choice in choices:
            if (group, choice) == ("callbacks", "eval"):
                continue  # boltlab eval's own
            assert re.search(rf"\b{choice}\b", shown[group]), (group, choice)


def test_every_experiment_stands_in_the_results():
    for experiment in sources.groups()["experiment"]:
        assert f"`{experiment}`" in README, experiment


@pytest.fixture
def added(monkeypatch, configs):
    """The README's data set and model, added as it says, in a copy of the configs."""
    pythons, yamls = blocks("python"), blocks("yaml")
    for kind, name in (("data", "wine"), ("models", "residual_mlp")):
        dotted = f"project.{kind}.{name}"
        (source,) = [block for block in pythons if f"class {name.title().replace('_Mlp', 'MLP')}" in block]
        module = types.ModuleType(dotted)
        monkeypatch.setitem(sys.modules, dotted, module)
        exec(compile(source, f"{name}.py", "exec"), module.__dict__)  # what a reader would save as a file
        monkeypatch.setattr(importlib.import_module(f"project.{kind}"), name, module, raising=False)
        (text,) = [block for block in yamls if dotted in block]
        (configs / kind.removesuffix("s") / f"{name}.yaml").write_text(text)
    return package


def test_the_data_set_that_the_readme_adds(boltlab, added):
    code, _, err = boltlab("train", "data=wine", "model=mlp", "logger=csv", "optimizer.lr=0.01")
    assert code == 0, err
    assert runs.read_summary(next(runs.folders("logs")))["test"]["test_acc"] > 0.9


def test_the_model_that_the_readme_adds(boltlab, added):
    code, _, err = boltlab("train", "model=residual_mlp", "logger=csv", "trainer.max_epochs=2")
    assert code == 0, err
    assert package.load()(package.load().net.stem.weight.new_zeros(1, 1, 28, 28)).shape == (1, 10)


def test_every_check_of_the_docs_is_in_the_source_and_has_its_test():
    root = Path(__file__).resolve().parents[1]
    text = (root / "docs" / "checks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|*]+ \| `([^|]+)` \| `(\S+)::(\w+)` \|$", text, re.MULTILINE)
    assert len(rows) == text.count("::") > 30
    source = "\n".join(path.read_text(encoding="utf-8") for path in (root / "src").rglob("*.py"))
    for words, file, name in rows:
        tests = (root / file).read_text(encoding="utf-8")
        assert f"def {name}(" in tests, f"{file} has no {name}"
        assert words in source or words in tests, f"nothing says {words!r}"
