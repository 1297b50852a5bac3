"""The accessibility linter, in the page."""

from __future__ import annotations

from pathlib import Path

import axe_core_python
from playwright.sync_api import Page

SCRIPT = Path(axe_core_python.__file__).with_name("axe.min.js")


def violations(page: Page) -> list[str]:
    """Return the violations that axe reports as serious or critical, one line each."""
    if not page.evaluate("Boolean(window.axe)"):
        page.add_script_tag(path=SCRIPT)
    page.wait_for_timeout(600)  # what fades in has its colours
    every_violation = page.evaluate("axe.run()")["violations"]
    grave = [violation for violation in every_violation if violation["impact"] in ("serious", "critical")]
    return [f"{v['id']}: {node['html'][:200]}" for v in grave for node in v["nodes"]]
