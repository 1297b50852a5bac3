"""The noise levels of a student, and the MODEL that begins at the first of them."""

from __future__ import annotations

import logging
import re
from typing import Any

from comfy_api.latest import io

from ..errors import TDMError
from ..pipelines.schedule import check_grid, first_step, grid_of_steps, grid_pairs
from .levels import cut, levels_of, prediction_type_of, schedule_of, uncut
from .sampler import FRESH_NOISE
from .students import recipe_of, recipe_of_text, student_names

TYPED = "timesteps below"


class TDMSigmas(io.ComfyNode):
    """The trained timesteps of a student as SIGMAS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node's inputs and outputs."""
        return io.Schema(
            node_id="TDMSigmas",
            display_name="TDM Sigmas",
            category="sampling/TDM",
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
            outputs=[
                io.Model.Output(tooltip="The model to sample with these sigmas."),
                io.Sigmas.Output(tooltip="For SamplerCustomAdvanced or SamplerCustom."),
                io.Int.Output("order", tooltip="The sampler order that the student is run with: for TDM Sampler."),
            ],
        )

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
        if recipe is None and student == TYPED:
            typed = check_grid(_numbers(timesteps), schedule)
            trained, order, by_default, fresh = {len(typed): typed}, 1, len(typed), False
        else:
            chosen = recipe_of(student) if recipe is None else recipe_of_text(recipe)
            predicts = prediction_type_of(sampling)
            if chosen.prediction_type != predicts:
                raise TDMError(
                    f"{student if recipe is None else 'this'} is a student of {chosen.base_model}, which predicts "
                    f"{chosen.prediction_type}; this model predicts {predicts}: load the student's own base"
                )
            trained, order, by_default = chosen.trained_timesteps, chosen.solver_order, chosen.default_steps
            fresh = chosen.stochastic_sampling
        steps = steps or by_default
        grid, nearest = grid_of_steps(trained, steps, schedule)
        if nearest != steps:
            known = ", ".join(map(str, trained))
            logging.warning(f"TDM Sigmas: trained for {known} steps; {steps} run on the {nearest}-step grid re-spaced")
        sigmas = levels_of(schedule, *grid_pairs(schedule, grid))
        patched = model.clone()
        if denoise == 1:
            sampling = cut(sampling, float(sigmas[0]))
        patched.add_object_patch("model_sampling", sampling)
        sigmas = sigmas[first_step(grid, denoise, schedule) :]
        patched.model_options.pop(FRESH_NOISE, None)  # of another TDM Sigmas, in front of this one
        if fresh:
            patched.model_options[FRESH_NOISE] = sigmas.tolist()
        return io.NodeOutput(patched, sigmas, order)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in re.split(r"[\s,;]+", text.strip()) if part]
    except ValueError:
        raise TDMError(f"timesteps must be numbers with commas between them, got {text!r}") from None
