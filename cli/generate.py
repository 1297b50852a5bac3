"""tdm generate: draw pictures or videos from prompts with a student."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import TDMError, first_line
from ..pipelines.students.recipe import MOST_AREA
from ..pipelines.vocabulary import unknown_words
from .common import add_model_arguments, check_strength, load, terminal_line
from .output import check_folder, check_writable, numbered, save_png, save_video

if TYPE_CHECKING:
    from PIL import Image

    from ..pipelines.students.recipe import StudentRecipe

HELP = """\
Draw a picture of each prompt with a TDM student, on exactly the timesteps it was trained on. A student of a video
model writes an .mp4; --out x.gif and x.webp are other kinds.

examples:
  tdm generate "two red stars above a blue moon at night"
  tdm generate "a green heart on the beach" "three yellow rings at sea" --seed 7
  tdm generate --compare "a blue ring in the snow" --out compare.png      teacher next to student, with timings
  tdm generate "a red cube" --model stabilityai/... --student my_student.safetensors
  tdm generate "a red heart at sea" --base-first        more variety from seed to seed, for as many network calls
  tdm generate "a red heart at sea" --model my/fine-tune --student mine.safetensors --strength 0.7
  tdm generate "a red heart at sea" --solver-order 2    the same timesteps and calls, other arithmetic between them
"""


VIDEOS = (".mp4", ".gif", ".webp")
DEFAULT_FOLDER = Path("outputs")


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
    add("--any-size", action="store_true", help=f"draw sizes of more than {MOST_AREA} times the student's area, too")
    add(
        "--out",
        type=Path,
        help="a file, or a folder for several prompts (default: outputs/<prompt>-<seed>.png, numbered if it exists)",
    )
    add(
        "--compare",
        action="store_true",
        help="one sheet: guided teacher next to student; of videos the middle frames",
    )
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


def _check_out(args: argparse.Namespace) -> None:
    """Refuse a place that cannot be written, before the model is loaded."""
    out = args.out or DEFAULT_FOLDER
    if out.suffix.lower() not in (".png", *VIDEOS):
        check_folder(out)
        return
    if len(args.prompts) > 1 and not args.compare:
        raise TDMError(f"--out {out} is one file for {len(args.prompts)} prompts; give a folder")
    check_writable(out, args.force)


def _files(args: argparse.Namespace, suffixes: Sequence[str]) -> list[Path]:
    """The file of each prompt, of one of these kinds; the first is the default. Names of our own are numbered where
    they exist, unless --force replaces them.
    """
    out = args.out or DEFAULT_FOLDER
    if out.suffix.lower() in (".png", *VIDEOS):
        if out.suffix.lower() not in suffixes:
            raise TDMError(f"--out {out}: what is drawn is written as {' or '.join(suffixes)}")
        return [out]
    files: list[Path] = []
    for seed, prompt in enumerate(args.prompts, args.seed):
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "picture"
        file = out / f"{slug}-{seed}{suffixes[0]}"
        files.append(file if args.force else numbered(file))
    return files


def _check_area(args: argparse.Namespace, size: dict[str, int], recipe: StudentRecipe) -> None:
    """Refuse a size far above what the student was made for."""
    if size and not args.any_size and size["width"] * size["height"] > MOST_AREA * recipe.width * recipe.height:
        raise TDMError(
            f"--size {args.size} is more than {MOST_AREA} times the area of {recipe.width}x{recipe.height}, which this "
            "student was made for; --any-size draws it all the same"
        )


def run(args: argparse.Namespace) -> None:
    if args.steps is not None and args.steps < 1:
        raise TDMError(f"--steps must be at least 1, not {args.steps}")
    if not 0 <= args.seed < 2**63:
        raise TDMError(f"--seed must be 0 or more and below 2^63, not {args.seed}")
    if args.strength is not None:
        check_strength(args.strength)
    size = parse_size(args.size)
    _check_out(args)
    terminal_line(
        f"loading {args.model or args.student or 'the bundled model'}; writes to {args.out or DEFAULT_FOLDER}"
    )
    chosen = {"solver_order": args.solver_order} if args.solver_order else {}
    pipe = load(args, **chosen)
    video = pipe.family.video and not args.compare
    files = _files(args, VIDEOS if video else (".png",))
    _check_area(args, size, pipe.recipe)
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
    pipe.set_progress_bar_config(disable=None, leave=False)  # None: there is a bar in a terminal alone
    with pipe.base_first() if args.base_first else contextlib.nullcontext():
        if args.compare:
            _compare(pipe, args, steps, size, files[0])
            return
        for i, (prompt, file) in enumerate(zip(args.prompts, files, strict=True)):
            drawn = _draw(pipe, prompt, args.seed + i, num_inference_steps=steps, **size)
            settings = {"prompt": prompt, "seed": args.seed + i, "steps": steps, **size, **chosen}
            settings |= {"base_first": True} if args.base_first else {}
            settings |= {"strength": args.strength} if args.strength is not None else {}
            if (rate := pipe.family.frames_per_second) is not None:
                save_video(drawn.frames, file, rate, json.dumps(settings))
            else:
                save_png(drawn.image, file, prompt=prompt, tdm=json.dumps(settings))
            shape = f"{drawn.image.width}x{drawn.image.height}" + f", {len(drawn.frames)} frames" * video
            print(f"{file}  {shape}  {_plural(drawn.calls, 'network call')}  {drawn.seconds:.2f} s")


class _Drawn(NamedTuple):
    """What was drawn, one frame if it is a picture, and what it took: samples through the network, and seconds."""

    frames: list[Image.Image]
    calls: int
    seconds: float

    @property
    def image(self) -> Image.Image:
        """The picture, or the middle frame."""
        return self.frames[len(self.frames) // 2]


def _draw(pipe: Any, prompt: str, seed: int, **call: Any) -> _Drawn:
    import torch

    from ..pipelines.calls import count_calls

    begun = time.perf_counter()
    with count_calls(getattr(pipe, pipe.family.denoiser)) as calls:
        try:
            output = pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="pil", **call)
        except TDMError:
            raise
        except ValueError as error:  # what a stock pipeline refuses, such as a size beyond its table of positions
            raise TDMError(f"this model refuses the call: {first_line(error)}") from error
    frames = output.frames[0] if pipe.family.video else output.images
    return _Drawn(frames, calls.samples, time.perf_counter() - begun)


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
    print(f"picture  {file}" + ", the middle frame of each video" * pipe.family.video)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
