"""Pictures side by side on one sheet, with labels."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

INK, PAPER = (40, 40, 48), (255, 255, 255)
GAP = 6
LINE = 14


def contact_sheet(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str] = (),
    *,
    side: int = 160,
) -> Image.Image:
    """A labelled grid of pictures.

    Args:
        rows: pictures by row; every row has as many.
        row_labels: a short text left of each row; lines are split at newlines.
        column_labels: a text above each column, wrapped to its width; none leaves the space out.
        side: width in pixels of a picture on the sheet; heights follow the first picture's shape.
    """
    height = round(side * rows[0][0].height / rows[0][0].width)
    font = ImageFont.load_default(11)
    wrapped = [textwrap.wrap(text, max(8, side // 6)) for text in column_labels]
    head = LINE * max((len(lines) for lines in wrapped), default=0) + GAP
    left = 2 * GAP + max((int(font.getlength(line)) for text in row_labels for line in text.split("\n")), default=0)
    sheet = Image.new("RGB", (left + len(rows[0]) * (side + GAP), head + len(rows) * (height + GAP) + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for column, lines in enumerate(wrapped):
        pen.multiline_text((left + column * (side + GAP), GAP // 2), "\n".join(lines), fill=INK, font=font, spacing=2)
    for row, (pictures, label) in enumerate(zip(rows, row_labels, strict=True)):
        y = head + row * (height + GAP)
        pen.multiline_text((GAP, y + height // 3), label, fill=INK, font=font, spacing=3)
        for column, picture in enumerate(pictures):
            resized = picture.convert("RGB").resize((side, height), Image.Resampling.BICUBIC)
            sheet.paste(resized, (left + column * (side + GAP), y))
    return sheet
