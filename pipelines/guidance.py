"""Guidance of a call: warnings where the student was not made for it, and the negative prompt of its teacher."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

from .families import Family
from .students.recipe import StudentRecipe


def warn_of_guidance(family: Family, recipe: StudentRecipe, call: inspect.BoundArguments, warned: set[Any]) -> None:
    """Warn of a guidance scale other than the student's, and of a negative prompt that has no effect.

    Args:
        family, recipe: of the student.
        call: its arguments, with the defaults filled in.
        warned: what was warned of already; each value is warned of once.
    """
    arguments, trained = call.arguments, family.guidance(recipe.guidance_scale)
    # Flux has two: its network takes the guidance_scale, and true_cfg_scale is classifier-free guidance.
    classifier_free = "true_cfg_scale" if "true_cfg_scale" in call.signature.parameters else "guidance_scale"
    for argument in ("guidance_scale", "true_cfg_scale"):
        scale, right = arguments.get(argument), trained.get(argument, family.no_guidance)
        if not isinstance(scale, int | float) or scale == right or (argument, scale) in warned:
            continue
        if argument == classifier_free and max(scale, right) <= family.no_guidance:
            continue  # both switch it off
        warned.add((argument, scale))
        none = ", which is no guidance" if right == family.no_guidance else ""
        warnings.warn(
            f"this student was made for {argument}={right:g}{none}; {argument}={scale:g} spoils its pictures",
            stacklevel=4,
        )
    scale = arguments.get(classifier_free)
    if isinstance(scale, int | float) and scale > family.no_guidance:
        return
    for argument, value in arguments.items():
        if argument.startswith("negative_") and value is not None and value != "" and argument not in warned:
            warned.add(argument)
            warnings.warn(f"{argument} has no effect: this student was made for no guidance", stacklevel=4)


def negative_prompt_of_teacher(recipe: StudentRecipe, call: Mapping[str, Any]) -> dict[str, Any]:
    """The negative prompt that a student's teacher was run with, by argument of `__call__`.

    Args:
        recipe: of the student.
        call: the arguments of a call by name.

    Returns:
        {} if there is none, or the call names its own.
    """
    text = recipe.teacher_negative_prompt
    if text is None or any(call.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds")):
        return {}
    prompts = call["prompt_embeds"] if call.get("prompt") is None else call["prompt"]
    return {"negative_prompt": text if isinstance(prompts, str) else [text] * len(prompts)}
