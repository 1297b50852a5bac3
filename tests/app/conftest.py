"""The demo as people start it: a process of its own, from a folder of another name, where `tdm` is not installed."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import HTTPError

import pytest
from playwright.sync_api import Browser, Page
from tdm.tests.browser import chromium

ROOT = Path(__file__).parents[2]


@dataclass
class App:
    """A demo that runs."""

    url: str
    out: Path
    process: subprocess.Popen[bytes]
    log: Path
    waited: list[int] = field(default_factory=list)  # what it answered before it was there

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(command: list[str], out: Path, **env: str) -> App:
    """Start it, and wait until it answers."""
    port = free_port()
    out.mkdir(parents=True, exist_ok=True)
    log = out / "app.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *command, "--out", str(out)],
            env={**os.environ, "GRADIO_SERVER_PORT": str(port), **env},
            cwd=out,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    app = App(f"http://127.0.0.1:{port}", out, process, log)
    end = time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(app.url, timeout=60).close()
            return app
        except OSError as error:
            app.waited += [error.code] if isinstance(error, HTTPError) else []
            if process.poll() is not None or time.monotonic() > end:
                process.kill()
                raise RuntimeError(f"the demo did not start:\n{log.read_text()[-3000:]}") from None
            time.sleep(0.2)


@pytest.fixture(scope="session")
def students(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of student files; the tests put more into it."""
    return tmp_path_factory.mktemp("students")


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory, students: Path) -> Iterator[App]:
    folder = tmp_path_factory.mktemp("app")
    clone = folder / "TDM-of-mine"
    clone.symlink_to(ROOT, target_is_directory=True)
    (folder / "tdm.py").write_text("raise ImportError('no such package is installed')\n")
    command = [str(clone / "app.py"), "--mcp", "--students-folder", str(students)]
    running = start(command, folder / "out", PYTHONPATH=str(folder))
    yield running
    running.stop()


@pytest.fixture(scope="module")  # while it is open nothing else can have an event loop in this thread
def browser() -> Iterator[Browser]:
    with chromium() as instance:
        yield instance


@dataclass
class Watched:
    """What must not happen while a page is open."""

    errors: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)


@pytest.fixture
def open_page(app: App, browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages. At the end no console may have an error, and no request may have left this machine."""
    watched, contexts = Watched(), []

    def open_one(query: str = "", **context: object) -> Page:
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context}))
        page = contexts[-1].new_page()
        page.set_default_timeout(120_000)
        page.on("console", lambda m: watched.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: watched.errors.append(str(error)))
        inside = (app.url, "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(inside) else watched.outside.append(r.url))
        page.goto(app.url + query)
        page.wait_for_selector("#stage .status:not(:empty)")
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert watched.errors == []
    assert watched.outside == []
