"""tdm distill: distil a few-step LoRA student from a teacher, with prompts alone."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

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
  tdm distill task.model=my/base task.prompts=prompts.txt task.loras=[style.safetensors@0.8]

All prompts are encoded first, once, into ~/.cache/tdm/prompts (task.cache names another folder).
The folder gets student.safetensors (the student, ready for `tdm generate --student`), metrics.jsonl, curves.png,
previews/ (teacher above student from fixed seeds) and checkpoint.pt (for --resume).
"""
if TYPE_CHECKING:
    import torch

DEFAULT = Path(__file__).parents[1] / "training" / "configs" / "bundled.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("settings", nargs="*", metavar="CONFIG | key=value", help="a YAML file first, if any, then overrides")
    add("--out", type=Path, default=Path("runs/distill"), help="folder of the run (default runs/distill)")
    add("--resume", action="store_true", help="go on from the run's last checkpoint")
    add("--device", help="where to train, such as cpu or cuda:1 (default: cuda if there is one, else cpu)")


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or not (number or "0").isdecimal():
        raise TDMError(f"--device must be cpu, cuda or cuda:1 and so on, not {name}")
    if kind == "cuda" and int(number or 0) >= (there := torch.cuda.device_count()):
        raise TDMError(f"--device {name}: this machine has {there} GPUs; leave it out for the best there is")
    return torch.device(name)


def run(args: argparse.Namespace) -> None:
    from ..training.config import load_config

    first = args.settings[0] if args.settings else None
    config_file = Path(first) if first is not None and "=" not in first else None
    overrides = args.settings[1:] if config_file is not None else args.settings
    if any("=" not in text for text in overrides):
        raise TDMError(f"one configuration file, then key=value settings; not {' '.join(args.settings)}")
    config = load_config(config_file or DEFAULT, overrides)
    check_folder(args.out)

    from ..training.export import export_student, plot_curves
    from ..training.loop import distill
    from ..training.tasks import build_task

    quiet()
    task = build_task(config.task, config.memory, _device(args.device))
    finished = distill(task, config, args.out, resume=args.resume)
    if curves := plot_curves(args.out):
        print(f"curves   {curves}")
    if previews := sorted((args.out / "previews").glob("*.png")):
        print(f"preview  {previews[-1]}")
    if student := export_student(finished, args.out / "student.safetensors"):
        print(f"student  {student}")
        print(f'try it   tdm generate --compare "a red star above two blue moons at night" --student {student}')
