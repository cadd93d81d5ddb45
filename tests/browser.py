"""Debian's headless Chromium, driven over its DevTools protocol through two pipes: nothing but the standard library."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Browser:
    """`with Browser(profile) as browser:` one page. Messages are JSON, each ended by a zero byte (--remote-debugging-pipe)."""

    def __init__(self, profile: Path):
        read_here, write_there = os.pipe()
        read_there, write_here = os.pipe()

        def into_place() -> None:  # Chromium reads from file descriptor 3 and writes to 4
            a, b = os.dup(read_there), os.dup(write_there)
            os.dup2(a, 3)
            os.dup2(b, 4)

        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        flags += [f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND", "--hide-scrollbars", "about:blank"]
        quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.process = subprocess.Popen([CHROMIUM, *flags], close_fds=False, preexec_fn=into_place, **quiet)
        os.close(read_there)
        os.close(write_there)
        self.write, self.read = os.fdopen(write_here, "wb", buffering=0), read_here
        self.rest, self.number, self.events = b"", 0, []
        targets = self.ask("Target.getTargets")["targetInfos"]
        target = next(t["targetId"] for t in targets if t["type"] == "page")
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.write.close()
        os.close(self.read)

    def message(self) -> dict:
        while b"\0" not in self.rest:
            piece = os.read(self.read, 1 << 20)
            if not piece:
                raise RuntimeError("Chromium has gone away")
            self.rest += piece
        one, _, self.rest = self.rest.partition(b"\0")
        return json.loads(one)

    def ask(self, method: str, **params) -> dict:
        """Call a method and wait for its answer; events that come in between are kept."""
        self.number += 1
        call = {"id": self.number, "method": method, "params": params}
        if hasattr(self, "session"):
            call["sessionId"] = self.session
        self.write.write(json.dumps(call).encode() + b"\0")
        while (answer := self.message()).get("id") != self.number:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def show(self, url: str, width: int, scheme: str) -> None:
        """Load a page at a width, in the "light" or the "dark" scheme, and wait until it has loaded."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.events.clear()
        self.ask("Page.navigate", url=url)
        ends = time.monotonic() + 30
        while self.value("document.readyState") != "complete" or self.value("location.href") != url:
            assert time.monotonic() < ends, f"{url} does not finish loading"
            time.sleep(0.02)

    def value(self, expression: str):
        """What a JavaScript expression gives."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def requests(self) -> list[str]:
        """Addresses that the page has asked for, whether or not it was allowed to."""
        return [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]

    def complaints(self) -> list[str]:
        """What the console shows: refused loads, broken styles, errors."""
        return [e["params"]["entry"]["text"] for e in self.events if e.get("method") == "Log.entryAdded"]
