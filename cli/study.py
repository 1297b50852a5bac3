"""tdm study: questions about the method, answered by training."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path

from ..errors import TDMError
from ..files import replacing
from .common import quiet
from .distill import stop_signals
from .output import check_folder

HELP = """\
Questions about the method: variants of one distillation, trained with several seeds on equal budgets and compared.
Without a name it shows the questions that ship, and how far each is answered.

  tdm study
  tdm study baselines-mixture                     train what is missing, then write table and plot
  tdm study baselines-mixture --only TDM SiD      these variants alone; another process may take the others
  tdm study baselines-mixture --seeds 1 2         these seeds alone
  tdm study baselines-mixture --report            no training: table and plot of what is there
  tdm study my-question.yaml                      your question: training/studies/questions has examples

Each run is a line of results (--results), kept as soon as it ends, so that a stopped study goes on where it was. Ctrl-C
ends it after the current update; the unfinished run stays in the cache and is resumed next time.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tdm study``."""
    add = parser.add_argument
    add("name", nargs="?", help="a question, by its name or as a YAML file")
    add("--only", nargs="+", default=[], metavar="VARIANT", help="train these variants alone")
    add("--seeds", nargs="+", type=int, default=[], metavar="SEED", help="train these seeds alone")
    add("--report", action="store_true", help="train nothing")
    add(
        "--steps", type=int, metavar="K", help="table and plot at K steps: of unified students, and of those of K alone"
    )
    add("--results", type=Path, help="file of the runs (default: training/studies/results/NAME.jsonl)")
    add("--out", type=Path, default=Path("outputs/study"), help="folder of table and plot (default outputs/study)")


def run(args: argparse.Namespace) -> None:
    """Answer a question, or list them."""
    from ..training.studies.question import load_question, questions
    from ..training.studies.report import at_steps, grid, of_further, plot, table
    from ..training.studies.runs import answer, read_runs, results_file, valid_runs

    if args.name is None:
        for name in questions():
            question = load_question(name)
            done = len(valid_runs(question, read_runs(results_file(question))))
            print(f"{name:24} {done - 2 if done else 0:3} of {len(question.runs()):3} runs  {question.asks}")
        return
    question = load_question(args.name)
    path = args.results or results_file(question)
    check_folder(args.out)
    stopped = False
    if not args.report:
        quiet()
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(stop_signals())
            answer(question, path, only=args.only, seeds=args.seeds, stop=stop)
            stopped = stop()
    runs = valid_runs(question, read_runs(path))
    if not runs:
        raise TDMError(f"no run of {question.name} is in {path}; train some: tdm study {args.name}")
    if args.steps is not None:
        question, runs = at_steps(question, runs, args.steps)
    measures = [(question, runs)]
    if args.steps is None:
        measures += [of_further(question, runs, name) for name in question.further]
    for question_of, measured in measures:
        if not measured:  # runs that are older than the measure
            print(f"no run has {question_of.measure}; tdm study {args.name} --results NEW.jsonl trains them again")
            continue
        text = table(question_of, measured)
        with replacing(args.out / f"{question_of.name}.md") as file:
            file.write(f"{question.asks}\n\n{text}\n".encode())
        plot(question_of, measured, args.out / f"{question_of.name}.png")
        print(text)
        print(f"wrote {args.out / question_of.name}.md and .png")
    if grid(question, path, args.out / f"{question.name}-grid.png"):
        print(f"wrote {args.out / question.name}-grid.png: what each variant draws")
    if stopped:
        raise KeyboardInterrupt(f"stopped; tdm study {args.name} goes on where it was")
