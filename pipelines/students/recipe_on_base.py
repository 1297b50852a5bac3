"""A student's recipe on a base: do the two go together, and which sampler runs them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...errors import TDMError
from ..families import Family
from ..scheduler import TDMScheduler
from .recipe import StudentRecipe


def recipe_on_base(
    base: str, family: Family, config: Mapping[str, Any], fields: Mapping[str, Any]
) -> tuple[StudentRecipe, Any]:
    """(recipe, sampler) of a student's metadata on a base; what the base itself says fills the gaps, or must agree.

    Args:
        base: name or path of the base.
        family: of the base.
        config: of the base's scheduler: the noise schedule that the sampler gets.
        fields: the student's metadata.

    Raises:
        TDMError: see `TDMPipeline.from_pretrained`.
    """
    facts = {
        "base_model": base,
        "family": family.name,
        "prediction_type": TDMScheduler.prediction_type_of(config),
    }
    recipe = StudentRecipe.from_fields({**facts, **fields})
    for name in ("family", "prediction_type"):
        trained, here = getattr(recipe, name), facts[name]
        if trained != here:
            raise TDMError(f"the student was trained for {name} {trained!r}, but the base {base} has {here!r}")
    return recipe, student_scheduler(recipe, config)  # refuses timesteps outside the base's schedule


def student_scheduler(recipe: StudentRecipe, config: Mapping[str, Any]) -> Any:
    """The student's sampler, on the noise schedule of its base's scheduler config."""
    if recipe.sampler is not None:
        return recipe.sampler.on(config, recipe.trained_timesteps)
    shift = {} if recipe.flow_shift is None else {"flow_shift": recipe.flow_shift}
    return TDMScheduler.from_config(
        config,
        trained_timesteps=recipe.trained_timesteps,
        solver_order=recipe.solver_order,
        stochastic_sampling=recipe.stochastic_sampling,
        eta=recipe.eta,
        **shift,
    )
