"""tdm convert: write a LoRA of any layout as a student file, or a model in one file as a base's folder."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import TDMError
from .common import note_of_kohya, quiet
from .output import check_writable

HELP = """\
Write a LoRA of any layout (diffusers, PEFT, kohya, native names, an EMA list of a released student; .safetensors,
.pt, .bin or .ckpt) as a student file: one .safetensors with every scale baked in, so that it loads at strength 1.0,
and with its recipe in the header, so that it runs right without further settings. Its names are those of diffusers, or
those of kohya with --layout kohya: ComfyUI's own Load LoRA takes an SD1.5 or SDXL student whole only under the latter.

examples:
  tdm convert Luo-Yihong/TDM_sd3_lora --out sd3-student.safetensors            a released student: all is known
  tdm convert lora.safetensors --base stable-diffusion-v1-5/stable-diffusion-v1-5 --out student.safetensors \\
    --recipe trained_timesteps=999,749,500,250 guidance_scale=1 height=512 width=512

Of the base only the small config files are read. `tdm info FILE` says what a file holds and what it lacks.

A whole model in one .safetensors file, such as a fine-tune, becomes the folder of a pipeline, which is a base for all
commands (`tdm distill task.model=my-model`). --base is what it was tuned from, and gives what the file lacks:

  tdm convert my-model.safetensors --base stabilityai/stable-diffusion-xl-base-1.0 --out my-model
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tdm convert``."""
    add = parser.add_argument
    add("file", metavar="FILE", help="a LoRA file, or the repository id of a released student")
    add("--base", help="folder or hub id of its base (default: the one that the file or its preset names)")
    add(
        "--recipe",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="what the file does not say: trained_timesteps=999,749,500,250 (or {4: [...], 1: [...]}), guidance_scale, "
        "height, width, flow_shift, solver_order, num_frames, stochastic_sampling=true (fresh noise at each step), "
        "sampler={scheduler: TCDScheduler, eta: 0.3}",
    )
    add("--layout", choices=("diffusers", "kohya"), default="diffusers", help="the names of the file's tensors")
    add("--out", type=Path, required=True, help="the student file to write (of a whole model: the folder)")
    add("--no-strict", dest="strict", action="store_false", help="leave out what of the LoRA has no place on the base")
    add("--force", action="store_true", help="replace it if it exists")


def run(args: argparse.Namespace) -> None:
    """Run ``tdm convert``."""
    from ..pipelines.single_file import convert_checkpoint, is_checkpoint
    from ..pipelines.students.convert import convert_lora
    from ..pipelines.students.describe import describe
    from ..pipelines.students.file import save_student

    if is_checkpoint(args.file):
        if not args.base or args.recipe or args.layout != "diffusers":
            raise TDMError(
                f"{args.file} is a whole model: pass --base, what it was tuned from, and no --recipe and no --layout"
            )
        if args.out.is_file() or (args.out.is_dir() and any(args.out.iterdir()) and not args.force):
            raise TDMError(f"{args.out} exists; choose another --out, or replace a folder with --force")
        quiet()
        print(f"base     {convert_checkpoint(Path(args.file), args.out, base=args.base, force=args.force)}")
        return
    recipe = parse_recipe(args.recipe)
    check_writable(args.out, args.force)
    student = convert_lora(args.file, base=args.base, recipe=recipe, strict=args.strict)
    print(describe(save_student(args.out, student, layout=args.layout, force=args.force)))
    if args.layout == "kohya":
        note_of_kohya(student.recipe.family)


def parse_recipe(settings: Sequence[str]) -> dict[str, Any]:
    """The fields of ``--recipe``; values are YAML, and timesteps with commas are one grid.

    Raises:
        TDMError: no ``=``, an unknown key (the nearest is named), or a value that is no YAML.
    """
    from ..pipelines.students.recipe import StudentRecipe

    known = [field.name for field in dataclasses.fields(StudentRecipe)]
    recipe: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise TDMError(f"--recipe {setting!r} is not KEY=VALUE, as in height=512")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise TDMError(f"--recipe has no {key!r}; {hint}")
        try:
            recipe[key] = _grid(text) if key == "trained_timesteps" and "{" not in text else yaml.safe_load(text)
        except (yaml.YAMLError, ValueError):
            raise TDMError(f"--recipe {setting!r}: cannot read the value") from None
    return recipe


def _grid(text: str) -> dict[int, list[float]]:
    timesteps = [float(part) for part in text.strip("[]").split(",")]
    return {len(timesteps): timesteps}
