"""Curves of a run as small SVGs, which follow the page's colours."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 240, 80
# The measures that are shown, of those that a run writes; training/log.py has their meaning.
SHOWN = ("critic_loss", "student_loss", "std_ratio", "gap_", "eval/", "health/")


def curves(lines: Sequence[dict[str, float]]) -> str:
    """One small panel a measure."""
    names = [n for n in dict.fromkeys(key for line in lines for key in line) if n.startswith(SHOWN)]
    return f'<div class="curves">{"".join(_panel(name, lines) for name in sorted(names, key=_order))}</div>'


def _order(name: str) -> tuple[int, str]:
    return next(i for i, start in enumerate(SHOWN) if name.startswith(start)), name


def _panel(name: str, lines: Sequence[dict[str, float]]) -> str:
    points = [(line["step"], line[name]) for line in lines if name in line]
    (first, last), values = (points[0][0], points[-1][0]), [value for _, value in points]
    low, high = min(values), max(values)
    path = " ".join(
        f"{(step - first) / max(last - first, 1) * WIDTH:.1f},"
        f"{HEIGHT - 4 - (value - low) / ((high - low) or 1) * (HEIGHT - 8):.1f}"
        for step, value in points
    )
    path = path if len(points) > 1 else f"{path} {path}"  # its round ends are a dot
    said = f"{name}: {values[-1]:.3g} at update {last:.0f}, between {low:.3g} and {high:.3g}"
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(said)}" '
        f'preserveAspectRatio="none"><polyline points="{path}"/></svg>'
        f"<figcaption>{escape(name)} <b>{values[-1]:.3g}</b></figcaption></figure>"
    )
