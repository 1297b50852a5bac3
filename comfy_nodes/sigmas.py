"""The noise levels of a student, and the MODEL that begins at the first of them."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from comfy_api.latest import io, ui

from ..errors import TDMError
from ..pipelines.schedule import check_grid, first_step, grid_of_steps, grid_pairs, trained_grids
from ..pipelines.students.recipe import StudentRecipe
from .faces import warn
from .levels import cut, levels_of, prediction_type_of, schedule_of, uncut
from .loader import known_family_of
from .sampler import FRESH_NOISE, GUIDANCE
from .students import file_stamp, recipe_of, recipe_of_text, student_names

TYPED = "timesteps below"


class TDMSigmas(io.ComfyNode):
    """The trained timesteps of a student as SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="TDMSigmas",
            display_name="TDM Sigmas",
            category="model/sampling/TDM",
            description="The exact timesteps that a TDM student was trained on. Sample the MODEL it gives: its noise "
            "begins at the first of them.",
            search_aliases=["trajectory distribution matching", "few-step", "timesteps", "scheduler", "distilled"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled, its LoRAs loaded."),
                io.Combo.Input(
                    "student",
                    options=[TYPED, *student_names()],
                    tooltip="Where the timesteps come from: a released student, a student file in models/loras, or "
                    f"'{TYPED}'.",
                ),
                io.String.Input(
                    "timesteps",
                    default="999, 749, 499, 249",
                    tooltip=f"Only with '{TYPED}': from 999 (1000 on flow models) down. On flow models they are 1000 "
                    "times the shifted sigma; no shift is applied to them.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="How many steps; 0 is what the student was trained for. Other counts run between the "
                    "trained timesteps, and look worse.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 for image to image: begins at the trained timestep nearest to this share of the "
                    "schedule, and takes only the steps that follow.",
                ),
                io.String.Input(
                    "recipe",
                    optional=True,
                    force_input=True,
                    tooltip="From Load TDM Student: the timesteps of the student that it loaded, in the place of "
                    "'student' and 'timesteps'.",
                ),
            ],
            has_intermediate_output=True,  # shows its text also when it comes from the cache
            outputs=[
                io.Model.Output(tooltip="The model to sample with these sigmas."),
                io.Sigmas.Output(tooltip="For SamplerCustomAdvanced or SamplerCustom."),
                io.Int.Output("order", tooltip="The sampler order that the student is run with: for TDM Sampler."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, student: str, recipe: str | None = None, **_: Any) -> str:
        """The state of the file that the timesteps come from: they are read again when it was written again."""
        return file_stamp(student) if recipe is None else ""

    @classmethod
    def execute(
        cls, model: Any, student: str, timesteps: str, steps: int, denoise: float, recipe: str | None = None
    ) -> io.NodeOutput:
        """(MODEL, SIGMAS, order).

        Raises:
            TDMError: no timesteps, wrong ones, or a student of another kind of model.
        """
        sampling = uncut(model.get_model_object("model_sampling"))
        schedule = schedule_of(sampling)
        chosen: StudentRecipe | None = None
        if recipe is None and student == TYPED:
            typed = check_grid(_numbers(timesteps), schedule)
            trained, order, by_default = trained_grids(typed, schedule), 1, len(typed)
        else:
            chosen = recipe_of(student) if recipe is None else recipe_of_text(recipe)
            _check_base(chosen, student if recipe is None else "this", model, prediction_type_of(sampling))
            trained = trained_grids(chosen.trained_timesteps, schedule)
            order, by_default = chosen.solver_order, chosen.default_steps
        steps = steps or by_default
        grid, nearest = grid_of_steps(trained, steps, schedule)
        if nearest != steps:
            known = ", ".join(map(str, trained))
            warn(f"The student is trained for {known} steps; {steps} run on the {nearest}-step grid, re-spaced.")
        sigmas = levels_of(schedule, *grid_pairs(schedule, grid))
        patched = model.clone()
        if denoise == 1:
            sampling = cut(sampling, float(sigmas[0]))
        patched.add_object_patch("model_sampling", sampling)
        first = first_step(grid, denoise, schedule)
        sigmas, grid = sigmas[first:], grid[first:]
        for option in (FRESH_NOISE, GUIDANCE):  # of another TDM Sigmas, in front of this one
            patched.model_options.pop(option, None)
        text = f"timesteps {', '.join(f'{t:g}' for t in grid)}"
        if chosen is not None:
            guidance = _guidance(chosen)
            if chosen.stochastic_sampling:
                patched.model_options[FRESH_NOISE] = {"levels": sigmas.tolist(), "eta": chosen.eta}
            if guidance == "CFGGuider":
                patched.model_options[GUIDANCE] = chosen.guidance_scale
            text += f"\n{guidance} with {chosen.guidance_scale:g}" if guidance else "\nno guidance: BasicGuider"
        return io.NodeOutput(patched, sigmas, order, ui=ui.PreviewText(text))


def _guidance(recipe: StudentRecipe) -> str | None:
    """The core node that gives the student its guidance; None if it has none."""
    if recipe.family == "flux":
        return "FluxGuidance"
    return "CFGGuider" if recipe.guidance_scale > 1 else None


def _check_base(recipe: StudentRecipe, student: str, model: Any, predicts: str) -> None:
    """Raise TDMError if a MODEL is not of the student's family, or predicts something else."""
    if recipe.prediction_type != predicts:
        raise TDMError(
            f"{student} is a student of {recipe.base_model}, which predicts {recipe.prediction_type}; this model "
            f"predicts {predicts}: load the student's own base"
        )
    family = known_family_of(model)
    if family is not None and family.name != recipe.family:
        raise TDMError(
            f"{student} is a student of {recipe.base_model} ({recipe.family}); this MODEL is {family.name}: load the "
            "student's own base"
        )


def _numbers(text: str) -> list[float]:
    """Timesteps as people write them: with commas (those of Chinese too), semicolons, spaces or lines between them, and
    with or without brackets around them.

    Raises:
        TDMError: something in it is no number.
    """
    plain = unicodedata.normalize("NFKC", text).strip().removeprefix("[").removesuffix("]")
    try:
        return [float(part) for part in re.split(r"[\s,;\u3001]+", plain) if part]
    except ValueError:
        raise TDMError(f"timesteps must be numbers with commas between them, got {text!r}") from None
