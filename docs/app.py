"""The picture of the demo in docs/demo.md, of a demo that runs: `python docs/app.py http://127.0.0.1:7860`."""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image
from tdm.tests.browser import chromium

FILE = Path(__file__).with_suffix(".png")


def main(url: str) -> None:
    """Wait for the first screen, its teacher and slider included, and write it."""
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1180, "height": 860}, color_scheme="light")
        page.goto(url)
        page.wait_for_selector("#stage .status:not(:empty)", timeout=300_000)
        page.wait_for_selector("#slider img")
        page.wait_for_timeout(1_000)  # what fades in is there
        page.screenshot(path=FILE)
    with Image.open(FILE) as picture:
        picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(FILE, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
