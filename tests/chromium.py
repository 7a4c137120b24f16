"""A real Chromium, driven through two pipes by its own protocol: no package is needed for it."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from patience import seconds

PROGRAM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # of tests that run as root, on a page that they wrote
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


class Chromium:
    """One browser with one page.

    Args:
        profile: An empty folder for what it writes.
    """

    def __init__(self, profile):
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        # Chromium reads from 3 and writes to 4. Copies above 9 are not overwritten by each other.
        ends = [fcntl.fcntl(each, fcntl.F_DUPFD, 10) for each in (commands, answers)]
        flags = [*_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{ends[0]} 4>&{ends[1]}', "bash", PROGRAM, *flags],
            pass_fds=ends,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for each in (commands, answers, *ends):
            os.close(each)
        os.set_blocking(self._answers, False)
        self._unread, self._number, self._session = b"", 0, None
        self.events = []
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self):
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        found = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **parameters):
        """Send a command, and return its result; what happens meanwhile goes to ``events``."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + seconds(60)
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"{PROGRAM} ended with {self._process.returncode}")
            answer = self._next()
            if answer is None:
                time.sleep(0.002)
            elif answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            elif "method" in answer:
                self.events.append(answer)
        raise TimeoutError(method)

    def _next(self):
        with suppress(BlockingIOError):
            self._unread += os.read(self._answers, 1 << 20)
        message, end, rest = self._unread.partition(b"\0")
        if not end:
            return None
        self._unread = rest
        return json.loads(message)

    def evaluate(self, expression):
        """Return what JavaScript says."""
        found = self.ask(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"])
        return found["result"].get("value")

    def open(self, page, *, width=1280, height=900, dark=False):
        """Open a file, wait until it is drawn, and return how long that took, in ms."""
        self.look(width=width, height=height, dark=dark)
        self.ask("Page.navigate", url="about:blank")
        self.ask("Page.navigate", url=Path(page).resolve().as_uri())
        return self.wait("document.documentElement?.dataset.ready")

    def wait(self, expression):
        """Return the first value of JavaScript that is true."""
        deadline = time.monotonic() + seconds(30)
        while time.monotonic() < deadline:
            if value := self.evaluate(expression):
                return value
            time.sleep(0.02)
        raise TimeoutError(expression)

    def next_frame(self):
        """Wait until the page has followed what was changed."""
        frame = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
        self.evaluate(f"{frame}.then(() => 0)")

    def look(self, *, width=1280, height=900, dark=False):
        """Set the size of the window, and whether its user likes it dark."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def mouse(self, kind, x, y, **more):
        """Move, press or release the mouse."""
        self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def key(self, key, *, shift=False):
        """Press a key and release it."""
        text = {"text": key} if len(key) == 1 else {}
        modifiers = 8 if shift else 0
        self.ask("Input.dispatchKeyEvent", type="keyDown", key=key, modifiers=modifiers, **text)
        self.ask("Input.dispatchKeyEvent", type="keyUp", key=key, modifiers=modifiers)

    def screenshot(self, *, whole=False):
        """Return what is seen as PNG; of the whole page, or of the window."""
        more = {}
        if whole:
            size = self.ask("Page.getLayoutMetrics")["cssContentSize"]
            more = {"captureBeyondViewport": True, "clip": {**size, "x": 0, "y": 0, "scale": 1}}
        found = self.ask("Page.captureScreenshot", format="png", **more)
        return base64.b64decode(found["data"])

    def pdf(self):
        """Return the page as it is printed."""
        found = self.ask("Page.printToPDF", printBackground=True, preferCSSPageSize=True)
        return base64.b64decode(found["data"])

    def close(self):
        """End the browser."""
        os.close(self._commands)  # it ends with its pipe
        self._commands = -1
        try:
            self._process.wait(seconds(10))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._answers)
