"""Places for results: nothing is overwritten, and no half file is left."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import TDMError
from ..files import replacing


def check_writable(path: Path, force: bool) -> None:
    """Fail before the work, not after it.

    Raises:
        TDMError: ``path`` exists and ``force`` is False, is a folder, or its folder cannot be created or written.
    """
    if path.is_dir():
        raise TDMError(f"{path} is a folder; give a file name")
    if path.exists() and not force:
        raise TDMError(f"{path} exists; choose another --out, or replace it with --force")
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Make ``folder``.

    Raises:
        TDMError: the folder cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TDMError(f"cannot make the folder {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise TDMError(f"cannot write in {folder}; choose another --out")


def save_png(image: Image.Image, path: Path, **text: str) -> None:
    """Write a PNG with text chunks, whole or not at all."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    with replacing(path, shared=True) as file:
        image.save(file, format="PNG", pnginfo=info)
