"""The ES module in a real browser: the example's page, served from a folder."""

from __future__ import annotations

import functools
import http.server
import json
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kernelgen.ir import formats
from kernelgen.tensor import QuantTensor
from tests.packages.making import EXAMPLES, commands, in_checkout
from tests.test_wgsl import CHROMIUM


class Site(http.server.SimpleHTTPRequestHandler):
    """Serves a folder, and takes what the page reports."""

    def do_POST(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.reported.append(json.loads(body))
        self.send_response(204)
        self.end_headers()
        server.done.set()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a test is quiet."""


def in_browser(folder: Path, profile: Path, seconds: float) -> Any:
    """What the page of a folder reports in headless Chromium."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no chromium on the path; on Debian: apt-get install chromium")
    handler = functools.partial(Site, directory=str(folder))
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.reported, server.done = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/index.html?report"
    command = [browser, *CHROMIUM, f"--user-data-dir={profile}", address]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert server.done.wait(seconds), f"the browser said nothing for {seconds} s"
    finally:
        process.terminate()
        process.wait(30)
        server.shutdown()
    return server.reported[0]


@pytest.mark.slow
def test_example_in_a_browser(checkout: Path) -> None:
    """What its README says, but for the server."""
    for line in commands(EXAMPLES / "web" / "README.md")[:2]:
        in_checkout(checkout, line)
    found = in_browser(checkout / "site", checkout / "profile", 300)
    if found.get("skipped"):
        pytest.skip(found["error"])
    assert "error" not in found, found["error"]
    assert len(found["lines"]) == 6
    # what the page multiplied with is what the blocks mean
    fmt = formats.get("q4_K")
    blocks = np.array(found["bytes"], np.uint8).reshape(70, -1)
    want = QuantTensor(fmt, (70, 512), blocks).dequantize()[:2]
    np.testing.assert_allclose(np.reshape(found["values"], (2, 512)), want, rtol=1e-6)
