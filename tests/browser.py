"""A headless Chromium, spoken to through the two pipes of its DevTools protocol: no driver and no port are needed."""

import base64
import json
import os
import select
import shutil
import subprocess
import time

from waiting import HANG

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")
FLAGS += ("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe")


def binary():
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page. `events` are all that the browser has told, as (method, parameters)."""

    def __init__(self, profile, timeout=HANG):
        read_here, write_there = os.pipe()
        read_there, write_here = os.pipe()

        def connect():  # it reads from 3 and writes to 4
            there = os.dup(read_there), os.dup(write_there)
            for target, source in zip((3, 4), (os.dup2(fd, fd + 200) for fd in there), strict=True):
                os.dup2(source, target)

        command = [binary(), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            command, preexec_fn=connect, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(read_there), os.close(write_there)
        self._in, self._out, self._timeout = read_here, write_here, timeout
        self._buffer, self._number, self.events, self._session = b"", 0, [], None
        pages = [info for info in self("Target.getTargets")["targetInfos"] if info["type"] == "page"]
        self._session = self("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self(f"{domain}.enable")

    def __call__(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        return self._until(lambda said: said.get("id") == self._number)["result"]

    def _until(self, fits):
        end = time.monotonic() + self._timeout
        while True:
            while b"\0" not in self._buffer:
                ready, _, _ = select.select([self._in], [], [], max(0, end - time.monotonic()))
                part = os.read(self._in, 1 << 20) if ready else b""
                if not part:
                    raise RuntimeError(f"the browser does not answer; it has told: {self.events[-3:]}")
                self._buffer += part
            text, _, self._buffer = self._buffer.partition(b"\0")
            said = json.loads(text)
            if "method" in said:
                self.events.append((said["method"], said.get("params", {})))
            if fits(said):
                assert "error" not in said, said
                return said

    def open(self, url, width=1280, height=900, scheme="light", scripts=True):
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self("Emulation.setScriptExecutionDisabled", value=not scripts)
        seen = len(self.events)
        self("Page.navigate", url=url)
        while not any(method == "Page.loadEventFired" for method, _ in self.events[seen:]):
            self._until(lambda said: said.get("method") == "Page.loadEventFired")

    def value(self, expression):
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key):
        code = {"Tab": 9, "Enter": 13, " ": 32}[key]
        text = {"Enter": {"text": "\r"}, " ": {"text": " "}}.get(key, {})
        for kind in ("keyDown", "keyUp"):
            more = text if kind == "keyDown" else {}
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def screenshot(self, path, whole=False):
        data = self("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self):
        try:
            self._session = None
            self("Browser.close")
            self.process.wait(HANG)
        except (RuntimeError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait(HANG)
        finally:
            os.close(self._in), os.close(self._out)
