"""Pictures and figures as HTML: with the pictures inside, so that a run that streams leaves no files behind."""

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
    """One run: its picture so far, and what it took.

    Args:
        name: of who draws.
        frame: None before the first.
        alt: what the picture shows, for those who do not see it.
        waiting: what stands in the place of the picture before the first frame.
    """
    if frame is None:
        shown = f'<div class="blank">{escape(waiting)}</div>'
        figures, done, total = "&nbsp;", 0, 1  # its line is there already, so that nothing moves when they come
    else:
        shown = picture(frame.picture, alt)
        of = "" if frame.final else f" of {frame.total}"
        figures = f"<span><b>{plural(frame.calls, 'call')}</b>{of}</span> <span>{frame.seconds:.2f} s</span>"
        done, total = frame.calls, frame.total
    bar = f'<progress max="{total}" value="{done}" aria-label="{escape(name)}: network calls made"></progress>'
    return (
        f'<figure class="card">{shown}{bar}'
        f"<figcaption><strong>{escape(name)}</strong><div>{figures}</div></figcaption></figure>"
    )


def stage(cards: Sequence[str], said: str = "") -> str:
    """Cards side by side, and a line below that screen readers announce."""
    many = " many" if len(cards) > 4 else ""
    return f'<div class="stage{many}">{"".join(cards)}</div><p class="said" role="status">{escape(said)}</p>'


def table(rows: Sequence[Sequence[str]], head: Sequence[str], side: Sequence[str], said: str, label: str) -> str:
    """A grid of cells, which are HTML already, with labels on two sides."""
    top = "".join(f'<th scope="col">{escape(text)}</th>' for text in head)
    body = "".join(
        f'<tr><th scope="row">{escape(text)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for text, cells in zip(side, rows, strict=True)
    )
    return (
        f'<div class="sheet" tabindex="0" role="region" aria-label="{escape(label)}"><table><thead><tr><td></td>{top}'
        f'</tr></thead><tbody>{body}</tbody></table></div><p class="said" role="status">{escape(said)}</p>'
    )


def strip(pictures: Sequence[str], labels: Sequence[str], said: str) -> str:
    """Pictures one after another, as many a line as there is room for."""
    figures = "".join(
        f"<figure>{shown}<figcaption>{escape(label)}</figcaption></figure>"
        for shown, label in zip(pictures, labels, strict=True)
    )
    return f'<div class="strip">{figures}</div><p class="said" role="status">{escape(said)}</p>'


def plural(n: int, noun: str) -> str:
    """ "1 call", "4 calls"."""
    return f"{n:,} {noun}{'s' * (n != 1)}"
