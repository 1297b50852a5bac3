"""Curves of a run as small SVGs with axes, which follow the page's colours."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 240, 80
LOWER, HIGHER, NEAR_ONE = "lower is better", "higher is better", "near 1 is best"
# The measures that are shown, by the beginning of their names, and which way is good. training/README.md explains them.
MEANING = {
    "critic_loss": "should stay level",
    "student_loss": "has no good direction",
    "std_ratio": "should settle",
    "gap_": "lower is better, below 2",
    "eval/accuracy": HIGHER,
    "eval/clip": HIGHER,
    "eval/hpsv2": HIGHER,
    "eval/image_reward": HIGHER,
    "eval/frechet": LOWER,
    "eval/sliced_wasserstein": LOWER,
    "eval/distance": LOWER,
    "eval/ode": LOWER,
    "eval/fid": LOWER,
    "eval/sharpness": NEAR_ONE,
    "eval/": "",
    "health/": NEAR_ONE,
}


def curves(lines: Sequence[dict[str, float]]) -> str:
    """One small panel for each measure in the lines of metrics.jsonl, with the update as its horizontal axis."""
    names = [n for n in dict.fromkeys(key for line in lines for key in line) if n.startswith(tuple(MEANING))]
    return f'<div class="curves">{"".join(_panel(name, lines) for name in sorted(names, key=_order))}</div>'


def _start(name: str) -> str:
    return next(start for start in MEANING if name.startswith(start))


def _order(name: str) -> tuple[int, str]:
    return list(MEANING).index(_start(name)), name


def _panel(name: str, lines: Sequence[dict[str, float]]) -> str:
    points = [(line["step"], line[name]) for line in lines if name in line]
    (first, last), values = (points[0][0], points[-1][0]), [value for _, value in points]
    low, high = min(values), max(values)
    path = " ".join(
        f"{(step - first) / max(last - first, 1) * WIDTH:.1f},"
        f"{HEIGHT - 4 - ((value - low) / (high - low) if high > low else 0.5) * (HEIGHT - 8):.1f}"
        for step, value in points
    )
    path = path if len(points) > 1 else f"{path} {path}"  # its round ends are a dot
    meaning = MEANING[_start(name)]
    summary = f"{name}: {values[-1]:.3g} at update {last:.0f}, between {low:.3g} and {high:.3g}; {meaning}"
    bottom = f"<span>{low:.3g}</span>" if high > low else ""  # a level curve has one value
    return (
        f"<figure><figcaption>{escape(name)} <b>{values[-1]:.3g}</b><div>{escape(meaning)}</div></figcaption>"
        f'<div class="plot"><div class="y" aria-hidden="true"><span>{high:.3g}</span>{bottom}</div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(summary)}" '
        f'preserveAspectRatio="none"><polyline points="{path}"/></svg>'
        f'<div class="x" aria-hidden="true"><span>update {first:.0f}</span><span>{last:.0f}</span></div></div></figure>'
    )
