"""Pictures as PNG files with their settings inside. A file that is read back is not trusted."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..errors import TDMError
from ..files import replacing
from .settings import Settings

KEPT = 2_000  # pictures in the folder; the oldest go
LARGEST = 32 << 20  # bytes of a file that is read back
KEY = "tdm"  # of the settings, as in what `tdm generate` writes


class Pictures:
    """The folder in which the demo keeps its pictures.

    Args:
        folder: created if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, picture: Image.Image, settings: Settings) -> Path:
        """Write a PNG with its settings. The same picture is the same file."""
        info = PngInfo()
        info.add_itxt("prompt", settings.prompt)
        info.add_text(KEY, json.dumps(settings.to_dict()))
        return self._write(_png(picture, info), f"{_slug(settings.prompt)}-{settings.seed}")

    def save_sheet(self, sheet: Image.Image, name: str) -> Path:
        """Write a sheet of several pictures."""
        return self._write(_png(sheet, PngInfo()), _slug(name))

    def _write(self, content: bytes, name: str) -> Path:
        path = self.folder / f"{name}-{hashlib.sha256(content).hexdigest()[:10]}.png"
        if not path.exists():
            with replacing(path, shared=True) as file:
                file.write(content)
            self._forget_old()
        return path

    def _forget_old(self) -> None:
        files = list(self.folder.glob("*.png"))
        if len(files) > KEPT:
            for old in sorted(files, key=lambda file: file.stat().st_mtime)[: len(files) - KEPT]:
                old.unlink(missing_ok=True)


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in a picture of this demo or of `tdm generate`, not checked yet, with those that this page does
    not have. Its pixels are not read.

    Raises:
        TDMError: the file is too large, no PNG, cut off, or without settings.
    """
    file = Path(path)
    try:
        if file.stat().st_size > LARGEST:
            raise TDMError(f"the file is larger than {LARGEST >> 20} MB; drop a PNG made here")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=["PNG"]) as picture:
                text = picture.info.get(KEY)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        if isinstance(error, TDMError):
            raise
        raise TDMError("this is no whole PNG; drop a picture that was made here or by tdm generate") from None
    try:
        settings = json.loads(text) if isinstance(text, str) else None
    except (json.JSONDecodeError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise TDMError("this PNG has no settings in it; drop one that was made here or by tdm generate")
    return {**dict.fromkeys(Settings.__dataclass_fields__), **settings}


def _png(picture: Image.Image, info: PngInfo) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60].strip("-") or "picture"
