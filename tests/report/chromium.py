"""A page in headless Chromium, by its DevTools protocol over two pipes."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Browser:
    """One process; close it as a context."""

    def __enter__(self) -> "Browser":
        assert CHROMIUM is not None
        self._profile = tempfile.TemporaryDirectory()
        read_by_it, self._to = os.pipe()
        self._from, written_by_it = os.pipe()
        # Chromium reads from file descriptor 3 and writes to 4.
        command = 'exec "$0" "$@" 3<&"$IN" 4>&"$OUT"'
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--no-first-run",
            "--hide-scrollbars",
            "--force-color-profile=srgb",
            "--remote-debugging-pipe",
            f"--user-data-dir={self._profile.name}",
        ]
        self._process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, *flags],
            env={**os.environ, "IN": str(read_by_it), "OUT": str(written_by_it)},
            pass_fds=(read_by_it, written_by_it),
            stderr=subprocess.DEVNULL,
        )
        os.close(read_by_it)
        os.close(written_by_it)
        self._num_sent, self._unread, self._session = 0, b"", None
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._to)  # it ends when nobody can command it
        os.close(self._from)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._profile.cleanup()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._num_sent += 1
        message = {"id": self._num_sent, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._num_sent:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, file: Path, width: int, height: int, scheme: str = "light") -> None:
        """scheme: light or dark."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1}
        self.send("Emulation.setDeviceMetricsOverride", **size, mobile=False)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.send("Emulation.setEmulatedMedia", features=[feature])
        self.send("Page.navigate", url=file.resolve().as_uri())
        # Promises of the page before are gone with it.
        while self.evaluate("document.readyState") != "complete":
            pass
        self.evaluate("Promise.all(Array.from(document.images, i => i.decode()))")

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, of its promise too."""
        wanted = {"returnByValue": True, "awaitPromise": True}
        answer = self.send("Runtime.evaluate", expression=expression, **wanted)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, whole: bool = False) -> bytes:
        """PNG of the first screen, or of the whole page."""
        answer = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        return base64.b64decode(answer["data"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            chunk = os.read(self._from, 1 << 20)
            assert chunk, "Chromium ended"
            self._unread += chunk
        message, _, self._unread = self._unread.partition(b"\0")
        return json.loads(message)
