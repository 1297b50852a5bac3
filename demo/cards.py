"""Pictures and figures as HTML. The pictures are inside the HTML, so that a run that streams leaves no files."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

from .engine import Frame


def picture(image: Image.Image, alt: str) -> str:
    """An `<img>` that needs no file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}">'


def card(name: str, frame: Frame | None, alt: str, waiting: str = "") -> str:
    """A run: its picture so far, its network calls and its seconds.

    Args:
        name: of the model that draws.
        frame: the last frame of the run; None before the first.
        alt: what the picture shows, for those who do not see it.
        waiting: the text in the place of the picture before the first frame.
    """
    if frame is None:
        image = f'<div class="blank">{escape(waiting)}</div>'
        figures, done, total = "&nbsp;", 0, 1  # its line is there already, so that nothing moves when they come
    else:
        image = picture(frame.picture, alt)
        of = "" if frame.final else f" of {frame.total}"
        figures = f"<span><b>{plural(frame.calls, 'call')}</b>{of}</span> <span>{frame.seconds:.2f} s</span>"
        done, total = frame.calls, frame.total
    bar = f'<progress max="{total}" value="{done}" aria-label="{escape(name)}: network calls made"></progress>'
    return (
        f'<figure class="card">{image}{bar}'
        f"<figcaption><strong>{escape(name)}</strong><div>{figures}</div></figcaption></figure>"
    )


def enlargeable(image: Image.Image, alt: str) -> str:
    """A picture that a click, or Enter, shows in the size of the window (page.js)."""
    return f'<button class="enlarge" title="Enlarge">{picture(image, alt)}</button>'


def status(text: str) -> str:
    """A line that screen readers announce."""
    return f'<p class="status" role="status">{escape(text)}</p>'


def stage(cards: Sequence[str]) -> str:
    """Cards side by side."""
    many = " many" if len(cards) > 4 else ""
    return f'<div class="stage{many}">{"".join(cards)}</div>'


def table(rows: Sequence[Sequence[str]], head: Sequence[str], side: Sequence[str], label: str) -> str:
    """A grid of cells, which are HTML already, with labels on two sides."""
    top = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = "".join(
        f'<tr><th scope="row">{escape(text)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for text, cells in zip(side, rows, strict=True)
    )
    return (
        f'<div class="sheet" tabindex="0" role="region" aria-label="{escape(label)}"><table><thead><tr><td></td>{top}'
        f"</tr></thead><tbody>{body}</tbody></table></div>"
    )


def strip(pictures: Sequence[str], labels: Sequence[str]) -> str:
    """Pictures one after another, as many on a line as there is room for."""
    figures = "".join(
        f"<figure>{image}<figcaption>{escape(label)}</figcaption></figure>"
        for image, label in zip(pictures, labels, strict=True)
    )
    return f'<div class="strip">{figures}</div>'


def plural(n: int, noun: str) -> str:
    """A count with its noun: "1 call", "4 calls"."""
    return f"{n:,} {noun}{'s' * (n != 1)}"
