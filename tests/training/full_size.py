"""Distil a published base at its full size on the CPU, with random weights, and measure it against `tdm estimate`.

python -m tdm.tests.training.full_size sd15 sdxl --out runs/full-size     (make proof-cpu)

For each base: its published configs, random weights in bf16, tokenizers of the real classes with a vocabulary of bytes.
It is distilled for two updates with adapters of rank 16, one sample each, in a process of its own. The student is
exported, loaded with `TDMPipeline`, and draws. Printed are the peak resident memory and the estimate's, the passes that
ran and those that `training/cost.py` counts, and the seconds of the processor by part of an update. SDXL needs 9 GB of
main memory and 7 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tdm.pipelines.base_weights import component_classes
from tdm.pipelines.outlines import network_without_weights, published_bases
from tdm.pipelines.students.recipe import STUDENT_FILE
from tdm.tests.tiny import clip_tokenizer
from torch import Tensor

PROMPTS = ("a red cube on a table", "a blue ball in the snow", "three green stones", "a house by the sea")
SIZE = 512
UPDATES = 2


# ---------------------------------------------------------------------- a base with random weights


@torch.no_grad()
def random_network(library: str, name: str, folder: Path, component: str) -> Any:
    """A component of a base in bf16 on the CPU. Matrices are drawn with a deviation of 1 / sqrt(inputs), vectors are 1
    for scales and 0 for shifts, so that activations keep about their size.
    """
    network = network_without_weights(library, name, str(folder), component, {}).to(torch.bfloat16)
    network = network.to_empty(device="cpu")
    for key, weight in network.named_parameters():
        if weight.ndim > 1:
            weight.normal_(0.0, 1 / math.sqrt(weight[0].numel()))
        else:
            weight.fill_(float(key.endswith("weight")))
    return network


def write_random_base(family: str, folder: Path) -> None:
    """The folder of a base of the family's published shapes, one network in memory at a time."""
    torch.manual_seed(0)
    shapes = published_bases()[family]
    index = json.loads((shapes / "model_index.json").read_text(encoding="utf-8"))
    shutil.copytree(shapes, folder)
    for component, entry in component_classes(index).items():
        if component == "scheduler":
            continue
        random_network(*entry, shapes, component).save_pretrained(folder / component)
        if component.startswith("text_encoder"):
            tokenizer = component.replace("text_encoder", "tokenizer")
            clip_tokenizer(77).save_pretrained(folder / tokenizer)
            index[tokenizer] = ["transformers", "CLIPTokenizer"]
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")


# ---------------------------------------------------------------------- two updates, watched


class Watch:
    """Seconds of the processor and samples of each part of an update: the roles' predictions, backward passes and
    optimisers of one run. A prediction without a gradient is the student's roll-out or the critic's score.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.samples: Counter[str] = Counter()

    def _timed(self, part: str, call: Callable[[], Any]) -> Any:
        start = time.process_time()
        out = call()
        self.seconds[part] += time.process_time() - start
        return out

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, every update is watched."""
        from tdm.training.roles import Roles
        from torch.optim import AdamW

        originals = [(Roles, "_predict"), (Tensor, "backward"), (AdamW, "step")]
        before = {(owner, name): getattr(owner, name) for owner, name in originals}
        predict, backward, step = before.values()
        watch = self

        def predicting(roles: Any, role: str | None, x: Tensor, timesteps: Tensor, cond: Any) -> Any:
            graph = torch.is_grad_enabled()
            part = {"student": ("roll-out", "student"), "critic": ("score", "critic")}.get(role or "", ("teacher",) * 2)
            watch.samples[part[graph]] += len(x)
            return watch._timed(part[graph], lambda: predict(roles, role, x, timesteps, cond))

        def going_back(loss: Tensor, *args: Any, **kwargs: Any) -> Any:
            return watch._timed("backward", lambda: backward(loss, *args, **kwargs))

        def stepping(optimizer: Any, *args: Any, **kwargs: Any) -> Any:
            return watch._timed("optimiser", lambda: step(optimizer, *args, **kwargs))

        Roles._predict, Tensor.backward, AdamW.step = predicting, going_back, stepping  # type: ignore[method-assign]
        try:
            yield
        finally:
            for (owner, name), original in before.items():
                setattr(owner, name, original)


def settings(base: Path, folder: Path, *more: str) -> list[str]:
    """The run's settings, as `tdm distill` and `tdm estimate` take them."""
    return [
        f"task.model={base}", f"task.prompts={folder / 'prompts.txt'}", f"task.cache={folder / 'cache'}",
        f"task.height={SIZE}", f"task.width={SIZE}", f"updates={UPDATES}", "batch_size=1", "memory.base=bf16",
        "memory.gradient_checkpointing=true", "student.rank=16", "critic.rank=16", "output.preview_every=0",
        "output.evaluate_every=0", "output.log_every=1", *more,
    ]  # fmt: skip


def run(family: str, folder: Path, more: list[str]) -> dict[str, Any]:
    """Two updates of a base, in this process: what they took."""
    from tdm.training.loop import distill
    from tdm.training.settings import load_config
    from tdm.training.tasks import build_task

    config = load_config(family, settings(folder / "base", folder, *more))
    watch = Watch()
    task = build_task(config.task, config.memory, "cpu")
    loaded = _peak()
    with watch.watching():
        ends = [_clocks()]
        distill(task, config, folder / "run", on_update=lambda _: ends.append(_clocks()))
    return {
        "loaded": loaded,
        "peak": _peak(),
        "seconds": [now[0] - before[0] for before, now in pairwise(ends)],
        "wall": [now[1] - before[1] for before, now in pairwise(ends)],
        "parts": {part: seconds / UPDATES for part, seconds in watch.seconds.items()},
        "passes": {part: samples / (UPDATES * config.batch_size) for part, samples in watch.samples.items()},
    }


def _clocks() -> tuple[float, float]:
    """Seconds of the processor that this process has used, and seconds of the wall."""
    return time.process_time(), time.perf_counter()


def _peak() -> int:
    """The most bytes that this process has had in main memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def draw(folder: Path) -> dict[str, Any]:
    """One picture of the exported student, as `TDMPipeline` draws it."""
    from tdm import TDMPipeline
    from tdm.pipelines.students.file import read_student

    file = folder / "run" / STUDENT_FILE
    pipe = TDMPipeline.from_pretrained(folder / "base", student=file, dtype=torch.bfloat16)
    start, calls = time.process_time(), []
    pipe.denoiser.register_forward_hook(lambda *_: calls.append(1))
    image = pipe(PROMPTS[0], generator=torch.Generator().manual_seed(0)).images[0]
    layers = sum(map(len, read_student(file).layers.values()))
    return {"layers": layers, "calls": len(calls), "size": image.size, "seconds": time.process_time() - start}


# ---------------------------------------------------------------------- all of it


def measure(family: str, folder: Path, more: list[str]) -> str:
    """Everything of one base, as lines of a report."""
    from tdm.cli import main as tdm
    from tdm.training.cost import passes
    from tdm.training.estimate.estimator import GIB, Estimator
    from tdm.training.settings import load_config

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    if not (folder / "base").exists():
        _alone("base", family, folder)
    shutil.rmtree(folder / "run", ignore_errors=True)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    took = _alone("run", family, folder, more)
    (folder / "run.json").write_text(json.dumps(took), encoding="utf-8")
    assert tdm(["export", str(folder / "run")]) == 0
    drawn = _alone("draw", family, folder)

    config = load_config(family, settings(folder / "base", folder, *more))
    estimate, counted = Estimator("cpu")(config), passes(config)
    memory = ", ".join(f"{part} {size / GIB:.2f}" for part, size in estimate.memory.items())
    counted_parts = {
        "roll-out": counted.prefix, "student": counted.student, "critic": counted.critic,
        "teacher": counted.teacher, "score": counted.score,
    }  # fmt: skip
    parts = ", ".join(f"{part} {seconds:.1f}" for part, seconds in sorted(took["parts"].items(), key=lambda p: -p[1]))
    passes_ran = ", ".join(f"{part} {took['passes'].get(part, 0):g} ({n:g})" for part, n in counted_parts.items())
    seconds, wall = (", ".join(f"{value:.0f}" for value in took[clock]) for clock in ("seconds", "wall"))
    return "\n".join(
        [
            f"{family}, {SIZE} x {SIZE}, {estimate.parameters:,} weights {' '.join(more)}",
            f"  memory   {took['peak'] / GIB:.2f} GiB at the peak, {estimate.total / GIB:.2f} estimated "
            f"({estimate.total / took['peak'] - 1:+.1%}): {memory}",
            f"  passes   of a sample in an update, and their mean by cost.py: {passes_ran}",
            f"  seconds  of the processor in each update {seconds} (of the wall {wall}); in the mean {parts}",
            f"  FLOPs    {estimate.flops_per_update / 1e12:.1f} T an update",
            f"  student  {drawn['layers']} layers; drew {drawn['size']} in {drawn['calls']} calls, "
            f"{drawn['seconds']:.0f} s of the processor",
        ]
    )


def _alone(part: str, family: str, folder: Path, more: Sequence[str] = ()) -> Any:
    """What one part of the work returns, done by a process of its own that gives freed memory back."""
    command = [sys.executable, "-m", "tdm.tests.training.full_size", family, "--out", str(folder.parent)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    done = subprocess.run(
        [*command, "--part", part, "--set", *more], stdout=subprocess.PIPE, text=True, check=True, env=environment
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="+", choices=("sd15", "sdxl"))
    parser.add_argument("--out", type=Path, default=Path("runs/full-size"))
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="further settings of the runs")
    parser.add_argument("--part", choices=("base", "run", "draw"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    for family in args.families:
        print(_part(args.part, family, args.out / family, args.set), flush=True)


def _part(part: str | None, family: str, folder: Path, more: list[str]) -> str:
    if part is None:
        return measure(family, folder, more)
    if part == "base":
        return json.dumps(write_random_base(family, folder / "base"))
    return json.dumps(run(family, folder, more) if part == "run" else draw(folder))


if __name__ == "__main__":
    main()
