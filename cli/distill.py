"""tdm distill: distil a few-step LoRA student from a teacher, with prompts alone."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from ..errors import TDMError
from .common import quiet, terminal_line
from .output import check_folder

HELP = """\
Distil a few-step student by Trajectory Distribution Matching: prompts only, no pictures. Student and critic are two
LoRA adapters on the one frozen base; the teacher is the base itself.

CONFIG is a YAML file or the name of a preset (--list shows them); of several, a later one replaces what it sets: a
model family first, then a memory class or an objective. Without one that says what to distil it is the preset of
task.model's family, or else the bundled teacher (some minutes on two CPU cores). Any setting can be given as
key=value; --settings explains each. Out of memory: lower micro_batch_size, then memory.gradient_checkpointing=true,
then a smaller base (memory.base); `tdm estimate` says what a run will take before it starts.

  tdm distill
  tdm distill seed=1 updates=200 --out runs/short
  tdm distill sdxl 24gb task.prompts=prompts.txt student.lr=2e-4 --dry-run
  tdm distill unify --out runs/unified                 one student for 1, 2, 4 and 8 steps
  tdm distill sdxl 24gb start_from=models/sdxl-turbo critic.start=student    from a model that is fast already
  tdm distill my.yaml 12gb
  tdm distill --resume --out runs/short
  torchrun --nproc-per-node 8 -m tdm.cli distill my.yaml
  tdm distill task.model=my/base task.prompts=prompts.txt task.loras=[style.safetensors@0.8]

All prompts are encoded first, once, into ~/.cache/tdm/prompts; the teacher's pictures of previews and evaluations are
drawn once, into ~/.cache/tdm/pictures. task.cache=FOLDER keeps both in FOLDER/prompts and FOLDER/pictures.
The folder gets student.safetensors (the student, ready for `tdm generate --student`) with its model card README.md,
metrics.jsonl and .csv, curves.png, previews/ (teacher, student and the critic's idea from fixed seeds), checkpoint.pt
(for --resume) and best.pt (the student with the best evaluation). Ctrl-C writes a checkpoint and stops. `tdm export`
writes the student in other forms.
"""

HANG_UP = getattr(signal, "SIGHUP", None)  # Windows has none
ADVICE = (
    "out of memory: lower micro_batch_size, then set memory.gradient_checkpointing=true, then a smaller base "
    "(memory.base); the same command with --resume goes on from the last checkpoint, if there is one"
)


EXAMPLE = "a red star above two blue moons at night"  # of the bundled world


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("settings", nargs="*", metavar="CONFIG | key=value", help="YAML files or presets, and settings")
    add("--dry-run", action="store_true", help="check everything, print settings and estimate, train and write nothing")
    add("--list", action="store_true", help="show the presets and do nothing else")
    add(
        "--settings",
        dest="reference",
        nargs="?",
        const="",
        metavar="SECTION",
        help="show every setting, or those of a section, with its default and what it does, and do nothing else",
    )
    add("--out", type=Path, default=Path("runs/distill"), help="folder of the run (default runs/distill)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one; several processes take one each)")
    add("--resume", action="store_true", help="go on from the run's last checkpoint")


@contextlib.contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether Ctrl-C, SIGTERM (a scheduler's notice) or SIGHUP (a closed terminal) asked the
    run to stop.

    The second Ctrl-C or SIGTERM ends it at once, between any two instructions, so without a checkpoint.
    """
    asked = False
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def ask(number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        if number == HANG_UP:
            for descriptor in terminals:  # whatever is written to a terminal that is gone would end the run
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        elif asked:
            raise KeyboardInterrupt("stopped at once; the same command with --resume goes on from the last checkpoint")
        asked = True
        with contextlib.suppress(OSError):  # print is not safe in a signal handler
            os.write(2, b"stopping after this update; press Ctrl-C once more to stop at once\n")

    numbers = [signal.SIGINT, signal.SIGTERM]
    if HANG_UP is not None and signal.getsignal(HANG_UP) != signal.SIG_IGN:  # nohup
        numbers.append(HANG_UP)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(args: argparse.Namespace) -> None:
    if args.list:
        from ..training.presets import presets

        print("\n".join(f"{name:10} {line}" for name, line in presets().items()))
        return
    if args.reference is not None:
        from ..training.reference import settings_reference

        print(settings_reference(args.reference or None))
        return
    if not args.dry_run:
        terminal_line(f"tdm distill: loads {_what(args.settings)}, for {args.out}")
    from ..training.settings import read_settings

    config = read_settings(args.settings)
    if args.dry_run:
        from .dry_run import dry_run

        quiet()
        print(dry_run(config, args.out, resume=args.resume))
        return
    check_folder(args.out)

    from ..training.cost import micro_batches
    from ..training.export import unexportable
    from ..training.folder import check_run, held
    from ..training.loop import distill
    from ..training.processes import joined
    from ..training.progress import print_line, silent
    from ..training.stages import total_updates
    from ..training.tasks import build_task
    from .live import LiveBar

    quiet()
    check_run(args.out, config, resume=args.resume)
    with (
        _advised(),
        joined(args.device) as (processes, device),
        stop_signals() as stop,
        contextlib.ExitStack() as stack,
    ):
        micro_batches(config, processes.size)  # a batch that cannot be shared is refused before the prompts are encoded
        if processes.first:
            stack.enter_context(held(args.out))
        # The first encodes the prompts; the others then find them.
        report = print_line if processes.first else silent
        task = processes.first_alone(lambda: build_task(config.task, config.memory, device, report))
        pipeline = config.task.get("name") == "pipeline"  # the mixture's students are for looking at alone
        if pipeline and (reason := unexportable(config)) is not None:
            report(f"note: there will be nothing to export at the end: {reason}")
        updates = total_updates(config)
        report(f"distils {_what(args.settings)} into {args.out}: {updates} updates; Ctrl-C stops and keeps them")
        with LiveBar(updates, processes.first) as bar:
            finished = distill(
                task,
                config,
                args.out,
                processes=processes,
                resume=args.resume,
                report=bar.report,
                stop=stop,
                on_update=bar.on_update,
            )
        if processes.first:
            if finished.step < updates:
                raise KeyboardInterrupt(
                    f"stopped after update {finished.step}; the same command with --resume goes on from it"
                )
            _finish(args.out)


@contextlib.contextmanager
def _advised() -> Iterator[None]:
    """Out of memory becomes one line that says what to lower.

    Raises:
        TDMError: there was not enough memory.
    """
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise TDMError(ADVICE) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):  # main memory has no exception of its own
            raise
        raise TDMError(ADVICE) from error


def _what(settings: Sequence[str]) -> str:
    """What is distilled, in the words of the command line."""
    return " ".join(settings) or "the bundled teacher"


def _finish(folder: Path) -> None:
    """Draw the curves, export the student with its card, and say where everything is."""
    from ..training.card import write_card
    from ..training.curves import plot_curves
    from ..training.export import NAMES, Format, export, read_run
    from ..training.tasks.prompts import STICKERS, training_prompts

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
        prompts = trained.config.task.get("prompts", STICKERS)
        prompt = EXAMPLE if prompts == STICKERS else training_prompts(prompts, 0)[0]
        load = ["--model" if form == "merged" else "--student", str(student)]
        if form == "student" and trained.config.task.get("loras"):  # `tdm generate` puts no LoRA beside a student
            print(f"try it   {_quoted(['tdm', 'export', str(folder), '--format', 'merged'])}")
            form, load = "merged", ["--model", str(folder / NAMES["merged"])]
        compared = [] if form == "merged" or trained.recipe.num_frames else ["--compare"]  # a video is for watching
        print(f"try it   {_quoted(['tdm', 'generate', prompt, *compared, *load])}")


def _quoted(command: Sequence[str]) -> str:
    """A command as this system's shell reads it."""
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)
