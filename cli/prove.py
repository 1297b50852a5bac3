"""tdm prove: the first hour on a card, what no CPU can show, as one table."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from ..errors import TDMError
from .common import quiet, terminal_line
from .output import check_folder

HELP = """\
Run on this machine what was proved on a CPU alone, and write one table of it, with the machine and all versions:

  bench      tdm bench of five models at their native sizes
  presets    for each family and memory class that fits: updates with their seconds and peak memory, against
             tdm estimate; killed (SIGKILL), resumed from an earlier checkpoint, and compared
  cards      two processes against one, with the whole base and with half of it in each (NCCL with two GPUs)
  storage    a short run on a base in nf4, int8, llm_int8, fp8 and in main memory, and a compiled call

A base is a folder of --bases. For each family without one it is random weights in the published shapes; prompts are
then random embeddings. Each row is a line of OUT/prove.jsonl, kept as soon as it is finished, and of the table
OUT/prove.md; OUT/logs has what each run printed. The same command goes on with the rows that are missing. What this
machine cannot do is "not available", with the reason; a row that fails is one line, and the rest goes on. Exit code 1
says that a row failed.

  tdm prove
  tdm prove --bases /models
  tdm prove --only presets --families sdxl,flux --memory 24gb task.height=512 task.width=512
  tdm prove --device cpu --families sd15 task.height=64 task.width=64 --updates 4
"""
UPDATES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tdm prove``."""
    add = parser.add_argument
    add("settings", nargs="*", metavar="key=value", help="settings of every run, as for tdm distill")
    add("--bases", nargs="+", type=Path, default=[], metavar="DIR", help="folders of bases, or folders that hold some")
    add("--families", metavar="NAMES", help="of sdxl, sd3 and so on, with commas (default: all)")
    add("--memory", metavar="CLASSES", help="of 12gb, 16gb, 24gb, node, with commas (default: all)")
    add("--only", metavar="SECTIONS", help="of bench, presets, cards, storage, with commas (default: all)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--updates", type=int, default=UPDATES, help=f"of each run in presets, at least 4 (default {UPDATES})")
    add("--out", type=Path, default=Path("outputs/prove"), help="folder of the results (default outputs/prove)")
    add("--fresh", action="store_true", help="forget the rows that are in --out")
    add("--retry", action="store_true", help="run rows again that failed or were not available")


def run(args: argparse.Namespace) -> int:
    """Run ``tdm prove``; returns the exit code."""
    if args.updates < 4:
        raise TDMError(f"--updates must be at least 4, for a checkpoint to be made twice, not {args.updates}")
    if wrong := [text for text in args.settings if "=" not in text]:
        raise TDMError(f"{wrong[0]} is no setting: they are key=value; --families chooses the presets")
    terminal_line(f"tdm prove: looks at this machine; the table will be {args.out / 'prove.md'}")
    from ..pipelines.families import FAMILY_NAMES
    from ..prove.bases import bases_for
    from ..prove.checks import Workplace
    from ..prove.child import in_child
    from ..prove.jobs import machine
    from ..prove.run import CLASSES, SECTIONS, plan, prove
    from ..training.estimate.estimator import Estimator
    from ..training.folder import held
    from ..training.launcher import launched
    from ..training.settings import load_config

    if launched():
        raise TDMError("tdm prove starts its own processes: run it without torchrun")
    sections, families = _among("--only", args.only, SECTIONS), _among("--families", args.families, FAMILY_NAMES)
    load_config(families[0], args.settings)  # a mistyped setting is refused before anything runs
    classes = _among("--memory", args.memory, CLASSES)
    bases = bases_for(families, args.bases)
    quiet()
    check_folder(args.out)
    folder = args.out.absolute()
    with held(folder):
        here = in_child(machine, args.device, log=folder / "logs" / "machine.log")
        work = Workplace(
            here, args.device or here.kind, folder, args.updates, tuple(args.settings), Estimator(here.kind)
        )
        rows = plan(bases, sections, classes, args.updates, args.settings)
        try:
            lines = prove(rows, work, _command(args), fresh=args.fresh, retry=args.retry)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("stopped; the same command goes on with the rows that are missing") from None
    print((folder / "prove.md").read_text(encoding="utf-8"), end="")
    return int(any(line.result.state == "failed" for line in lines))


def _among(option: str, text: str | None, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names that an option gives with commas; all of them if it is not given."""
    names = tuple(text.split(",")) if text else known
    if unknown := [name for name in names if name not in known]:
        raise TDMError(f"{option} has no {unknown[0]!r}; known: {', '.join(known)}")
    return names


def _command(args: argparse.Namespace) -> str:
    """The command that makes these rows."""
    words = ["tdm", "prove", *args.settings]
    for option in ("families", "memory", "only", "device"):
        if (value := getattr(args, option)) is not None:
            words += [f"--{option}", value]
    if args.bases:
        words += ["--bases", *map(str, args.bases)]
    return shlex.join([*words, "--updates", str(args.updates)])
