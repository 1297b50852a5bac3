"""tdm average: the mean of several students as one file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import TDMError
from .common import quiet
from .output import check_writable

if TYPE_CHECKING:
    from ..pipelines.students.file import Student

HELP = """\
Write the mean of students of one base and one recipe: of runs with other seeds, or of checkpoints of one run.

  tdm average a.safetensors b.safetensors --out mean.safetensors
  tdm average a.safetensors b.safetensors --weights 3 1 --out mean.safetensors
  tdm average runs/seed0 runs/seed1 runs/seed2 --rank 64 --out mean.safetensors
  tdm average runs/distill/checkpoint-000600.pt runs/distill --out mean.safetensors     (output.keep kept the first)

The mean is that of what the LoRAs add to the weights, B @ A of each layer, which is what a network of averaged weights
would compute. It is exact at the sum of the ranks; a smaller --rank keeps the nearest, and the share of the norm that
is kept is printed. Measure whether a mean is better than its students: tdm eval --student mean.safetensors.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tdm average``."""
    add = parser.add_argument
    add("students", nargs="+", metavar="STUDENT", help="student files, folders of runs, or checkpoints in them")
    add("--weights", nargs="+", type=float, metavar="W", help="one for each student, above 0 (default: all alike)")
    add("--rank", type=int, help="of the mean (default: the largest of the students')")
    add("--out", type=Path, required=True, help="the student file to write")
    add("--force", action="store_true", help="replace it if it exists")


def run(args: argparse.Namespace) -> None:
    """Run ``tdm average``."""
    check_writable(args.out, args.force)
    quiet()
    from ..pipelines.students.average import average
    from ..pipelines.students.file import save_student

    students = [_read(Path(source)) for source in args.students]
    student, kept = average(students, weights=args.weights, rank=args.rank, names=args.students)
    path = save_student(args.out, student, force=args.force)
    rank = max(lora.rank for layers in student.layers.values() for lora in layers.values())
    print(f"student  {path}, rank {rank}")
    print(f"kept     {kept:.2%} of the norm of the exact mean")


def _read(source: Path) -> Student:
    """The student in a file, in a run's folder or in one of its checkpoints."""
    from ..pipelines.students.file import read_student

    if not source.is_dir() and source.suffix != ".pt":
        return read_student(source)
    from ..training.export import read_run

    run = read_run(source)
    if run is None:
        raise TDMError(f"{source} is no run that trained a LoRA on a pipeline: there is no student to average")
    return run.student
