"""The curves of a run: one panel for each value in metrics.jsonl."""

from __future__ import annotations

from pathlib import Path

from ..files import RESUME, replacing
from .log import read_metrics

_NO_CURVES = ("step", "seconds_per_update", "best/step", "stage")


def plot_curves(folder: Path) -> Path | None:
    """``curves.png`` from ``metrics.jsonl``: one panel a measure, or None if the run wrote none. Dashed lines are where
    a new stage begins.
    """
    lines = read_metrics(folder / "metrics.jsonl")
    names = [n for n in dict.fromkeys(key for line in lines for key in line) if n not in _NO_CURVES]
    if not names:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns, boundaries = 4, [line["step"] for line in lines if "stage" in line]
    figure, axes = plt.subplots(
        -(-len(names) // columns), columns, figsize=(4 * columns, 2.6 * -(-len(names) // columns)), squeeze=False
    )
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else None)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
        for step in boundaries:
            axis.axvline(step, color="black", linestyle="--", linewidth=0.8)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.tight_layout()
    path = folder / "curves.png"
    try:
        with replacing(path, remedy=RESUME) as file:
            figure.savefig(file, format="png", dpi=80)
    finally:
        plt.close(figure)
    return path
