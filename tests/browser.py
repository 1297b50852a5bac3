"""A real browser for the tests of what people click on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from playwright.sync_api import Browser, Playwright, expect, sync_playwright

expect.set_options(timeout=60_000)  # of a machine that does other work too; without failures nothing waits so long
_RUNNING: list[Playwright] = []
NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium_path() -> str | None:
    """The machine's own Chromium, if it has one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def chromium() -> Iterator[Browser]:
    """Headless Chromium, for the length of a module. Where there is none, the test is left out; in CI it fails."""
    path = chromium_path()
    if path is None:
        reason = f"no browser: install one of {', '.join(NAMES)}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with ExitStack() as stack:
        if not _RUNNING:  # playwright runs once in a process, whoever else has a browser open
            _RUNNING.append(stack.enter_context(sync_playwright()))
            stack.callback(_RUNNING.clear)
        browser = _RUNNING[0].chromium.launch(executable_path=path, args=["--no-sandbox"])
        stack.callback(browser.close)
        yield browser
