"""What comes out of a run: the student file and the curves."""

from __future__ import annotations

import json
from pathlib import Path

from ..pipelines.student import StudentRecipe, save_student
from .loop import Run
from .pipeline_task import PipelineTask


def export_student(run: Run, path: Path) -> Path | None:
    """Write the student (its mean weights) as one self-describing file; None for a task that is no pipeline.

    A file that is there is replaced: it is the same run's earlier export.
    """
    task, config = run.task, run.config
    if not isinstance(task, PipelineTask):
        return None
    prefix = task.family.denoiser
    timesteps = run.trajectory.timesteps.tolist()
    recipe = StudentRecipe(
        base_model=task.config.model,
        family=task.family.name,
        prediction_type=task.prediction_type,
        trained_timesteps={len(timesteps): timesteps},
        guidance_scale=task.student_guidance,
        height=task.size.height,
        width=task.size.width,
        num_frames=task.size.num_frames,
        flow_shift=config.trajectory.shift if task.schedule.kind == "flow" else None,
        notes={
            "method": "Trajectory Distribution Matching (arXiv 2503.06674)",
            "training": f"{run.step} updates of {config.batch_size} prompts, seed {config.seed}, "
            f"teacher guidance {config.objective.guidance_scale:g}",
            **({"load_beside": ", ".join(task.merged_loras)} if task.merged_loras else {}),
        },
    )
    weights = {f"{prefix}.{name}": tensor for name, tensor in run.ema.weights.items()}
    save_student(path, weights, recipe, lora_alpha=config.student.alpha, force=True)
    return path


def plot_curves(folder: Path) -> Path | None:
    """``curves.png`` from ``metrics.jsonl``: one panel a measure, or None if the run wrote none."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = [n for n in dict.fromkeys(key for line in lines for key in line) if n not in ("step", "seconds_per_update")]
    if not names:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = 4
    figure, axes = plt.subplots(
        -(-len(names) // columns), columns, figsize=(4 * columns, 2.6 * -(-len(names) // columns)), squeeze=False
    )
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(line["step"], line[name]) for line in lines if name in line]
        axis.plot(*zip(*points, strict=True), marker="." if len(points) < 40 else None)
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    figure.tight_layout()
    path = folder / "curves.png"
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path
