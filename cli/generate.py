"""tdm generate: draw pictures from prompts with a student."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import TDMError
from ..pipelines.vocabulary import unknown_words
from .common import add_model_arguments, check_strength, load
from .output import check_writable, save_png

if TYPE_CHECKING:
    from PIL import Image

HELP = """\
Draw a picture of each prompt with a TDM student, on exactly the timesteps it was trained on.

examples:
  tdm generate "two red stars above a blue moon at night"
  tdm generate "a green heart on the beach" "three yellow rings at sea" --seed 7
  tdm generate --compare "a blue ring in the snow" --out compare.png      teacher beside student, with timings
  tdm generate "a red cube" --model stabilityai/... --student my_student.safetensors
  tdm generate "a red heart at sea" --base-first        more variety from seed to seed, for as many network calls
  tdm generate "a red heart at sea" --model my/fine-tune --student mine.safetensors --strength 0.7
  tdm generate "a red heart at sea" --solver-order 2    the same timesteps and calls, other arithmetic between them
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPT", help="what to draw; one picture each")
    add_model_arguments(parser)
    add("--steps", type=int, help="steps of the student (default: as it was trained)")
    add(
        "--solver-order",
        type=int,
        choices=(1, 2),
        help="1 is DDIM (Euler on flow models), 2 DPM-Solver++ 2M on the same timesteps; default: the student's own",
    )
    add(
        "--base-first",
        action="store_true",
        help="the base makes the first step, the student the others: more variety over seeds, less accuracy",
    )
    add("--strength", type=float, help="of the student: less than 1 may suit a fine-tuned base (default 1)")
    add("--seed", type=int, default=0, help="of the first picture; the next ones count up (default 0)")
    add("--size", help="pixels, as 64 or 96x64 (width x height); default: the student's")
    add("--out", type=Path, help="a .png file, or a folder for several prompts (default: outputs/<prompt>-<seed>.png)")
    add("--compare", action="store_true", help="one sheet: the guided teacher beside the student")
    add("--force", action="store_true", help="replace files that exist")


def parse_size(text: str | None) -> dict[str, int]:
    """``--size`` as call arguments; {} leaves the student's own."""
    if text is None:
        return {}
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.lower())
    if match is None or 0 in (width := int(match[1]), height := int(match[2] or match[1])):
        raise TDMError(f"--size {text!r} is not a size; give 64, or 96x64 for width x height")
    if width % 8 or height % 8:
        raise TDMError(f"--size {text}: width and height must be multiples of 8")
    return {"width": width, "height": height}


def _file_for(prompt: str, seed: int, args: argparse.Namespace) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "picture"
    if args.out is None:
        return Path("outputs") / f"{slug}-{seed}.png"
    if args.out.suffix.lower() == ".png":
        if len(args.prompts) > 1 and not args.compare:
            raise TDMError(f"--out {args.out} is one file for {len(args.prompts)} prompts; give a folder")
        return args.out
    return args.out / f"{slug}-{seed}.png"


def run(args: argparse.Namespace) -> None:
    if args.steps is not None and args.steps < 1:
        raise TDMError(f"--steps must be at least 1, not {args.steps}")
    if not 0 <= args.seed < 2**63:
        raise TDMError(f"--seed must be 0 or more and below 2^63, not {args.seed}")
    if args.strength is not None:
        check_strength(args.strength)
    size = parse_size(args.size)
    files = [_file_for(prompt, args.seed + i, args) for i, prompt in enumerate(args.prompts)]
    for file in files[:1] if args.compare else files:
        check_writable(file, args.force)
    chosen = {"solver_order": args.solver_order} if args.solver_order else {}
    pipe = load(args, **chosen)
    if args.strength is not None:
        from ..pipelines.students.adapter import STUDENT_ADAPTER

        pipe.require_unfused()
        pipe.set_adapters(STUDENT_ADAPTER, args.strength)
    for prompt in args.prompts:
        if words := unknown_words(pipe, prompt):
            print(f"note: this model does not know {', '.join(map(repr, words))} and will leave it out")
    steps = args.steps or pipe.recipe.default_steps
    if args.base_first and steps < 2:
        raise TDMError("--base-first needs --steps 2 or more: of one step nothing is left for the student")
    with pipe.base_first() if args.base_first else contextlib.nullcontext():
        if args.compare:
            _compare(pipe, args, steps, size, files[0])
            return
        for i, (prompt, file) in enumerate(zip(args.prompts, files, strict=True)):
            drawn = _draw(pipe, prompt, args.seed + i, num_inference_steps=steps, **size)
            settings = {"prompt": prompt, "seed": args.seed + i, "steps": steps, **size, **chosen}
            settings |= {"base_first": True} if args.base_first else {}
            settings |= {"strength": args.strength} if args.strength is not None else {}
            save_png(drawn.image, file, prompt=prompt, tdm=json.dumps(settings))
            image, calls = drawn.image, _plural(drawn.calls, "network call")
            print(f"{file}  {image.width}x{image.height}  {calls}  {drawn.seconds:.2f} s")


class _Drawn(NamedTuple):
    """A picture, and what it took: samples through the network, and seconds."""

    image: Image.Image
    calls: int
    seconds: float


def _draw(pipe: Any, prompt: str, seed: int, **call: Any) -> _Drawn:
    import torch

    from ..pipelines.calls import count_calls

    begun = time.perf_counter()
    with count_calls(getattr(pipe, pipe.family.denoiser)) as calls:
        image = pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0]
    return _Drawn(image, calls.samples, time.perf_counter() - begun)


def _compare(pipe: Any, args: argparse.Namespace, steps: int, size: dict[str, int], file: Path) -> None:
    from ..sheet import contact_sheet

    students, teachers = [], []
    _draw(pipe, args.prompts[0], 0, num_inference_steps=steps, **size)  # warms up: its time is in neither average
    for i, prompt in enumerate(args.prompts):
        students.append(_draw(pipe, prompt, args.seed + i, num_inference_steps=steps, **size))
        with pipe.teacher():
            teachers.append(_draw(pipe, prompt, args.seed + i, **size))
        print(f"{i + 1}/{len(args.prompts)}  {prompt}", flush=True)
    teacher_steps, guided = pipe.teacher_call.steps, " guided" if pipe.teacher_call.guided else ""
    at = "" if args.strength is None else f" at {args.strength:g}"
    labels = [
        f"teacher\n{teacher_steps}{guided} steps\n{_plural(teachers[0].calls, 'call')}",
        f"student{at}\n{_plural(steps, 'step')}\n{_plural(students[0].calls, 'call')}",
    ]
    rows = [[drawn.image for drawn in row] for row in (teachers, students)]
    save_png(contact_sheet(rows, labels, args.prompts), file)
    seconds = [sum(drawn.seconds for drawn in row) / len(row) for row in (teachers, students)]
    for name, row, mean in zip(("teacher", "student"), (teachers, students), seconds, strict=True):
        print(f"{name}  {row[0].calls:3d} network call{'s' * (row[0].calls != 1)}  {mean:.3f} s per picture")
    print(f"speed-up {seconds[0] / seconds[1]:.1f} x, from the same noise, on this machine")
    print(f"picture  {file}")


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
