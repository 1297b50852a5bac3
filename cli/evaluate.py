"""tdm eval: measure teacher and student on held-out prompts of the bundled world."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import TDMError
from .generate import add_model_arguments, load
from .output import check_folder

HELP = """\
Measure the guided 50-step teacher, the teacher at 4 steps and the student, on prompts that name combinations no
training picture showed. Prints a table and writes eval.json, eval.md and a picture grid.

  accuracy    share of pictures in which everything the prompt says is right, read back from the pixels, with its
              standard error
  distance    to the teacher's pictures of the same prompt: energy distance on random features, with its standard
              error; the teacher's own row is the floor
  diversity   of pictures of one prompt over seeds, over the teacher's
  bright, contrast, saturation    over the teacher's: 1 is equal

The verifier reads the world of the bundled model, so base and student must be of it.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add = parser.add_argument
    add("--prompts", type=int, default=256, help="held-out prompts (default 256)")
    add("--steps", default="1,2,4,8", help="the student's step counts (default 1,2,4,8)")
    add("--out", type=Path, default=Path("outputs/eval"), help="folder (default outputs/eval)")
    add("--force", action="store_true", help="replace results that exist")


def run(args: argparse.Namespace) -> None:
    try:
        steps = [int(text) for text in args.steps.split(",")]
    except ValueError:
        raise TDMError(f"--steps {args.steps!r} is not a list of whole numbers such as 1,2,4,8") from None
    if min(steps) < 1 or args.prompts < 8:
        raise TDMError("--steps must be at least 1 and --prompts at least 8")
    if (args.out / "eval.json").exists() and not args.force:
        raise TDMError(f"{args.out} already holds an evaluation; choose another --out, or replace it with --force")
    check_folder(args.out)
    from ..training.evaluate import evaluate, table, write

    rows, sheet = evaluate(load(args), prompts=args.prompts, student_steps=steps)
    write(rows, sheet, args.out)
    print(table(rows))
    print(f"wrote {args.out}/eval.json, eval.md and grid.png")
