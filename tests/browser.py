"""Chromium, told what to do: keys are pressed, and the page is asked what it shows. Needs no library.

It speaks the DevTools protocol: JSON messages, each ended by a zero byte, through file descriptors 3 and 4.
"""

import fcntl
import itertools
import json
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

from tests.pages import chromium

# Begins its arguments as a program that reads messages from its descriptor 3 and writes them to 4.
BEGIN = "import os, sys; a, b, *c = sys.argv[1:]; os.dup2(int(a), 3); os.dup2(int(b), 4); os.execv(c[0], c)"
KEYS = {"Tab": ("Tab", 9, ""), "Enter": ("Enter", 13, "\r"), "Right": ("ArrowRight", 39, "")}


class Browser:
    """A page that is open. `said` holds what it has written to the console, and its errors."""

    def __init__(self, commands, answers, file: Path):
        self.commands, self.answers, self.numbers = commands, answers, itertools.count(1)
        self.session, self.said = {}, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Accessibility"):
            self.send(f"{domain}.enable")
        self.send("Page.navigate", url=file.as_uri())
        while self.ask("document.readyState") != "complete":
            pass

    def send(self, method: str, **params) -> dict:
        """The result of a command of the protocol."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params, **self.session}
        self.commands.write(json.dumps(message).encode() + b"\0")
        self.commands.flush()
        while (message := self.receive()).get("id") != number:
            if message["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
                self.said.append(message["params"])
        assert "error" not in message, (method, message)
        return message["result"]

    def receive(self) -> dict:
        read = bytearray()
        while (byte := self.answers.read(1)) != b"\0":
            assert byte, "Chromium has ended"
            read += byte
        return json.loads(read)

    def ask(self, expression: str):
        """The value of a JavaScript expression."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def press(self, name: str) -> None:
        key, code, text = KEYS[name]
        event = {"key": key, "code": key, "windowsVirtualKeyCode": code, "text": text}
        self.send("Input.dispatchKeyEvent", type="keyDown", **event)
        self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def tab_to(self, expression: str, most: int = 100) -> None:
        """Press Tab until the expression is true of what has the focus, which it calls `x`."""
        for _ in range(most):
            self.press("Tab")
            if self.ask(f"(x => {expression})(document.activeElement)"):
                return
        raise AssertionError(f"no Tab leads to {expression}")

    def dark(self, value: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if value else "light"}]
        self.send("Emulation.setEmulatedMedia", features=features)


@contextmanager
def opened(file: Path, folder: Path):
    """The page in a Browser of its own, for two minutes at most; folder: for what Chromium writes."""
    pipes = [os.pipe() for _ in range(2)]
    theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (pipes[0][0], pipes[1][1])]
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
    command = [sys.executable, "-c", BEGIN, *map(str, theirs), chromium(), *flags]
    process = subprocess.Popen(command, pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = threading.Timer(120, process.kill)
    end.start()
    for fd in (pipes[0][0], pipes[1][1], *theirs):
        os.close(fd)
    with os.fdopen(pipes[0][1], "wb") as commands, os.fdopen(pipes[1][0], "rb") as answers:
        try:
            yield Browser(commands, answers, file)
        finally:
            end.cancel()
            process.terminate()
            process.wait(30)
