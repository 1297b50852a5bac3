"""Guidance of a call: warnings where the student was not made for it, and the guidance of its teacher."""

from __future__ import annotations

import inspect
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from .families import Family
from .guidance_norm import GuidanceNorm, arguments_of_norm, zero_star
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


def guidance_of_teacher(recipe: StudentRecipe, call: inspect.BoundArguments) -> dict[str, Any]:
    """The negative prompt and the normalisation that a student's teacher was run with, by argument of `__call__`.

    Args:
        recipe: of the student.
        call: its arguments by name.

    Returns:
        What the call does not name itself.
    """
    arguments, known = call.arguments, call.signature.parameters
    taught: dict[str, Any] = {}
    text = recipe.teacher_negative_prompt
    named = any(arguments.get(name) is not None for name in ("negative_prompt", "negative_prompt_embeds"))
    if text is not None and "negative_prompt" in known and not named:
        prompts = arguments["prompt_embeds"] if arguments.get("prompt") is None else arguments["prompt"]
        taught["negative_prompt"] = text if isinstance(prompts, str) else [text] * len(prompts)
    for name, amount in arguments_of_norm(_norm(recipe)).items():
        if name in known and arguments.get(name) is None:
            taught[name] = amount
    return taught


def zero_star_of_teacher(pipe: Any, call: inspect.BoundArguments) -> AbstractContextManager[None]:
    """CFG-Zero* for the length of a `with`, if a student's teacher was guided with it and the call is guided.

    Args:
        pipe: a `TDMPipeline`.
        call: its arguments by name, with the defaults filled in.
    """
    norm, family = _norm(pipe.recipe), pipe.family
    guided = (call.arguments.get(family.guidance_argument) or family.no_guidance) > family.no_guidance
    return zero_star(pipe, family) if guided and norm is not None and norm.name == "zero_star" else nullcontext()


def _norm(recipe: StudentRecipe) -> GuidanceNorm | None:
    return GuidanceNorm.parse(recipe.teacher_guidance_norm) if recipe.teacher_guidance_norm else None
