"""tdm distill: distil a few-step LoRA student from a teacher, with prompts alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import TDMError
from .generate import quiet
from .output import check_folder

HELP = """\
Distil a few-step student by Trajectory Distribution Matching: prompts only, no pictures. Student and critic are two
LoRA adapters on the one frozen base; the teacher is the base itself.

CONFIG is a YAML file; without it the bundled teacher is distilled (some minutes on two CPU cores). Any setting
can be given as key=value after it; training/config.py explains each. Out of memory: lower micro_batch_size, then
memory.gradient_checkpointing=true, then a smaller base (memory.base).

  tdm distill
  tdm distill seed=1 updates=200 --out runs/short
  tdm distill my.yaml student.lr=1e-4
  tdm distill --resume --out runs/short
  torchrun --nproc-per-node 8 -m tdm.cli distill my.yaml

The folder gets student.safetensors (the student, ready for `tdm generate --student`) with its model card README.md,
metrics.jsonl, curves.png, previews/ (teacher above student from fixed seeds) and checkpoint.pt (for --resume). `tdm
export` writes the student in other forms.
"""
DEFAULT = Path(__file__).parents[1] / "training" / "configs" / "bundled.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("settings", nargs="*", metavar="CONFIG | key=value", help="a YAML file first, if any, then overrides")
    add("--out", type=Path, default=Path("runs/distill"), help="folder of the run (default runs/distill)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one; several processes take one each)")
    add("--resume", action="store_true", help="go on from the run's last checkpoint")


def run(args: argparse.Namespace) -> None:
    from ..training.config import load_config

    first = args.settings[0] if args.settings else None
    config_file = Path(first) if first is not None and "=" not in first else None
    overrides = args.settings[1:] if config_file is not None else args.settings
    if any("=" not in text for text in overrides):
        raise TDMError(f"one configuration file, then key=value settings; not {' '.join(args.settings)}")
    config = load_config(config_file or DEFAULT, overrides)
    check_folder(args.out)

    from ..training.loop import distill
    from ..training.processes import joined
    from ..training.tasks import build_task

    quiet()
    with joined(args.device) as (processes, _device):
        task = build_task(config.task)
        distill(task, config, args.out, processes=processes, resume=args.resume)
        if processes.first:
            _finish(args.out)


def _finish(folder: Path) -> None:
    """Draw the curves, export the student with its card, and say where everything is."""
    from ..training.card import write_card
    from ..training.export import NAMES, Format, export, plot_curves, read_run

    if curves := plot_curves(folder):
        print(f"curves   {curves}")
    if previews := sorted((folder / "previews").glob("*.png")):
        print(f"preview  {previews[-1]}")
    if (trained := read_run(folder)) is not None:
        form: Format = "merged" if trained.config.full_weights else "student"
        # What is there is of this same run, and is replaced.
        student = export(trained, form, folder / NAMES[form], force=True)
        print(f"student  {student}")
        print(f"card     {write_card(trained, student, form, force=True)}")
        load = "--model" if form == "merged" else "--compare --student"
        print(f'try it   tdm generate "a red star above two blue moons at night" {load} {student}')
