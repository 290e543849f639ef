"""`boltlab sync`: what is sent, in which order, and what is said; against a server of our own on loopback."""

import json
import os
import platform
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import wandb

from boltlab import runs
from boltlab.loggers.wandb import WandbLogger

KEY = "b" * 40


@pytest.fixture(autouse=True)
def _clean_wandb(monkeypatch, tmp_path):
    """No key, no settings, no session of another test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("boltlab.loggers.wandb._newest", None)
    wandb.teardown()
    yield
    wandb.teardown()


def recorded(run: str, start: str, name: str, synced: bool = False, **summary) -> Path:
    """The place of a run that was recorded offline."""
    folder = Path("logs") / run / "wandb" / f"offline-run-{start}-{name}"
    folder.mkdir(parents=True)
    (folder / f"run-{name}.wandb").write_bytes(b"")
    if synced:
        (folder / f"run-{name}.wandb.synced").touch()
    (Path("logs") / run / "config.yaml").write_text("seed: 0\n")
    runs.write_summary(Path("logs") / run, **summary)
    return folder


def lines(out: str) -> list[tuple[str, str]]:
    """(id of the W&B run, what was said of it), and at the end the counts."""
    *parts, counts = out.splitlines()
    return [(part.split("  ")[0].rpartition("-")[2], part.split("  ")[1]) for part in parts] + [("", counts)]


@pytest.fixture
def several():
    recorded("train/newer", "20260103_000000", "c")
    recorded("train/sweep/1", "20260102_000000", "b")
    recorded("train/sweep/0", "20260101_000000", "a", synced=True)
    recorded("train/newer", "20260104_000000", "c")  # it was resumed
    recorded("eval/of_newer", "20260105_000000", "e")
    recorded("train/live", "20251231_000000", "r", status="running", pid=os.getpid(), host=platform.node())


def test_a_dry_run_lists_all_in_order_and_imports_no_wandb(boltlab_process, several):
    done = boltlab_process("sync", "dry_run=true", PYTHONPROFILEIMPORTTIME="1")
    assert done.returncode == 0, done.stderr
    assert lines(done.stdout) == [
        ("a", "synced already"),
        ("r", "is running: sync it when it has ended"),
        ("b", "would be sent"),
        ("c", "would be sent"),
        ("c", "would be sent"),
        ("e", "would be sent"),
        ("", "4 would be sent, 1 synced already, 1 left"),
    ]
    assert "wandb.sdk" not in done.stderr and "torch" not in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["newer"], ["c", "c"]),
        (["sweep"], ["b"]),
        (["logs/train/sweep/1", "of_newer"], ["b", "e"]),
        (["sweep", "newer", "newer"], ["b", "c", "c"]),
    ],
)
def test_runs_and_sweeps_by_name(boltlab, several, words, expected):
    code, out, err = boltlab("sync", *words, "dry_run=true")
    assert code == 0, err
    assert [name for name, said in lines(out) if said == "would be sent"] == expected


def test_mistakes(boltlab, several):
    code, _, err = boltlab("sync", "nowhere")
    assert (code, "nowhere is neither a run folder" in err) == (1, True)
    code, _, err = boltlab("sync", "dry_rum=true")
    assert (code, "did you mean 'dry_run'?" in err) == (2, True)
    assert boltlab("sync", "log_dir=empty")[:2] == (0, "nothing was recorded offline by W&B there\n")


def test_without_a_key_nothing_is_tried(boltlab, several, monkeypatch):
    monkeypatch.setattr("boltlab.commands.sync.subprocess", None)
    code, _, err = boltlab("sync", "all")
    assert code == 1
    assert err == "boltlab sync: W&B takes no run (no API key; `wandb login` saves one): nothing was sent\n"


def test_a_closed_port_is_one_error(boltlab, several, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    code, out, err = boltlab("sync", "newer")
    assert (code, out) == (1, "")
    why = f"http://127.0.0.1:{port} cannot be reached: ConnectionError"
    assert err == f"boltlab sync: W&B takes no run ({why}): nothing was sent\n"


@pytest.fixture
def server():
    """As much of W&B's server as an upload of metrics takes: its address, and (run, losses) as they came. It refuses
    a run that is called "refused"."""
    came = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
            self.answer(*(self.graphql(body) if self.path.endswith("/graphql") else self.stream(body)))

        def graphql(self, body):
            asked = body.get("variables") or {}
            if "upsertBucket" in body["query"]:
                if asked["name"] == "refused":
                    return {"errors": [{"message": "this project is full"}]}, 400
                project = {"id": "p", "name": "boltlab", "entity": {"id": "e", "name": "me"}}
                bucket = {"id": "Ug==", "name": asked["name"], "displayName": "d", "project": project, "config": None}
                return {"data": {"upsertBucket": {"bucket": {**bucket, "historyLineCount": 0}, "inserted": True}}}, 200
            if "createRunFiles" in body["query"]:
                here = f"http://127.0.0.1:{self.server.server_port}/"
                files = [{"name": name, "uploadUrl": f"{here}{name}"} for name in asked["files"]]
                return {"data": {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}}, 200
            return {"data": {"viewer": {"id": "v", "entity": "me", "flags": "{}"}}}, 200

        def stream(self, body):
            history = body.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            came.extend((self.path.split("/")[4], row["loss"]) for row in map(json.loads, history) if "loss" in row)
            return {"exitcode": None, "limits": {}}, 200

        def do_PUT(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.answer({}, 200)

        def answer(self, content, status):
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", came
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_runs_are_sent_by_wandb_oldest_first_the_parts_of_a_resumed_one_in_order(boltlab, monkeypatch, server):
    """A run, another one, and the rest of the first; then one that the server refuses."""
    for run, name, losses in (
        ("one", "first", {0: 1.0, 1: 2.0}),
        ("two", "second", {0: 9.0}),
        ("one", "first", {2: 3.0}),
    ):
        logger = WandbLogger(Path("logs/train") / run, id=name)
        for step, loss in losses.items():
            logger.log_metrics({"loss": loss}, step)
        logger.finish()
        # Their folders are named by the second.
        found = list(Path("logs/train").glob("*/wandb/offline-run-*"))
        (folder,) = [path for path in found if "-run-2001" not in path.name]
        folder.rename(folder.with_name(f"offline-run-2001010{len(found)}_000000-{name}"))
    wandb.teardown()
    address, came = server
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", address)
    code, out, err = boltlab("sync", "all")
    assert code == 0, out + err
    assert lines(out) == [("first", "sent"), ("first", "sent"), ("second", "sent"), ("", "3 sent, 0 synced already")]
    assert came == [("first", 1.0), ("first", 2.0), ("first", 3.0), ("second", 9.0)]
    code, out, _ = boltlab("sync", "all")
    assert (code, lines(out)[-1][1], len(came)) == (0, "0 sent, 3 synced already", 4)

    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    logger = WandbLogger(Path("logs/train/three"), id="refused")
    logger.log_metrics({"loss": 1.0}, 0)
    logger.finish()
    wandb.teardown()
    code, out, _ = boltlab("sync", "three")
    assert code == 1
    assert lines(out)[0][1].startswith("failed: ") and "this project is full" in out
    assert lines(out)[-1][1] == "0 sent, 0 synced already, 1 failed"
    assert KEY not in out
