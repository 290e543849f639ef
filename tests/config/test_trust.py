"""A run folder or a checkpoint that was sent by somebody else runs nothing and imports nothing of its choice."""

import itertools
import json
import os
import pickle
import shutil
import sys
import textwrap
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import yaml
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from omegaconf import OmegaConf
from PIL import Image

import boltlab as package
from boltlab import runs
from boltlab.checkpoints import file as checkpoint_file
from boltlab.config import places
from boltlab.config.compose import compose
from boltlab.config.roots import ROOTS
from boltlab.config.sources import CONFIG_DIR, config_dirs, groups
from boltlab.config.trust import UntrustedConfig, paths_inside, refuse_untrusted
from boltlab.ground.errors import UserError
from boltlab.runs import checkpoints
from boltlab.training.load import restore

# What touches the file `canary` where it is run or imported; `evil` is a module and a folder for torch.hub.
TOUCH = "__import__('pathlib').Path('canary').touch()"
PICKLE = {"f": "evil.pt", "weights_only": False}
FORBIDDEN = [
    {"_target_": "os.system", "_args_": ["touch canary"]},
    {"_target_": "posix.system", "_args_": ["touch canary"]},
    {"_target_": "os.execv", "_args_": ["/bin/touch", ["touch", "canary"]]},
    {"_target_": "os.unlink", "_args_": ["kept"]},
    {"_target_": "shutil.rmtree", "_args_": ["."]},
    {"_target_": "subprocess.run", "_args_": [["touch", "canary"]]},
    {"_target_": "subprocess.Popen", "_args_": [["touch", "canary"]]},
    {"_target_": "builtins.eval", "_args_": [TOUCH]},
    {"_target_": "builtins.exec", "_args_": [TOUCH]},
    {"_target_": "builtins.open", "_args_": ["canary", "w"]},
    {"_target_": "builtins.__import__", "_args_": ["evil"]},
    {"_target_": "builtins.getattr", "_args_": ["x", "y"]},
    {"_target_": "code.InteractiveInterpreter.runsource", "_args_": [None, TOUCH]},
    {"_target_": "timeit.timeit", "_args_": [TOUCH]},
    {"_target_": "runpy.run_path", "_args_": ["evil/hubconf.py"]},
    {"_target_": "importlib.import_module", "_args_": ["evil"]},
    {"_target_": "pickle.loads", "_args_": [b"cevil\nx\n."]},
    {"_target_": "pathlib.Path.touch", "_args_": [{"_target_": "pathlib.Path", "_args_": ["canary"]}]},
    {"_target_": "functools.partial", "_args_": [{"_target_": "os.system", "_partial_": True}, "touch canary"]},
    {"_target_": "hydra.utils.get_method", "path": "os.system"},
    {"_target_": "hydra.utils.get_class", "path": "evil.Net"},
    {"_target_": "hydra.utils.get_object", "path": "evil.Net"},
    {"_target_": "hydra.utils.instantiate", "config": {"_target_": "evil.Net"}, "_recursive_": False},
    {"_target_": "hydra.utils.call", "config": {"_target_": "evil.Net"}, "_recursive_": False},
    {"_target_": "hydra._internal.utils._locate", "path": "evil.Net"},
    {"_target_": "omegaconf.OmegaConf.load", "_args_": ["x"]},
    {"_target_": "yaml.unsafe_load", "_args_": ["!!python/object/apply:os.system [touch canary]"]},
    {"_target_": "numpy.load", "file": "evil.pt", "allow_pickle": True},
    {"_target_": "evil.Net"},
    {"_target_": "evil"},
    {"_target_": "torch.hub.load", "repo_or_dir": "evil", "model": "net", "source": "local", "trust_repo": True},
    {"_target_": "torch.hub._load_local", "_args_": ["evil", "net"]},
    {"_target_": "torch.hub.load_state_dict_from_url", "url": "file:evil.pt", "weights_only": False},
    {"_target_": "torch.load", **PICKLE},
    {"_target_": "torch.serialization.load", **PICKLE},
    {"_target_": "torch.jit.load", "_args_": ["evil.pt"]},
    {"_target_": "torch.jit.CompilationUnit", "_args_": [TOUCH]},
    {"_target_": "torch.package.PackageImporter", "_args_": ["evil.pt"]},
    {"_target_": "torch.ops.load_library", "_args_": ["evil.so"]},
    {"_target_": "torch.classes.load_library", "_args_": ["evil.so"]},
    {"_target_": "torch.compile", "model": {"_target_": "torch.nn.Identity"}, "backend": "evil"},
    {"_target_": "torch.utils.cpp_extension.load", "name": "evil", "sources": ["evil.cpp"]},
    {"_target_": "torch.utils.cpp_extension.load_inline", "name": "evil", "cpp_sources": [""]},
    {"_target_": "torch.utils.data.DataLoader", "dataset": [1]},
    {"_target_": "torch.distributed.run.main", "_args_": [["evil/hubconf.py"]]},
    {"_target_": "torch.distributed.nn.RemoteModule", "remote_device": "cpu", "module_cls": "evil.Net"},
    {"_target_": "torch.fx.GraphModule", "root": {}, "graph": TOUCH},
    {"_target_": "torch.Tensor"},
    # Names that begin in a package that is trusted.
    {"_target_": "torch.nn.modules.module.torch.hub.load", "repo_or_dir": "evil", "model": "net", "source": "local"},
    {"_target_": "torch.nn.modules.module.torch.nn.Linear", "_args_": [1, 1]},
    {"_target_": "torch.nn.Module.__init__.__globals__.get", "_args_": ["torch"]},
    {"_target_": "torch.nn.Module.__subclasses__"},
    {"_target_": "torch.nn.Module.load_state_dict", "_args_": [None, {}]},
    {"_target_": "torch.nn.init.ones_", "_args_": [1]},
    {"_target_": "torch.nn.Linear "},
    {"_target_": "torch.nn..Linear"},
    {"_target_": ".torch.nn.Linear"},
    {"_target_": "torch.nn.NoSuchNet"},
    {"_target_": "torch.nn_evil.Net"},
    {"_target_": "boltlab.runs.provenance.subprocess.run", "_args_": [["touch", "canary"]]},
    {"_target_": "boltlab.runs.provenance.os.system", "_args_": ["touch canary"]},
    {"_target_": "boltlab.runs.provenance.Path", "_args_": ["x"]},
    {"_target_": "boltlab.runs.write_summary", "folder": "."},
    {"_target_": "boltlab.config.locate.locate", "name": "evil.Net"},
    {"_target_": "boltlab.config.build.build", "config": {"x": {"_target_": "evil.Net"}}, "key": "x"},
    {"_target_": "boltlab.load", "run": "evil"},
    {"_target_": "boltlab.commands.train.main", "overrides": []},
    {"_target_": "boltlab.checkpoints.io.SafeCheckpointIO", "config": {}},
    {"_target_": "boltlab.checkpoints.file.hashlib.sha256"},
    {"_target_": "lightning.pytorch.LightningModule.load_from_checkpoint", "checkpoint_path": "evil.pt"},
    {"_target_": "lightning.pytorch.cli.LightningCLI"},
    {"_target_": "lightning.pytorch.cli.SaveConfigCallback"},
    {"_target_": "lightning.pytorch.demos.mnist_datamodule.MNISTDataModule"},
    {"_target_": "lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict"},
    {"_target_": "lightning.fabric.cli._run"},
    {"_target_": "lightning.fabric.plugins.TorchCheckpointIO"},
    {"_target_": "torchvision.io.read_file", "path": "/etc/passwd"},
    {"_target_": "torchvision.datasets.FakeData"},
    {"_target_": "torchvision.models.get_model", "name": "resnet18"},
    {"_target_": "torchvision.models.feature_extraction.DualGraphModule", "_args_": [{}, TOUCH, TOUCH]},
    {"_target_": "torchvision.models.resnet.load_state_dict_from_url", "_args_": ["x"]},
    {"_target_": "torchvision.models.quantization.mobilenetv2.QuantStub"},  # torch.ao's
    {"_target_": "torchmetrics.functional.image.lpips._LPIPS", "model_path": "evil.pt"},
    {"_target_": "torchmetrics.functional.accuracy"},
    {"_target_": "torchmetrics.multimodal.CLIPScore", "model_name_or_path": "evil/jinaai"},
    {"_target_": "timm.models.load_checkpoint", "checkpoint_path": "evil.pt"},
    {"_target_": "timm.models.load_custom_from_hf"},
    {"_target_": "timm.create_model", "model_name": "resnet18", "checkpoint_path": "evil.pt"},
    {"_target_": "timm.create_model", "model_name": "resnet18", "pretrained_cfg": {"file": "evil.pt"}},
    {"_target_": "timm.create_model", "model_name": "resnet18", "pretrained_cfg_overlay": {"url": "file:evil.pt"}},
    {"_target_": "timm.create_model", "model_name": "hf-hub:evil/net"},
    {"_target_": "timm.create_model", "_args_": ["local-dir:evil"]},
    # No names at all.
    {"_target_": "${oc.env:TARGET}"},
    {"_target_": "${run_dir}"},
    {"_target_": "os.${x}"},
    {"_target_": None},
    {"_target_": ["os", "system"]},
    {"_target_": {"_target_": "os.system"}},
    {"_target_": 3},
    {"_target_": ""},
]
COMPUTED = ["${oc.env:HOME}", "a ${oc.decode:'1'}", "${oc.create:{a: 1}}", "${x}", "$${run_dir}{oc.env:HOME}", r"\${x}"]
INSIDE = {"_target_": "project.models.classifier.Classifier", "num_classes": 2}
HARMLESS = {"_target_": "torch.nn.Identity"}


@pytest.fixture(autouse=True)
def evil(tmp_path, monkeypatch):
    """What an attack would need to come true; nothing may have run at the end."""
    Path("kept").touch()
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / "hubconf.py").write_text(f"{TOUCH}\ndef net(): pass\n")
    (tmp_path / "evil.py").write_text(f"{TOUCH}\nclass Net: pass\n")
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Malicious()))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TARGET", "os.system")
    yield
    assert Path("kept").exists()
    sys.modules.pop("evil", None)


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("canary"),))


def nothing_ran():
    return not Path("canary").exists() and "evil" not in sys.modules


@pytest.mark.parametrize("node", FORBIDDEN, ids=lambda node: str(node["_target_"]))
def test_a_target_is_refused_wherever_it_stands(node):
    forms = {
        "data": node,
        "callbacks.best": {**node, "_partial_": True},
        "model.net.layers.0.1": node,
        "model.net._args_.0": node,
        "trainer.profiler.deep": {**node, "_convert_": "all", "_recursive_": False},
    }
    config: dict = {"data": forms["data"], "callbacks": {"best": forms["callbacks.best"]}}
    config["model"] = {**INSIDE, "net": {**HARMLESS, "layers": [(1, node)], "_args_": [node]}}
    config["trainer"] = {"_target_": "lightning.Trainer", "profiler": {"deep": forms["trainer.profiler.deep"]}}
    with pytest.raises(UntrustedConfig, match="nothing of it was run") as error:
        refuse_untrusted(config, "x")
    for path in forms:
        assert f"  {path}._target_=" in str(error.value) or f"  {path}." in str(error.value)
    with pytest.raises(UntrustedConfig):  # as a checkpoint's model it is no better
        restore({"config": {"model": {**INSIDE, "net": node}}, "state_dict": {}})
    with pytest.raises(UntrustedConfig):
        restore({"config": {"model": {**INSIDE, "net": (HARMLESS, node)}}, "state_dict": {}})
    assert nothing_ran()


@pytest.mark.parametrize("target", ["evil.Net", "pathlib.Path.touch", "torch.hub.load", "hydra.utils.get_class"])
def test_the_attacks_are_real(target):
    (node,) = [node for node in FORBIDDEN if node["_target_"] == target]
    instantiate(node)
    assert not nothing_ran()


@pytest.mark.parametrize("value", COMPUTED)
def test_a_computed_value_is_refused_by_name(value):
    for config in ({"data": {"root": [value]}}, OmegaConf.create({"data": {"root": [value]}})):
        with pytest.raises(UntrustedConfig, match=r"data\.root\.0=.*\n.*interpolation"):
            refuse_untrusted(config, "x")
    refuse_untrusted({"data": {"root": "${run_dir}/images", "price": "$5 {x}", "rest": [1, 1.5, None, True]}}, "x")


def test_what_is_no_plain_value_is_refused():
    with pytest.raises(UntrustedConfig, match="a PosixPath"):
        refuse_untrusted({"x": Path("x")}, "x")


def test_one_message_lists_all_and_says_how_to_trust():
    config = {"model": {"net": {"_target_": "mypackage.Net"}}, "data": {"_target_": "os.system"}}
    with pytest.raises(UntrustedConfig) as error:
        refuse_untrusted(config, "there/config.yaml")
    text = str(error.value)
    assert text.startswith("there/config.yaml asks for what is not trusted")
    assert "model.net._target_=mypackage.Net" in text and "data._target_=os.system" in text
    assert "trusted=[package]" in text and "[tool.boltlab]" in text


def test_a_checkpoint_builds_parts_of_models_only():
    for target in ("lightning.pytorch.callbacks.ModelCheckpoint", "lightning.Trainer", "boltlab.data.tabular.CSV"):
        refuse_untrusted({"x": {"_target_": target}}, "x")
        with pytest.raises(UntrustedConfig, match=r"model\.net\._target_=.*\n.*of no kind"):
            restore({"config": {"model": {**INSIDE, "net": {"_target_": target}}}, "state_dict": {}})


# ---------------------------------------------------------------- what must pass


def shipped_targets():
    groups_of_sweep = ("sweep", "sampler", "pruner")  # which are in no run's config
    files = sorted(path for folder in config_dirs() for path in folder.rglob("*.yaml"))
    texts = [path.read_text() for path in files if path.parent.name not in groups_of_sweep]
    return sorted(
        {
            line.split("_target_:")[1].split("#")[0].strip(" {},")
            for text in texts
            for line in text.splitlines()
            if "_target_:" in line and not line.lstrip().startswith("#")
        }
    )


def test_everything_shipped_is_trusted():
    targets = shipped_targets()
    assert len(targets) > 40
    for target in targets:
        if ".launchers." not in target:
            refuse_untrusted({"x": {"_target_": target}}, "x")


@pytest.mark.parametrize("name", groups()["launcher"])
def test_a_launcher_is_asked_for_on_the_command_line_only(name):
    """Its keys hold shell lines; no config of a run names one."""
    launcher = OmegaConf.load(CONFIG_DIR / "launcher" / f"{name}.yaml")
    with pytest.raises(UntrustedConfig, match="is of no kind that may be built here"):
        refuse_untrusted({"launcher": {"_target_": launcher._target_}}, "x")


def test_every_choice_and_recipe_composes_to_a_trusted_config(monkeypatch):
    monkeypatch.setattr(places, "FOLDERS", ("x",))
    known = {group: choices for group, choices in groups().items() if group in ROOTS["train"]}
    given = []
    for number in range(max(map(len, known.values()))):  # the n-th choice of every group at once
        nth = {group: choices[number % len(choices)] for group, choices in known.items()}
        given.append([f"{g}=[{c}]" if g in ("callbacks", "logger") else f"{g}={c}" for g, c in nth.items()])
    given += [[f"{overlay}={choice}"] for overlay in ("experiment", "debug") for choice in groups()[overlay]]
    for overrides in given:
        config = compose("train", overrides, check=False).config
        config.run_dir = "x"
        del config["launcher"]  # as the command does, before it makes a run
        if "augment" not in config.data:
            config.augment = None  # as the check does
        for key in ("num_classes", "input_shape"):  # which some choices here do not have for others
            config.data.setdefault(key, "auto")
        refuse_untrusted(OmegaConf.to_container(config, resolve=True), "x")


@pytest.mark.parametrize(
    "target",
    [
        "torch.nn.Linear",
        "torch.nn.modules.linear.Linear",
        "torch.optim.AdamW",
        "torch.optim.lr_scheduler.ReduceLROnPlateau",
        "torch.optim.lr_scheduler.StepLR",
        "torchmetrics.Accuracy",
        "torchmetrics.classification.MulticlassF1Score",
        "torchmetrics.MetricCollection",
        "lightning.pytorch.callbacks.EarlyStopping",
        "lightning.pytorch.loggers.TensorBoardLogger",
        "lightning.pytorch.strategies.FSDPStrategy",
        "lightning.pytorch.profilers.PyTorchProfiler",
        "lightning.Trainer",
        "torchvision.transforms.Compose",
        "torchvision.transforms.ToTensor",
        "torchvision.transforms.v2.Resize",
        "torchvision.ops.SqueezeExcitation",
        "torchvision.models.resnet18",
        "torchvision.models.resnet.resnet18",
        "torchvision.models.googlenet",
        "torchvision.models.detection.ssd300_vgg16",
        "torchvision.models.ResNet",
        "timm.create_model",
        "boltlab.optim.schedulers.Schedule",
        "project.models.cnn.CNN",
        "datetime.timedelta",
    ],
)
def test_the_kinds_of_the_libraries_are_trusted(target):
    refuse_untrusted({"x": {"_target_": target}}, "x")


# ---------------------------------------------------------------- the commands

QUICK = (
    "trainer.max_epochs=1", "logger=csv", "callbacks=best", "data.batch_size=512", "trainer.accelerator=cpu",
    "test=false", "model=linear",
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from boltlab.__main__ import main

    here = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("trained"))
    try:
        assert main(["train", *QUICK]) == 0
        return next(runs.folders("logs")).resolve()
    finally:
        os.chdir(here)


@pytest.fixture
def sent(trained, tmp_path):
    """A copy of a run, as if somebody had sent it, and an image."""
    Image.new("L", (8, 8)).save("image.png")
    return Path(shutil.copytree(trained, tmp_path / "sent"))


def tamper(folder, *path, value):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    node = config
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def commands(folder):
    return (("eval", f"run={folder}"), ("predict", f"run={folder}", "input=image.png"))


@pytest.mark.slow
def test_a_run_that_was_sent_can_be_used(boltlab, sent):
    for command in commands(sent):
        code, _, err = boltlab(*command)
        assert code == 0, err


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("data", "_target_"), "evil.Net"),
        (("data", "augment"), {"_target_": "os.system", "_args_": ["touch canary"]}),
        (("model", "net"), {"_target_": "torch.hub.load", "repo_or_dir": "evil", "model": "net", "source": "local"}),
        (("trainer", "profiler"), {"_target_": "hydra.utils.get_class", "path": "evil.Net"}),
        (("callbacks", "x"), {"_target_": "builtins.exec", "_args_": [TOUCH]}),
        (("data", "split_seed"), "${oc.env:TARGET}"),
    ],
)
def test_a_tampered_config_is_refused_by_every_command(path, value, boltlab, sent):
    tamper(sent, *path, value=value)
    for command in commands(sent):
        code, out, err = boltlab(*command)
        assert code == 1 and ".".join(path) in err and "not trusted" in err and not out
    assert nothing_ran()


@pytest.mark.parametrize("node", [{"_target_": "evil.Net"}, ({"_target_": "os.system", "_args_": ["touch canary"]},)])
def test_a_tampered_checkpoint_is_refused_by_every_command(node, boltlab, sent):
    path = checkpoints.find(sent)
    content = checkpoint_file.read(path)
    content["config"]["model"]["net"]["more"] = node
    checkpoint_file.write(content, path)
    for command in commands(sent):
        code, _, err = boltlab(*command)
        assert code == 1 and "model.net.more" in err
    for run in (sent, path):
        with pytest.raises(UntrustedConfig, match=r"model\.net\.more"):
            package.load(run)
    assert nothing_ran()


def test_a_checkpoint_without_its_config_is_refused(boltlab, sent):
    path = checkpoints.find(sent)
    content = checkpoint_file.read(path)
    for config in (None, {}, {"model": "evil.Net"}, {"model": [HARMLESS]}):
        checkpoint_file.write({**content, "config": config}, path)
        for command in commands(sent):
            code, _, err = boltlab(*command)
            assert code == 1 and "config" in err


@pytest.mark.parametrize(
    "text",
    ["!!python/object/apply:os.system ['touch canary']", "a: !!python/name:evil.Net", "a: [", "- 1", "a: ${", "["],
)
def test_a_config_that_is_no_plain_yaml_is_one_line(text, boltlab, sent):
    (sent / "config.yaml").write_text(text)
    for command in commands(sent):
        code, _, err = boltlab(*command)
        assert code == 1 and "config.yaml" in err and len(err.strip().splitlines()) == 1
    assert nothing_ran()


@pytest.mark.slow
def test_nothing_else_of_a_folder_is_run(boltlab, sent):
    attack = "!!python/object/apply:os.system ['touch canary']"
    for name in ("overrides.yaml", "summary.json", "classes.json", "environment.json", "metrics.csv", "git.patch"):
        (sent / name).write_text(attack)
    (sent / "hubconf.py").write_text(TOUCH)
    for command in commands(sent):
        code, _, err = boltlab(*command)
        assert code == 0, err
    (sent / "summary.json").write_text(json.dumps({"evaluated": "../..", "status": attack, "name": "../../x"}))
    assert boltlab("eval", f"run={sent}")[0] == 0
    assert not [path for path in Path("logs").rglob("*") if path.is_dir() and path.name == "x"]
    assert nothing_ran()


def test_own_packages_train_and_are_trusted_where_the_command_names_them(boltlab, tmp_path):
    (tmp_path / "own_nets.py").write_text(
        textwrap.dedent("""
        from torch import nn

        class Net(nn.Sequential):
            def __init__(self, **arguments):
                super().__init__(nn.Flatten(), nn.Linear(784, 10))
        """)
    )
    assert "own_nets" not in sys.modules
    code, _, err = boltlab("train", *QUICK, "model.net._target_=own_nets.Net")
    assert code == 0, err
    code, _, err = boltlab("eval", "run=latest")
    assert code == 1 and "own_nets" in err and "trusted=[package]" in err
    code, _, err = boltlab("eval", "run=latest", "trusted=[own_nets]")
    assert code == 0, err
    assert boltlab("eval", "run=latest")[0] == 1  # it held for that command only


# ---------------------------------------------------------------- paths in a checkpoint


def fit_two_steps(folder, state):
    saving = ModelCheckpoint(dirpath=folder / "checkpoints", filename="last{step}")
    saving.load_state_dict(state)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(max_steps=2, limit_train_batches=2, limit_val_batches=0, callbacks=[saving], **quiet)
    trainer.fit(BoringModel())


@pytest.mark.filterwarnings("ignore")  # Lightning's own
@pytest.mark.parametrize("path", ["{here}/run/checkpoints/../../victim", "local://{here}/victim"])
def test_a_checkpoint_removes_nothing_outside_its_folder(path, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (tmp_path / "victim" / "deep").mkdir(parents=True)
    state = {"best_model_score": None, "best_model_path": path.format(here=tmp_path)}
    state["dirpath"] = str(folder / "checkpoints")
    fit_two_steps(folder, paths_inside(folder, {"ModelCheckpoint": state})["ModelCheckpoint"])
    assert (tmp_path / "victim" / "deep").exists()
    fit_two_steps(folder, state)  # without it, Lightning does
    assert not (tmp_path / "victim").exists()


def test_a_moved_run_keeps_its_best_values(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    there = str(old / "checkpoints")
    score = torch.tensor(0.5)
    state = {
        "dirpath": there, "best_model_path": f"{there}/a.ckpt", "kth_best_model_path": f"{there}/b.ckpt",
        "last_model_path": f"{there}/last.ckpt", "best_k_models": {f"{there}/a.ckpt": score, f"{there}/b.ckpt": score},
        "best_model_score": score, "kth_value": score, "current_score": score, "monitor": "x",
    }  # fmt: skip
    other = {"wait_count": 3, "dirpath": "elsewhere"}
    moved = paths_inside(new, {"A": state, "B": other})
    assert moved["B"] == other
    here = new / "checkpoints"
    assert list(moved["A"]["best_k_models"]) == [str(here / "a.ckpt"), str(here / "b.ckpt")]
    saving = ModelCheckpoint(dirpath=here, monitor="x", save_top_k=2)
    saving.load_state_dict(moved["A"])  # warns, which is an error here, where the folder is another
    assert saving.best_model_score == 0.5 and saving.last_model_path == str(here / "last.ckpt")
    assert state["dirpath"] == there  # the original is as it was


@pytest.mark.parametrize(
    "path", ["..", ".", "", "/", "../../etc/passwd", "a.ckpt/..", "x::local.ckpt", r"C:\a\..", None, 3, ["a.ckpt"]]
)
def test_a_path_that_is_no_checkpoint_is_dropped(path, tmp_path):
    state = {"best_model_path": path, "last_model_path": path, "best_k_models": {str(path): 1}, "dirpath": "/"}
    moved = paths_inside(tmp_path, {"A": state})["A"]
    assert moved["best_model_path"] == moved["last_model_path"] == "" and moved["best_k_models"] == {}
    assert moved["dirpath"] == str((tmp_path / "checkpoints").resolve())


def test_a_list_is_no_config(tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        runs.load_config(tmp_path)


LIGHTNING = {"_target_": "lightning.pytorch.loggers.TensorBoardLogger"}
ELSEWHERE = {
    "callbacks.x": {"_target_": "lightning.pytorch.callbacks.OnExceptionCheckpoint", "dirpath": "/elsewhere"},
    "callbacks.y": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "dirpath": "${run_dir}/../../elsewhere"},
    "callbacks.z": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "filename": "../../../elsewhere"},
    "logger.x": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "elsewhere"},
    "trainer.profiler": {"_target_": "lightning.pytorch.profilers.AdvancedProfiler", "dirpath": "/elsewhere"},
    "trainer": {"_target_": "lightning.pytorch.Trainer", "default_root_dir": "${run_dir}x"},
    "callbacks.position": {"_target_": "lightning.pytorch.callbacks.ModelCheckpoint", "_args_": ["elsewhere"]},
    "callbacks.second": {"_target_": "boltlab.callbacks.Last", "_args_": [["${run_dir}"], "/elsewhere"]},
    "logger.name": {**LIGHTNING, "save_dir": "${run_dir}", "name": "../../elsewhere"},
    "logger.version": {**LIGHTNING, "save_dir": "${run_dir}", "version": "/elsewhere"},
    "logger.prefix": {**LIGHTNING, "save_dir": "${run_dir}", "sub_dir": "a/../../.."},
    "logger.home": {**LIGHTNING, "save_dir": "${run_dir}", "name": "~/elsewhere"},
    "logger.mlflow": {"_target_": "boltlab.loggers.mlflow.MLFlowLogger", "database": "sqlite:////elsewhere.db"},
    "logger.relative": {"_target_": "boltlab.loggers.mlflow.MLFlowLogger", "database": "sqlite:///elsewhere.db"},
    "logger.file": {"_target_": "boltlab.loggers.mlflow.MLFlowLogger", "tracking_uri": "file:///elsewhere"},
    "logger.store": {"_target_": "boltlab.loggers.mlflow.MLFlowLogger", "tracking_uri": "elsewhere"},
    "logger.artifacts": {"_target_": "boltlab.loggers.mlflow.MLFlowLogger", "artifact_dir": "/elsewhere"},
    "data": {"_target_": "boltlab.data.image_folder.ImageFolder", "cache": "disk", "cache_dir": "/"},
    "data.": {"_target_": "project.data.torchvision_images.TorchvisionImages", "data_dir": "/elsewhere"},
}


@pytest.mark.parametrize("place", ELSEWHERE)
def test_a_config_from_outside_writes_in_its_own_folder_only(place):
    config = ELSEWHERE[place]
    for part in reversed(place.rstrip(".").split(".")):
        config = {part: config}
    with pytest.raises(UserError, match=r"outside of the run's folder"):
        refuse_untrusted(config, "x")
    refuse_untrusted(config, "x", given=[*config])  # what the command line says again is its own affair


def test_what_the_runs_of_a_log_folder_share_is_no_place_outside(tmp_path):
    logger = {"_target_": "boltlab.loggers.mlflow.MLFlowLogger", "tracking_uri": "http://there/x", "dir": "${run_dir}"}
    for logs, ok in (("logs", True), (str(tmp_path), True), (str(tmp_path / "train"), False), ("/", False)):
        config = {"log_dir": logs, "logger": {"mlflow": {**logger, "database": f"sqlite:///{logs}/mlflow.db"}}}
        config["logger"]["mlflow"]["artifact_dir"] = f"{logs}/mlflow"
        config["data"] = {"cache": "disk", "cache_dir": "data/cache", "data_dir": str(tmp_path)}
        if ok:
            refuse_untrusted(config, tmp_path / "train" / "run" / "config.yaml")
            continue
        with pytest.raises(UserError, match=r"logger\.mlflow\.database.*\n.*outside(.*\n)+.*artifact_dir"):
            refuse_untrusted(config, tmp_path / "train" / "run" / "config.yaml")


def test_a_config_that_refers_to_itself_is_refused_before_it_grows(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in itertools.pairwise("abcdefgh")]
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    with pytest.raises(UserError, match="refers to its own parts"):
        runs.load_config(tmp_path)
