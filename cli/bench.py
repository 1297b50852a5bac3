"""tdm bench: what a call of TDMPipeline costs beyond its network calls."""

from __future__ import annotations

import argparse

from ..errors import TDMError
from .common import quiet

HELP = """\
Compare, on the same weights and in turns: the call of TDMPipeline, the call of the stock pipeline with its own
scheduler and the same settings, and the bare network calls with nothing between them. Prints a markdown table.

  s, over bare     median seconds of a call (of processor time on a CPU, which other work adds little to), and the
                   median ratio to the bare networks in the same round
  peak MB          memory beyond the weights: of the device, or on a CPU of the tensors that operators created
  in steps         exact counts for scheduler.step over one call: operators; those that only copy or cast; those whose
                   value the host waits for; those that allocate
  other operators  in neither a network nor a step

examples:
  tdm bench                               the bundled model; with a GPU also SDXL, SD3, PixArt and CogVideoX-2B, full
                                          size, random weights and prompt embeddings
  tdm bench --models sdxl --compile       one of them, denoiser compiled
  tdm bench --models sdxl,sd3 --tiny      a trial of the same code on any machine
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``tdm bench``."""
    add = parser.add_argument
    add("--models", help="of bundled, sdxl, sd3, pixart, cogvideox (default: bundled; all if there is a GPU)")
    add("--tiny", action="store_true", help="small variants of the four architectures")
    add("--compile", action="store_true", help="the denoiser compiled in all three runs")
    add("--steps", type=int, default=4, help="network calls (default 4)")
    add("--repeats", type=int, default=9, help="rounds that are timed, after one that is not (default 9)")


def run(args: argparse.Namespace) -> None:
    """Run ``tdm bench``."""
    if args.steps < 1 or args.repeats < 1:
        raise TDMError("--steps and --repeats must be at least 1")
    import diffusers
    import torch

    from ..bench.machine import processor
    from ..bench.measure import HEADER, measure
    from ..bench.models import MODELS, build, check_steps

    known = ["bundled", *MODELS]
    gpu = torch.cuda.is_available()
    names = args.models.split(",") if args.models else known if gpu else known[:1]
    if unknown := [name for name in names if name not in known]:
        raise TDMError(f"--models has no {unknown[0]!r}; known: {', '.join(known)}")
    for name in names:
        check_steps(name, args.steps)
    quiet()
    device, dtype = torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32
    where = torch.cuda.get_device_name() if gpu else f"{processor()}, {torch.get_num_threads()} threads"
    flags = "".join(f" --{flag}" for flag in ("tiny", "compile") if getattr(args, flag))
    print(
        f"`tdm bench --models {','.join(names)}{flags} --steps {args.steps} --repeats {args.repeats}` on {where}; "
        f"torch {torch.__version__}, diffusers {diffusers.__version__}, {str(dtype).removeprefix('torch.')}\n"
    )
    print(HEADER)
    for name in names:
        pipe, call = build(name, tiny=args.tiny, device=device, dtype=dtype, steps=args.steps)
        measured = measure(pipe, call, repeats=args.repeats, device=device, compiled=args.compile)
        print("\n".join(cost.row(name, run) for run, cost in measured.items()), flush=True)
        del pipe
