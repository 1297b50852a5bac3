"""Files of results: names, pictures and videos. Nothing is overwritten, and no half file is left."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO

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


def numbered(path: Path) -> Path:
    """``path``, or the first of ``name-2``, ``name-3`` and so on that does not exist."""
    names = itertools.chain([path], (path.with_stem(f"{path.stem}-{n}") for n in itertools.count(2)))
    return next(name for name in names if not name.exists())


def save_png(image: Image.Image, path: Path, **text: str) -> None:
    """Write a PNG with text chunks, whole or not at all."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    with replacing(path, shared=True) as file:
        image.save(file, format="PNG", pnginfo=info)


def save_video(frames: Sequence[Image.Image], path: Path, fps: int, comment: str) -> None:
    """Write frames as the kind of video that the suffix names, whole or not at all.

    Args:
        frames: of one size, in order; width and height are even.
        path: ends in .mp4 (H.264), .gif or .webp.
        fps: frames per second.
        comment: stored in the file.
    """
    form = path.suffix.lower().removeprefix(".")
    with replacing(path, shared=True) as file:
        if form == "mp4":
            _write_mp4(frames, file, fps, comment)
        else:
            options = {"save_all": True, "append_images": frames[1:], "duration": round(1000 / fps), "loop": 0}
            frames[0].save(file, format=form, **options, **({"comment": comment.encode()} if form == "gif" else {}))


def _write_mp4(frames: Sequence[Image.Image], file: IO[bytes], fps: int, comment: str) -> None:
    import av

    with av.open(file, "w", format="mp4") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=fps, options={"crf": "17"})
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"  # what every browser and player shows
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())  # the frames that the encoder still holds
