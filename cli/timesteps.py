"""tdm timesteps: the best timesteps for few steps of a student or a teacher."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TDMError
from .common import add_model_arguments, load, quiet
from .output import check_writable

if TYPE_CHECKING:
    from ..pipelines.families import Family
    from ..pipelines.searched_grids import SearchedGrid

HELP = """\
Search the K timesteps on which few steps of a network come closest to many: one run of --levels steps for each prompt
gives the error of every possible step, and dynamic programming the best K of them, for all K at once.

  tdm timesteps                                          the bundled student, prompts of its world
  tdm timesteps --student student.safetensors --prompts prompts.txt --steps 2,3,8 --out searched.safetensors
  tdm timesteps --model bundled --guidance 3 --steps 4,8 the teacher: a base by itself, guided

  predicted   the error that those of the single steps add up to, as a share of the clean latents
  error       how far K steps really end from the run of many, in the same unit

A student knows the timesteps that it was trained on, and was never made to come close to its own run of many steps: the
error does not say what its pictures are worth: at 3 steps the grid with the lesser error drew better pictures of one
bundled student, and worse ones of another. Measure those before you keep a grid (tdm eval, on the bundled world).
For a step count that it was not trained for, the grid to beat is the trained one re-spaced, which it runs on otherwise.
--out writes a copy of the student with the grids that have the lesser error, and a note about each.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tdm timesteps``."""
    add = parser.add_argument
    add_model_arguments(parser)
    add("--steps", default="2,4,8", help="step counts to search for (default 2,4,8)")
    add("--levels", type=int, default=32, help="steps of the run of many, about (default 32)")
    add("--prompts", metavar="FILE", help="text file with one prompt a line (default: the bundled world)")
    add("--count", type=int, default=64, help="how many prompts, each from another noise (default 64)")
    add("--guidance", type=float, help="guidance scale (default: the student's, or the base's as a teacher)")
    add("--out", type=Path, help="student file to write, with the best grids")
    add("--force", action="store_true", help="replace it if it exists")


def run(args: argparse.Namespace) -> None:
    """Run ``tdm timesteps``."""
    try:
        steps = sorted({int(text) for text in args.steps.split(",")})
    except ValueError:
        raise TDMError(f"--steps {args.steps!r} is not a list of whole numbers such as 2,4,8") from None
    if steps[0] < 1 or args.levels < steps[-1] or args.count < 1:
        raise TDMError("--steps and --count must be at least 1, and --levels no less than the largest of --steps")
    teacher = args.model is not None and args.student is None
    if args.out is not None:
        if teacher:
            raise TDMError("--out writes a student file: name one with --student")
        check_writable(args.out, args.force)
    prompts = _prompts(args)

    from tqdm.auto import tqdm

    from ..pipelines.bases import teacher_call
    from ..pipelines.calls import count_calls
    from ..pipelines.searched_grids import search

    pipe, family = _base(args.model) if teacher else _student(args)
    recipe = None if teacher else pipe.recipe
    own = teacher_call(args.model, family, pipe.config) if recipe is None else recipe
    guidance = args.guidance or own.guidance_scale
    with tqdm(total=0, unit=" calls", mininterval=1.0) as bar, count_calls(getattr(pipe, family.denoiser), bar.update):
        grids = search(
            pipe, family, recipe, prompts, steps, levels=args.levels, guidance_scale=guidance, expect=bar.reset
        )
    print(f"{args.model if teacher else args.student or 'bundled'}: {len(prompts)} prompts, guidance {guidance:g}\n")
    print(table(grids))
    better = {k: of["found"].timesteps for k, of in grids.items() if min(of, key=lambda g: of[g].error) == "found"}
    print()
    for k in (k for k in grids if k not in better):
        best = min(grids[k], key=lambda grid: grids[k][grid].error)
        print(f"{k} steps: what was found is not better than the {best} grid; keep that")
    if not teacher:
        print("the error is to the student's own run of many steps, not that of its pictures: measure those (tdm eval)")
    if teacher:
        print(f"to run it: TDMScheduler.from_config(pipe.scheduler.config, trained_timesteps={_rounded(better)})")
    elif args.out is None:
        print(f"to run it: TDMPipeline.from_pretrained(..., recipe={{'trained_timesteps': {_rounded(better)}}})")
    else:
        _write(args, recipe, better)


def table(searched: dict[int, dict[str, SearchedGrid]]) -> str:
    """The grids of each step count, as a Markdown table."""
    lines = ["| steps | grid | predicted | error | timesteps |", "| --- | --- | --- | --- | --- |"]
    for k, grids in searched.items():
        for name, grid in grids.items():
            timesteps = ", ".join(f"{t:.4g}" for t in grid.timesteps)
            lines.append(f"| {k} | {name} | {grid.predicted:.4f} | {grid.error:.4f} | {timesteps} |")
    return "\n".join(lines)


def _rounded(grids: dict[int, list[float]]) -> dict[int, list[float]]:
    return {k: [round(t, 3) for t in grid] for k, grid in grids.items()}


def _prompts(args: argparse.Namespace) -> Sequence[str]:
    from ..training.tasks.prompts import STICKERS, training_prompts

    bundled = args.model in (None, "bundled") and args.student in (None, "bundled")
    if args.prompts is None and not bundled:
        raise TDMError("--prompts is missing: a text file with one prompt a line, such as this model is meant for")
    return training_prompts(args.prompts or STICKERS, args.count)[: args.count]


def _student(args: argparse.Namespace) -> tuple[Any, Family]:
    pipe = load(args)
    if pipe.recipe.sampler is not None:
        raise TDMError(f"this student runs on {pipe.recipe.sampler}; timesteps are searched for those of TDMScheduler")
    if pipe.recipe.stochastic_sampling:
        raise TDMError(
            "this student takes fresh noise at each step; timesteps are searched along one path, which it has not"
        )
    return pipe, pipe.family


def _base(name: str) -> tuple[Any, Family]:
    import torch

    from ..pipelines.bases import base_folder, family_of_base

    quiet()
    folder = base_folder(name)
    family = family_of_base(folder)
    pipe: Any = family.pipeline_class()
    return pipe.from_pretrained(folder, dtype=torch.float32), family


def _write(args: argparse.Namespace, recipe: Any, better: dict[int, list[float]]) -> None:
    """A copy of the student with the grids, its own for the step counts where nothing better was found."""
    from ..pipelines.students.convert import convert_lora
    from ..pipelines.students.file import save_student

    if not better:
        raise TDMError(f"nothing was found that is better than the student's own grids: {args.out} is not written")
    notes = {f"timesteps of K={k}": "searched, not trained" for k in better}
    fields = {
        "trained_timesteps": recipe.trained_timesteps | better,
        "notes": recipe.notes | notes,
        "preferred_steps": recipe.default_steps,
    }
    student = convert_lora(args.student or "bundled", base=args.model, recipe={**vars(recipe), **fields})
    save_student(args.out, student, force=args.force)
    print(f"student  {args.out}, with searched timesteps for {', '.join(map(str, better))} steps")
