"""Pages opened in Chromium, and what they then did that a page which is only text does not do.

The browser is driven through its debugging pipe: JSON, each message ended by a zero byte.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Becomes the browser, which reads commands from 3 and writes answers to 4.
LAUNCH = """
import fcntl, os, sys
reads, writes = (fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3])
os.dup2(reads, 3)
os.dup2(writes, 4)
os.closerange(5, 64)
os.execv(sys.argv[3], sys.argv[3:])
"""

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# Every element in the browser's own tree, with its attributes; two of them hold text.
STRUCTURE = """
[...document.querySelectorAll('*')].map(e => e.namespaceURI.split('/').pop() + ' ' + e.localName
  + [...e.attributes].map(a => ' ' + a.name
    + (['alt', 'aria-label'].includes(a.name) ? '' : '=' + a.value)).sort().join(''))
"""

# What a reader could do: point at everything, open what opens, follow every link.
TOUCH = """
for (const e of document.querySelectorAll('*')) {
  for (const kind of ['mouseover', 'mouseenter', 'mousemove', 'pointerover', 'focus', 'focusin'])
    e.dispatchEvent(new Event(kind, {bubbles: true}));
  if (e.localName == 'details') e.open = true;
  if (e.focus && e.tabIndex >= 0) e.focus();
}
for (const e of [...document.querySelectorAll('body *')].slice(0, 200))
  e.dispatchEvent(new MouseEvent('click', {bubbles: true, cancelable: true, view: window}));
"""

# Asked after the page has had its turn, in its own time, however busy the machine is.
SEEN = """
new Promise(done => setTimeout(() => setTimeout(() => done({
  name: window.name, title: document.title, address: location.href.split('#')[0]
}), 10), 10))
"""

SIGNS = {
    "Page.javascriptDialogOpening",
    "Page.windowOpen",
    "Runtime.exceptionThrown",
    "Runtime.consoleAPICalled",
    "Browser.downloadWillBegin",
}
"""Events of the browser that no page of text gives rise to."""


def find():
    """The browser's program; None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A browser without a window; one page at a time.

    Raises:
        RuntimeError: If there is none, or it does not answer.
    """

    def __init__(self):
        program = find()
        if program is None:
            raise RuntimeError("hostile_payloads needs Chromium: apt-get install chromium")
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        reads, self._to = os.pipe()
        self._from, writes = os.pipe()
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", LAUNCH, str(reads), str(writes)),
                *(program, "--headless=new", "--no-sandbox", "--disable-gpu"),
                *("--disable-dev-shm-usage", "--no-first-run", "--window-size=1200,1400"),
                *(f"--user-data-dir={self._profile.name}", "--remote-debugging-pipe"),
                "about:blank",
            ],
            pass_fds=(reads, writes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(reads)
        os.close(writes)
        self._unread, self._number, self.events = b"", 0, []
        self.version = self.call("Browser.getVersion")["product"]
        self.call("Browser.setDownloadBehavior", behavior="deny", eventsEnabled=True)
        self._target = self._session = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    def opened(self, path, *, screenshot=None, height=1400, fresh=False):
        """What the page at `path` did: its tree, and all by which it could have come alive."""
        if fresh:
            self._forget()
        session = self._tab()
        self.events.clear()
        address = Path(path).absolute().as_uri()
        self.call("Page.navigate", session, url=address)
        self._wait(lambda: self._has("Page.loadEventFired"), 5)
        structure = self._evaluate(session, STRUCTURE)
        if screenshot is not None:
            self._photograph(session, screenshot, height)
        self._evaluate(session, TOUCH)
        for _ in range(3):
            for kind in ("keyDown", "keyUp"):
                self.call("Input.dispatchKeyEvent", session, type=kind, key="Tab", code="Tab")
        seen = self._evaluate(session, SEEN) or {}
        found = {"structure": structure, "title": seen.get("title"), "did": self._did(address)}
        if seen.get("name"):
            found["did"].append(f"set window.name to {seen['name']!r}")
        if seen.get("address") not in (address, None):
            found["did"].append(f"went to {seen['address']!r}")
        if found["did"]:  # the next page gets a tab that nothing has happened in
            self._forget()
        return found

    def _forget(self):
        if self._target is not None:
            self.call("Target.closeTarget", targetId=self._target)
            self._target = None

    def _tab(self):
        if self._target is None:
            self._target = self.call("Target.createTarget", url="about:blank")["targetId"]
            attached = self.call("Target.attachToTarget", targetId=self._target, flatten=True)
            self._session = attached["sessionId"]
            for part in ("Page", "Network", "Log", "Runtime"):
                self.call(f"{part}.enable", self._session)
        return self._session

    def _did(self, address):
        did = []
        for event in self.events:
            method, body = event["method"], event["params"]
            if method == "Network.requestWillBeSent":
                asked = body["request"]["url"]
                if asked.split("#")[0] != address and not asked.startswith("data:image/png;"):
                    did.append(f"asked for {asked[:80]!r}")
            elif method == "Log.entryAdded" and body["entry"]["source"] == "security":
                did.append(f"was refused: {body['entry']['text'][:120]!r}")
            elif method in SIGNS:
                did.append(method)
        return did

    def _photograph(self, session, path, height):
        size = {"width": 1200, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", session, **size)
        drawn = self.call(
            "Page.captureScreenshot", session, format="png", captureBeyondViewport=False
        )
        Path(path).write_bytes(base64.b64decode(drawn["data"]))

    def _evaluate(self, session, code):
        try:
            found = self.call(
                "Runtime.evaluate",
                session,
                expression=code,
                returnByValue=True,
                awaitPromise=True,
            )
        except RuntimeError:  # the page has just gone elsewhere
            return None
        return found["result"].get("value")

    def _has(self, method):
        return any(event["method"] == method for event in self.events)

    def _wait(self, done, seconds):
        end = time.monotonic() + seconds
        while not done() and (left := end - time.monotonic()) > 0:
            self._read(left)

    def call(self, method, session=None, **parameters):
        """The answer to a command of the protocol.

        Raises:
            RuntimeError: If the browser refuses, or is silent for 20 seconds.
        """
        self._number += 1
        number = self._number
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + 20
        while (left := end - time.monotonic()) > 0:
            for answer in self._read(left):
                if answer.get("id") == number:
                    if "error" in answer:
                        raise RuntimeError(f"{method}: {answer['error']['message']}")
                    return answer["result"]
        raise RuntimeError(f"{method}: no answer")

    def _read(self, seconds):
        """Messages that have come; those that nobody asked for are kept as events."""
        if not select.select([self._from], [], [], max(seconds, 0))[0]:
            return []
        got = os.read(self._from, 1 << 20)
        if not got:
            raise RuntimeError("the browser has ended")
        *whole, self._unread = (self._unread + got).split(b"\0")
        messages = [json.loads(each) for each in whole]
        for message in messages:
            if "method" in message:
                self.events.append(message)
                if message["method"] == "Page.javascriptDialogOpening":
                    self._dismiss(message["sessionId"])
        return messages

    def _dismiss(self, session):
        self._number += 1
        message = {
            "id": self._number,
            "sessionId": session,
            "method": "Page.handleJavaScriptDialog",
            "params": {"accept": False},
        }
        os.write(self._to, json.dumps(message).encode() + b"\0")
