"""tdm info: what a LoRA file or a released student is, and how to run it."""

from __future__ import annotations

import argparse

HELP = """\
Say what a file is: its layout, model family, LoRA rank, alpha and scale, the layers it matches, and its recipe (base
model, trained timesteps per step count, guidance, size), if it carries one or is a released student.

  tdm info runs/distill/student.safetensors
  tdm info bundled                                    the model that ships with this package
  tdm info lora.ckpt --base path/to/its/base          match its layers to a base
  tdm info Luo-Yihong/TDM_sd3_lora                    a released student, by its repository id
  tdm info tianweiy/DMD2                              one of another method
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tdm info``."""
    parser.add_argument(
        "file",
        metavar="FILE",
        help="a LoRA file of any layout, a student's folder, bundled, or the id of a released student",
    )
    parser.add_argument("--base", help="folder or hub id of a base to match the layers to (only its configs are read)")


def run(args: argparse.Namespace) -> None:
    """Run ``tdm info``."""
    from ..pipelines.students.describe import about

    print(about(args.file, base=args.base))
