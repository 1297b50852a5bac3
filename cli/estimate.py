"""tdm estimate: what a distillation will take, before it starts."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from typing import TYPE_CHECKING

from ..errors import TDMError
from .common import quiet

if TYPE_CHECKING:
    from ..training.estimate.estimator import Estimate, Estimator, Gpu

HELP = """\
Print what `tdm distill` with the same arguments will take: network passes and FLOPs of an update, memory by part,
and, for a number of GPUs, whether it fits and how long an update takes. No weight is loaded and no GPU is needed:
the base is built from its configs on the meta device, and one update is run on tensors without data (seconds, for
large bases a minute). The bases that the presets name need not be on this machine: their published configs are
shipped. The line "shapes" says whose were read.

  tdm estimate sdxl 24gb
  tdm estimate sdxl 12gb --gpu rtx3060
  tdm estimate flux node --gpus 8 --gpu h100
  tdm estimate sd3 memory.gradient_checkpointing=true --gpu rtx4090 --batch
  tdm estimate sd15 task.height=512 batch_size=1 --device cpu

With --gpu it says what to lower if it does not fit, and which memory preset would. What is assumed is printed too.
"""

HEAP = (
    "glibc keeps freed memory: a run was seen to take half as much again. With MALLOC_MMAP_THRESHOLD_=131072 in its\n"
    "environment it gives that back, for a third more time"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("settings", nargs="*", metavar="CONFIG | key=value", help="as for tdm distill")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="a GPU (default), or a CPU and its main memory")
    add("--gpu", help="one GPU by name, such as rtx4090, instead of the table")
    add("--gpus", type=int, default=1, metavar="N", help="how many of them share a batch (default 1)")
    add("--batch", action="store_true", help="with --gpu: find the largest micro_batch_size that fits")
    add("--json", action="store_true", help="print the numbers as JSON")


def run(args: argparse.Namespace) -> None:
    from ..training.estimate.estimator import Estimator
    from ..training.settings import read_settings

    if args.gpus < 1:
        raise TDMError(f"--gpus must be at least 1, not {args.gpus}")
    if args.batch and args.gpu is None:
        raise TDMError("--batch needs a --gpu to fit into")
    if args.device == "cpu" and (args.gpu is not None or args.gpus > 1):
        raise TDMError("--gpu and --gpus are for GPUs; leave them out with --device cpu")
    gpu = None if args.gpu is None else _gpu(args.gpu)
    quiet()
    estimator = Estimator(args.device)
    estimate = estimator(read_settings(args.settings), args.gpus)
    if args.json:
        print(json.dumps(_plain(estimate), indent=2))
        return
    print(table(estimate, [gpu] if gpu else None))
    if gpu is not None and not estimate.fits(gpu):
        print(advice(estimator, estimate, gpu))
    if gpu is not None and args.batch:
        print(_batch(estimator, estimate, gpu))


def _gpu(name: str) -> Gpu:
    from ..training.estimate.estimator import GPUS

    if name.lower() not in GPUS:
        near = difflib.get_close_matches(name.lower(), list(GPUS), n=1)
        raise TDMError(f"unknown GPU {name}; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(GPUS)}"))
    return GPUS[name.lower()]


def table(estimate: Estimate, gpus: list[Gpu] | None = None) -> str:
    """An estimate for people; ``gpus`` are the rows at its end, None all that are known, and none for a CPU."""
    from ..training.cost import micro_batch_size
    from ..training.estimate.estimator import GIB, GPUS

    c, p, f = estimate.config, estimate.passes, estimate.flops
    trained = estimate.trained
    kind = "full weights" if c.full_weights else f"LoRA of rank {c.student.rank} and {c.critic.rank}"
    details = {
        "base": f"{'spread or offloaded, ' * (c.memory.shard or c.memory.offload)}"
        f"{c.memory.base if c.memory.base != 'auto' else 'bf16' if estimate.device == 'cuda' else 'fp32'}",
        "adapters": "student, critic and the student's mean, float32",
        "optimisers": c.memory.optimizer,
        "update": f"activations, gradients and workspace, {micro_batch_size(c, estimate.processes)} samples at a time"
        + (", gradient checkpointing" if c.memory.gradient_checkpointing else ""),
        "context": "CUDA and its libraries, assumed" if estimate.device == "cuda" else "Python and its libraries",
    }
    lines = [
        f"base         {c.task['model']}, {estimate.parameters / 1e9:.3f} B parameters",
        f"shapes       {estimate.shapes}",
        f"trained      {trained['student'] / 1e6:.1f} M student, {trained['critic'] / 1e6:.1f} M critic ({kind})",
        f"passes       {p.forwards:g} forwards, {p.backwards} backwards: prefix {p.prefix:g}, student {p.student}, "
        f"critic {p.critic}, teacher {p.teacher}, critic again {p.score}",
        f"FLOPs        student forward {_flops(f['student'])}, backward {_flops(f['student_backward'])}; "
        f"an update of {estimate.batch_size} samples {_flops(estimate.flops_per_update)}",
        "memory, GiB" + (" on each device" if estimate.processes > 1 else ""),
        *(f"  {part:10} {size / GIB:7.2f}  {details[part]}" for part, size in estimate.memory.items()),
        f"  {'total':10} {estimate.total / GIB:7.2f}  and up to {estimate.prompt / 1e6:.2f} MB of main memory a prompt",
        f"  {'encoding':10} {estimate.encoding / GIB:7.2f}  before that, while prompts are encoded: the text encoders",
        *_stages(estimate),
    ]
    if estimate.device == "cpu":
        return "\n".join([*lines, HEAP])
    return "\n".join([*lines, *_gpus(estimate, gpus or list(GPUS.values()))])


def _gpus(estimate: Estimate, gpus: list[Gpu]) -> list[str]:
    """A line a GPU: whether it has room, and the time; and what is assumed."""
    from ..training.estimate.estimator import CONTEXT, GIB, USABLE, UTILISATION
    from ..training.stages import total_updates

    lines = [f"{'GPU':12} {'GiB':>4}  fits  s per update    hours for {total_updates(estimate.config)} updates"]
    for gpu in gpus:
        least, most = estimate.seconds(gpu)
        shortest, longest = (seconds / 3600 for seconds in estimate.run_seconds(gpu))
        lines.append(
            f"  {gpu.name:10} {gpu.memory:4g}  {'yes' if estimate.fits(gpu) else 'no':4}  "
            f"{f'{least:.3g} to {most:.3g}':14}  {shortest:.3g} to {longest:.3g}"
        )
    lines.append(
        f"assumed: {UTILISATION[0]:.0%} to {UTILISATION[1]:.0%} of a GPU's peak, {USABLE:.0%} of its memory usable, "
        f"{CONTEXT['cuda'] / GIB:g} GiB for CUDA; not checked against measurements on GPUs yet"
    )
    return lines


def _stages(estimate: Estimate) -> list[str]:
    """A line a stage: its share of the run's work."""
    if not estimate.stages:
        return []
    rows = [
        f"  {name:28} {updates:6} updates  {_flops(of.run_flops):>12}  {of.run_flops / estimate.run_flops:4.0%} of the "
        f"work, {of.total / 2**30:.2f} GiB"
        for name, updates, of in estimate.stages
    ]
    return ["stages       all above is of the one that takes most memory", *rows]


def _flops(count: float) -> str:
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if count >= unit:
            return f"{count / unit:.3g} {name}FLOP"
    return f"{count / 1e6:.3g} MFLOP"


def advice(estimator: Estimator, estimate: Estimate, gpu: Gpu) -> str:
    """A line that says why a configuration does not fit a GPU, and what to do."""
    from ..training.estimate.estimator import GIB, USABLE, presets_that_fit, what_to_lower

    if estimate.encoding > USABLE * gpu.memory * GIB:
        return (
            f"does not fit {gpu.name}: the text encoders take {estimate.encoders / GIB:.2f} GiB while prompts are "
            "encoded; encode on a larger GPU and bring its task.cache"
        )
    lower = what_to_lower(estimator, estimate.config, gpu, estimate.processes)
    fitting = presets_that_fit(estimator, estimate.config, gpu, estimate.processes)
    smaller = f"it would with {' '.join(lower)}" if lower else "nothing that can be lowered is enough"
    return f"does not fit {gpu.name}; {smaller}; presets that fit: {', '.join(fitting) or 'none'}"


def _batch(estimator: Estimator, estimate: Estimate, gpu: Gpu) -> str:
    from ..training.estimate.estimator import largest_micro_batch

    micro = largest_micro_batch(estimator, estimate.config, gpu, estimate.processes)
    return f"largest micro_batch_size that fits {gpu.name}: {micro or 'none'}"


def _plain(estimate: Estimate) -> dict[str, object]:
    fields = {f.name: getattr(estimate, f.name) for f in dataclasses.fields(estimate) if f.name != "config"}
    fields["passes"] = dataclasses.asdict(estimate.passes)
    return fields | {"total": estimate.total, "flops_per_update": estimate.flops_per_update}
