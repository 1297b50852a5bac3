"""What comes out of a run: the student as a file or as a pipeline of its own, and the curves.

All of it is made from the run's folder, at the end of a run and by ``tdm export`` alike; the base is loaded only to be
merged with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import TDMError
from ..pipelines.students.file import MERGED_FILE, Layout, Student, save_student
from ..pipelines.students.recipe import STUDENT_FILE, StudentRecipe
from .checkpoint import read_checkpoint
from .config import DistillConfig
from .from_plain import from_dict
from .objectives import method_of
from .stages import Stage, stage_of_update, stages_of

Which = Literal["mean", "best", "last"]
"""The running mean of the student's weights at the end, the mean at its best evaluation, or the last weights."""

Format = Literal["student", "kohya", "merged"]
NAMES: dict[Format, str] = {"student": STUDENT_FILE, "kohya": "student-kohya.safetensors", "merged": "merged"}


@dataclass(frozen=True)
class FinishedRun:
    """A run as its folder has it.

    Attributes:
        folder: of the run.
        config: of the run.
        step: updates that the weights had.
        recipe: how to sample the student, with notes about its training.
        weights: by the base's own names: ``<layer>.lora_A.weight``, or all of the network (``config.full_weights``).
    """

    folder: Path
    config: DistillConfig
    step: int
    recipe: StudentRecipe
    weights: dict[str, Tensor]

    @property
    def student(self) -> Student:
        """The student that it trained.

        Raises:
            TDMError: it trained whole weights, or an embedding of the step count (see `unexportable`), or it has
                learned nothing yet.
        """
        require_learned(self)
        return student_of(self.config, self.recipe, self.weights)


def student_of(config: DistillConfig, recipe: StudentRecipe, weights: Mapping[str, Tensor]) -> Student:
    """The student of a run's adapter weights, ``<layer>.lora_A.weight`` and ``.lora_B.weight``.

    Raises:
        TDMError: the run trains whole weights, or an embedding of the step count (see `unexportable`).
    """
    if (reason := unexportable(config)) is not None:
        raise TDMError(reason)
    if config.full_weights:
        raise TDMError("this run trained whole weights, which are no LoRA; export it with --format merged")
    return Student.from_state_dict(recipe, weights, alpha=config.student.alpha)


def require_learned(run: FinishedRun) -> None:
    """Raise TDMError if a run's adapters are still those that it began with: the base itself."""
    seconds = [weight for name, weight in run.weights.items() if "lora_B" in name]
    if seconds and not any(bool(weight.any()) for weight in seconds):
        raise TDMError(
            f"the student in {run.folder} is the base itself: after {run.step} updates every lora_B is 0 "
            f"(critic.head_start is {run.config.critic.head_start}); go on with --resume"
        )


def read_run(folder: Path, which: Which = "mean") -> FinishedRun | None:
    """The student in a run's folder; None for a task that is no pipeline.

    Args:
        folder: of the run, for its newest checkpoint; or one of the checkpoints in it.
        which: of the weights there.

    Raises:
        TDMError: no run there, or a checkpoint that cannot be read; for "best" a run that kept none.
    """
    file = folder if folder.suffix == ".pt" else folder / "checkpoint.pt"
    if file != folder and not file.is_file():
        raise TDMError(f"{folder} is not the folder of a run: it has no checkpoint.pt")
    folder, checkpoint = file.parent, read_checkpoint(file)
    config = from_dict(DistillConfig, checkpoint["config"])
    if "recipe" not in checkpoint:
        raise TDMError(f"the checkpoint in {folder} is of an earlier tdm, without a recipe; resume it for some updates")
    if checkpoint["recipe"] is None:
        return None
    step, weights, which_weights = checkpoint["step"], checkpoint["ema"]["weights"], None
    if which == "last":
        weights = checkpoint["adapters"]["student"]
        which_weights = "those of the last update, not their mean"
    elif which == "best":
        if not (folder / "best.pt").is_file():
            raise TDMError(f"{folder} has no best.pt: nothing was evaluated in this run; take --which mean")
        best = read_checkpoint(folder / "best.pt")
        step, weights = best["step"], best["weights"]
        which_weights = f"the best by {best['measure']}, {best['value']:.4g}"
    recipe = _recipe(checkpoint["recipe"], stage_of_update(stages_of(config), checkpoint["step"]).config)
    notes = recipe.notes | training_notes(config, step, which_weights)
    return FinishedRun(folder, config, step, dataclasses.replace(recipe, notes=notes), weights)


def training_notes(config: DistillConfig, step: int, weights: str | None = None) -> dict[str, str]:
    """What a student's recipe says of its training: method, weights (if they are not the mean ones) and updates."""
    stages = stages_of(config)
    last = stage_of_update(stages, step).config
    notes = {"method": method_of(last)}
    if weights is not None:
        notes["weights"] = weights
    notes["training"] = (
        f"{step} updates of {last.batch_size} prompts, seed {config.seed}, "
        f"teacher guidance {last.objective.teacher_guidance}"
    )
    if config.stages:
        notes["stages"] = "; ".join(stage_notes(stages, step))
    return notes


def stage_notes(stages: Sequence[Stage], step: int) -> list[str]:
    """The stages that a run has begun after ``step`` updates, a line each: name, updates done, and method."""
    return [
        f"{stage.name} ({min(step, stage.end) - stage.begin} updates): {method_of(stage.config)}"
        for stage in stages
        if step > stage.begin
    ]


def _recipe(fields: dict[str, Any], config: DistillConfig) -> StudentRecipe:
    """The recipe that a checkpoint keeps; those of an earlier tdm do not say that the noise is fresh."""
    recipe = StudentRecipe.from_fields(fields)
    fresh = config.trajectory.sampler == "stochastic" and recipe.sampler is None
    return dataclasses.replace(recipe, stochastic_sampling=fresh, eta=config.trajectory.eta if fresh else 1.0)


def export(run: FinishedRun, form: Format, out: Path, *, dtype: torch.dtype | None = None, force: bool = False) -> Path:
    """Write the student to ``out`` as a file, as a file with kohya's names, or as a folder, merged into its base."""
    if form == "merged":
        return export_merged(run, out, dtype=dtype, force=force)
    return export_student(run, out, layout="kohya" if form == "kohya" else "diffusers", dtype=dtype, force=force)


def unexportable(config: DistillConfig) -> str | None:
    """Why no student of these settings can be exported, and what to train instead; None if one can."""
    trajectories = [stage.config.trajectory for stage in stages_of(config)]
    if any(trajectory.unify and trajectory.tell_steps == "embedding" for trajectory in trajectories):
        return (
            "this student is told its step count by an embedding, which needs code at inference; to export one, "
            "train it with trajectory.tell_steps=timestep"
        )
    return None


def export_student(
    run: FinishedRun,
    path: Path,
    *,
    layout: Layout = "diffusers",
    dtype: torch.dtype | None = None,
    force: bool = False,
) -> Path:
    """Write the student as one self-describing file; see ``save_student``.

    Raises:
        TDMError: as ``FinishedRun.student`` and ``save_student``.
    """
    return save_student(path, run.student, layout=layout, dtype=dtype, force=force)


def export_merged(run: FinishedRun, folder: Path, *, dtype: torch.dtype | None = None, force: bool = False) -> Path:
    """Write the base with the student in its weights, as a pipeline; see ``TDMPipeline.save_merged``.

    Args:
        dtype: of the weights; None is float32.
        force: replace an existing folder, if it is a merged student.

    Raises:
        TDMError: the base cannot be found any more, the folder exists, `unexportable`, or as ``save_merged``.
    """
    from ..pipelines.tdm_pipeline import TDMPipeline
    from .tasks.base_model import BaseModel

    if force and folder.is_dir() and any(folder.iterdir()) and not (folder / MERGED_FILE).is_file():
        raise TDMError(f"{folder} holds something else than a merged student; choose another folder")
    if (reason := unexportable(run.config)) is not None:
        raise TDMError(reason)
    base = BaseModel.find(run.recipe.base_model, run.config.task.get("loras") or ())
    pipe = base.whole(dtype or torch.float32)
    if run.config.full_weights:
        _replace_weights(getattr(pipe, base.family.denoiser), run)
        merged = TDMPipeline.from_pipe(pipe, student=None, recipe=vars(run.recipe))
    else:
        merged = TDMPipeline.from_pipe(pipe, student=run.student)
    merged.save_merged(folder, force=force)
    return folder


def _replace_weights(network: torch.nn.Module, run: FinishedRun) -> None:
    keys = network.load_state_dict(run.weights, strict=False)  # buffers are not trained, and are the base's
    if keys.unexpected_keys or not set(keys.missing_keys).isdisjoint(dict(network.named_parameters())):
        raise TDMError(f"the weights of {run.folder} are for another network than that of {run.recipe.base_model}")
