"""The pictures of good and bad curves: chosen measures of runs, one row a run.

python docs/training/curves.py FOLDER:TITLE... --measures student_loss gap_0 --out curves.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def main() -> None:
    """Draw the figure; a measure that spans more than three powers of ten gets a logarithmic axis."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", metavar="FOLDER:TITLE")
    parser.add_argument("--measures", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    shape = (len(args.runs), len(args.measures))
    figure, axes = plt.subplots(*shape, figsize=(2.7 * shape[1], 1.9 * shape[0]), squeeze=False)
    for row, run in zip(axes, args.runs, strict=True):
        folder, _, title = run.partition(":")
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        for axis, name in zip(row, args.measures, strict=True):
            steps, values = zip(*((line["step"], line[name]) for line in lines if name in line), strict=True)
            axis.plot(steps, values, marker="." if len(steps) < 30 else None)
            if min(values) > 0 and max(values) > 1e3 * min(values):
                axis.set_yscale("log")
            axis.set_title(name, fontsize=9)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.3)
        row[0].set_ylabel(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(args.out, dpi=70)


if __name__ == "__main__":
    main()
