"""tdm export: write a run's student as a file, under kohya's names, or merged into its base."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import TDMError
from .common import note_of_kohya, quiet
from .output import check_writable

HELP = """\
Write the student of a run of `tdm distill`, finished or not: from the checkpoint in the run's folder, and with a model
card (README.md) next to it.

  tdm export runs/distill                                  runs/distill/student.safetensors, as at the end of a run
  tdm export runs/distill --format kohya                   the same LoRA under kohya's names: student-kohya.safetensors
  tdm export runs/distill --format merged --dtype fp16     the folder of a pipeline, with the student in its weights
  tdm export runs/distill --which best --out best/student.safetensors

student and kohya do not load the base. All three carry the recipe: `tdm generate --student FILE` (merged: `--model
FOLDER`) samples them as they were trained.
"""
FORMATS = ("student", "kohya", "merged")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tdm export``."""
    add = parser.add_argument
    add("run_folder", metavar="RUN", type=Path, help="folder of the run")
    add("--out", type=Path, help="the file, or for merged the folder (default: in RUN)")
    add("--format", choices=FORMATS, default="student", help="what to write (default student)")
    add(
        "--which",
        choices=("mean", "best", "last"),
        default="mean",
        help="running mean of the weights (default), the mean at its best evaluation, or the last weights",
    )
    add("--dtype", choices=("fp32", "bf16", "fp16"), default="fp32", help="of the stored weights (default fp32)")
    add("--force", action="store_true", help="replace what exists, the model card too")


def run(args: argparse.Namespace) -> None:
    """Run ``tdm export``."""
    import torch

    from ..training.card import write_card
    from ..training.export import NAMES, export, read_run

    quiet()
    trained = read_run(args.run_folder, args.which)
    if trained is None:
        raise TDMError(f"{args.run_folder} distilled no pipeline: there is no student to export")
    out = args.out or args.run_folder / NAMES[args.format]
    if args.format == "merged":
        if out.is_file() or (out.is_dir() and any(out.iterdir()) and not args.force):
            raise TDMError(f"{out} exists; choose another --out, or replace a folder with --force")
    else:
        if out.is_dir() or not out.suffix:  # a folder that exists or will be created
            out = out / NAMES[args.format]
        check_writable(out, args.force)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[args.dtype]
    export(trained, args.format, out, dtype=dtype, force=args.force)
    print(f"{args.format:<8} {out}")
    if args.format == "kohya":
        note_of_kohya(trained.recipe.family)
    print(f"card     {write_card(trained, out, args.format, force=args.force)}")
