"""The command line: ``tdm app | generate | distill | estimate | export | eval | study | bench | prove | info |
convert | timesteps | average``."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn

from .. import __version__
from ..chatter import hush
from ..errors import NO_STRICT, PartialLoraError, TDMError
from ..training.launcher import launched, leave

DESCRIPTION = """\
TDM: pictures in 4 network calls from a student distilled by Trajectory Distribution Matching.

  tdm generate "two red stars above a blue moon at night"     a picture from the bundled student
  tdm generate --compare "a green heart on the beach"         with its 50-step teacher
  tdm app                                                     the demo, in the browser
  tdm distill                                                 distil a student of the bundled teacher
  tdm estimate sdxl 24gb                                      what a distillation will take, before it starts
  tdm export RUN                                              a run's student as a file, kohya-named or merged
  tdm eval                                                    measure teacher and student
  tdm study                                                   questions about the method, answered by training
  tdm bench                                                   what a call costs beyond its network calls
  tdm prove                                                   the first hour on a card, as one table
  tdm info FILE                                               what a LoRA file or a released student is
  tdm convert FILE --out student.safetensors                  a LoRA of any layout as a student file
  tdm timesteps                                               the best timesteps for 2, 4 and 8 steps
  tdm average FILE FILE --out student.safetensors             the mean of several students
"""


class Parser(argparse.ArgumentParser):
    """One line per error, exit code 2, and the nearest name for an option or a command that does not exist."""

    def error(self, message: str) -> NoReturn:
        raise TDMError(f"{message} (see {self.prog} --help)")

    _intermixed = False

    def parse_known_args(self, args=None, namespace=None):
        # argparse takes positional arguments in one place only: a setting behind an option would be unrecognized.
        positionals = self._get_positional_actions()
        if self._intermixed or not positionals or any(action.nargs == argparse.PARSER for action in positionals):
            namespace, extra = super().parse_known_args(args, namespace)
        else:
            self._intermixed = True
            try:
                namespace, extra = self.parse_known_intermixed_args(args, namespace)
            finally:
                self._intermixed = False
        if self._intermixed:  # it parses twice, and what the first pass leaves is for the second
            return namespace, extra
        for option in (text.split("=")[0] for text in extra if text.startswith("-")):
            near = difflib.get_close_matches(option, list(self._option_string_actions), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            if not near and any(action.dest == "settings" and action.nargs == "*" for action in self._actions):
                hint = f"; settings are key=value, without dashes: {option.lstrip('-')}=..."
            self.error(f"unknown option {option}{hint}")
        return namespace, extra

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.nargs == argparse.PARSER and action.choices is not None and value not in action.choices:
            near = difflib.get_close_matches(str(value), list(action.choices), n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(action.choices)}"
            self.error(f"there is no command {value}; {hint}")
        super()._check_value(action, value)


def build_parser() -> argparse.ArgumentParser:
    from . import (
        app,
        average,
        bench,
        convert,
        distill,
        estimate,
        evaluate,
        export,
        generate,
        info,
        prove,
        study,
        timesteps,
    )

    parser = Parser(
        prog="tdm", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"tdm {__version__}")
    parser.set_defaults(run=lambda _: parser.print_help())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    modules = {
        "app": app,
        "generate": generate,
        "distill": distill,
        "estimate": estimate,
        "export": export,
        "eval": evaluate,
        "study": study,
        "bench": bench,
        "prove": prove,
        "info": info,
        "convert": convert,
        "timesteps": timesteps,
        "average": average,
    }
    for name, module in modules.items():
        assert module.__doc__ is not None
        summary = module.__doc__.splitlines()[0].partition(": ")[2].rstrip(".")
        sub = commands.add_parser(
            name,
            help=summary,
            description=module.HELP,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 if a part of the work failed, 2 for a wrong input, 130 when
    interrupted, 141 when unread.

    One process of several, as a launcher starts them, ends here, and so does the demo (`leave`).
    """
    from .app import drawing

    code = _run(argv)
    if launched() or drawing.is_set():
        leave(code)
    return code


def _run(argv: Sequence[str] | None) -> int:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    hush()
    for stream in (sys.stdout, sys.stderr):  # a name that the console's code page cannot write must not end a run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")  # diffusers' own call of the hub's library
    try:
        args = build_parser().parse_args(argv)
        code = args.run(args) or 0
        sys.stdout.flush()
    except TDMError as error:
        text = f"{error.reason}; {NO_STRICT}" if isinstance(error, PartialLoraError) else str(error)
        print(f"tdm: {' '.join(text.split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"tdm: {stopped}" if str(stopped) else "tdm: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # `tdm ... | head` has seen enough: what is still buffered must not go there when Python ends, either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return code
