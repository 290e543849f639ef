"""`boltlab doctor`: each fault is found, comes with a cure, and only a fault that stops training fails."""

import hashlib
import sys
import time
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from omegaconf import OmegaConf

from boltlab.commands import doctor
from boltlab.training.flops import matmul

KEY = hashlib.sha1(b"no real key").hexdigest()


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))


def test_everything_here_is_reported_and_a_warning_does_not_fail(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(doctor, "check_lock", lambda: [doctor.Row("lock", "warn", "older: rich", "make install")])
    code = doctor.run(OmegaConf.create({"data": None, "log_dir": str(tmp_path / "a" / "logs")}))
    out = capsys.readouterr().out
    for name in ("python", "torch", "fp32", "bf16", "lock", "git", "wandb", "log_dir", "disk"):
        assert f" {name} " in out
    assert "make install" in out
    assert "0 failed" in out
    assert code == 0
    assert not (tmp_path / "a").exists(), "looking leaves nothing behind"


def test_a_failure_is_the_exit_code(tmp_path, capsys):
    (tmp_path / "logs").write_text("a file where the folder should be")
    assert doctor.run(OmegaConf.create({"data": None, "log_dir": str(tmp_path / "logs")})) == 1
    out = capsys.readouterr().out
    assert "is a file" in out
    assert "log_dir=/somewhere" in out
    assert "1 failed" in out


def test_every_wrong_row_has_a_cure():
    rows = [doctor.check_python(), *doctor.check_torch(), *doctor.check_precision(), doctor.check_git()]
    assert all(row.cure for row in rows if row.status != "ok")


def test_old_python_fails(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 10, 1))
    row = doctor.check_python()
    assert row.status == "fail"
    assert "3.11, 3.12 or 3.13" in row.cure


def test_precision_that_the_device_lacks_or_gets_wrong(monkeypatch):
    import torch

    def matmul(device: torch.device, dtype: torch.dtype, size: int, tf32: bool) -> tuple[float, float]:
        if dtype is torch.float16:
            raise RuntimeError("no kernel for Half\nmore lines")
        return 2.0, 0.5 if dtype is torch.bfloat16 else 0.0

    monkeypatch.setattr("boltlab.training.flops.matmul", matmul)
    rows = {row.name: row for row in doctor.check_precision()}
    assert rows["fp32"].status == "ok"
    assert rows["bf16"].status == "fail"
    assert "wrong by 50%" in rows["bf16"].detail
    assert rows["fp16"].status == "warn"
    assert rows["fp16"].detail.endswith("no kernel for Half")


def test_matmul_leaves_the_precision_setting_as_it_was():
    import torch

    before, began = torch.get_float32_matmul_precision(), time.perf_counter()
    speed, error = matmul(torch.device("cpu"), torch.bfloat16, 32, tf32=True)
    assert 2 * 32**3 / (speed * 1e12) <= (time.perf_counter() - began) / 3  # the best of three
    assert torch.get_float32_matmul_precision() == before
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(1))
    rounding = (x - x.bfloat16()).norm() / x.norm()
    assert error == pytest.approx(3**0.5 * float(rounding), rel=0.3)  # of two factors and of the result


def test_versions_against_the_lock(tmp_path, monkeypatch):
    lock = tmp_path / "requirements.lock"
    lock.write_text(
        "rich==15.0.0 \\\n    --hash=sha256:00\n    # via boltlab\n"
        "numpy==2.4.6 ; python_full_version < '3.12' \\\nnumpy==2.5.4 ; python_full_version >= '3.12' \\\n"
        "torch==2.15.0 \\\npywin32==312 ; sys_platform == 'cygwin' \\\nwandb==0.31.0 \\\ntimm==1.0.31 \\\n"
    )
    here = {"rich": "14.9", "numpy": "9.0", "torch": "2.15.0+cpu", "wandb": "0.31.0"}
    monkeypatch.setattr(doctor, "_version", here.get)
    more = tmp_path / "more.lock"
    more.write_text("optuna==5.0.0 \\\nray==2.58.0 \\\n")
    here["ray"] = "2.50.0"
    assert doctor.check_lock(lock, more)[1].detail == "older: rich 14.9 for 15.0.0, ray 2.50.0 for 2.58.0"
    rows = doctor.check_lock(lock, tmp_path / "none.lock")
    assert [row.detail.split(" for ")[0] for row in rows] == [
        "missing: timm 1.0.31",
        "older: rich 14.9",
        "newer: numpy 9.0",
    ]
    assert {row.status for row in rows} == {"warn"}
    assert all("--require-hashes" in row.cure for row in rows)

    here |= {"rich": "15.0.0", "timm": "1.0.31", "numpy": dict(doctor.read_lock(lock))["numpy"]}
    assert [row.status for row in doctor.check_lock(lock, tmp_path / "none.lock")] == ["ok"]
    assert doctor.check_lock(tmp_path / "none.lock") == []


def test_the_projects_own_lock_is_read_whole():
    if not doctor.LOCK.is_file():
        pytest.skip("not a clone: there is no requirements.lock")
    locked = dict(doctor.read_lock(doctor.LOCK))
    assert {"torch", "lightning", "hydra-core", "wandb"} <= locked.keys() and "pytest" not in locked
    more = dict(doctor.read_lock(doctor.MORE))
    assert locked.items() <= more.items() and {"timm", "mlflow", "pytest"} <= more.keys()


def test_a_version_that_pyproject_keeps_out_fails(monkeypatch):
    assert doctor.check_requirements() == []
    versions = {"lightning": "2.6.3", "wandb": None}
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name, metadata.version(name)))
    rows = {row.name: row for row in doctor.check_requirements()}
    assert rows.keys() == {"lightning", "wandb"}
    assert {row.status for row in rows.values()} == {"fail"}
    assert rows["lightning"].detail.startswith("2.6.3")
    assert rows["wandb"].detail.startswith("missing")
    assert rows["lightning"].cure == 'pip install "lightning<2.7,>=2.6.6"'


@pytest.mark.parametrize(
    ("environment", "text", "detail"),
    [
        ({}, None, "no key"),
        ({"WANDB_MODE": "offline"}, None, "WANDB_MODE=offline"),
        ({"WANDB_API_KEY": KEY}, None, "a key in WANDB_API_KEY"),
        ({}, f"machine api.wandb.ai login user password {KEY}", "a key in"),
        ({"WANDB_BASE_URL": "https://w.example/"}, f"machine api.wandb.ai login user password {KEY}", "no key"),
        ({"WANDB_BASE_URL": "https://w.example/"}, f"machine w.example login user password {KEY}", "a key in"),
    ],
)
def test_wandb_key_is_found_and_never_shown(environment, text, detail, monkeypatch, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if text:
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        (tmp_path / "netrc").write_text(text)
    row = doctor.check_wandb()
    assert row.detail.startswith(detail)
    assert row.status == "ok"
    assert KEY not in str(row)


def test_a_broken_netrc_is_named_without_its_text(tmp_path):
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai {KEY}")
    row = doctor.check_wandb()
    assert row.status == "warn"
    assert ".netrc, line 1" in row.detail
    assert KEY not in str(row)


def test_small_shared_memory_and_a_full_disk_are_seen(monkeypatch, tmp_path):
    usage = type("Usage", (), {"total": 64 * 2**20, "free": 2**20})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    [row] = doctor.check_shared_memory(tmp_path)
    assert (row.status, row.detail) == ("warn", "64 MiB")
    assert "--shm-size" in row.cure
    assert doctor.check_disk(tmp_path)[1].status == "fail"
    assert doctor.check_shared_memory(tmp_path / "none") == []


def test_every_bad_file_is_named_with_its_reason(monkeypatch, tmp_path, capsys):
    module = ModuleType("folder_of_files")
    module.check_folder = lambda root: [(Path(root) / f"{i}.png", "cut short") for i in range(60)]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "folder_of_files", module)
    monkeypatch.setattr(doctor, "check_precision", list)
    data = {"_target_": "folder_of_files.ImageFolder", "root": str(tmp_path)}
    assert doctor.run(OmegaConf.create({"data": data, "log_dir": str(tmp_path)})) == 1
    out = capsys.readouterr().out
    assert f"{tmp_path / '49.png'}: cut short" in out
    assert "and 10 more" in out
    assert out.count("max_bad_files") == 1, "one cure for all of them"

    module.check_folder = lambda root: []  # type: ignore[attr-defined]
    [row] = doctor.check_data(OmegaConf.create(data))
    assert row.status == "ok"


def test_data_without_files_needs_no_check():
    [row] = doctor.check_data(OmegaConf.create({"_target_": "collections.OrderedDict"}))
    assert row.status == "ok"


def test_the_verb_through_its_config(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check_precision", list)
    assert doctor.main([f"log_dir={tmp_path}"]) == 0
    assert "0 failed" in capsys.readouterr().out
