"""What a run says of itself: progress lines, metrics.jsonl and its table, previews, alarms, and TensorBoard if asked.

metrics.jsonl is the record. The other sinks follow it, and on resume everything after the checkpoint is forgotten in
all of them.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import TDMError
from ..files import RESUME, replacing, writing
from .best import BestStudent
from .health import Monitor
from .preview import Preview
from .progress import duration

if TYPE_CHECKING:
    from .run import Callback, Run


class Log:
    """The record of a run in its folder. One process of a run has it.

    Metrics stay on the device until a window of updates is full, so that logging waits for the device once per window.

    Args:
        run: resumed where ``run.step`` is not 0.
        callbacks: called with the run and each line of metrics.jsonl.
        report: takes the progress lines.

    Attributes:
        alarms: the messages of all alarms since the start or the resume.

    Raises:
        TDMError: TensorBoard is asked for and not installed, or the folder cannot be written.
    """

    def __init__(self, run: Run, callbacks: Sequence[Callback], report: Callable[[str], None]) -> None:
        self.run, self.callbacks, self.report = run, callbacks, report
        self.window: list[dict[str, Tensor]] = []
        self.alarms: list[str] = []
        self.monitor = Monitor()
        self.path = run.out_dir / "metrics.jsonl"
        if run.step and not self.path.is_file():
            report(f"note: {self.path} is not there; the record begins at update {run.step}")
        # Resuming: forget what came after the checkpoint. A new run forgets all that an earlier one left.
        kept = [line for line in read_metrics(self.path) if line["step"] <= run.step] if run.step else []
        with replacing(self.path, remedy=RESUME) as file:
            file.write("".join(json.dumps(line) + "\n" for line in kept).encode())
        for picture in (run.out_dir / "previews").glob("*.png"):
            if picture.stem.isdigit() and int(picture.stem) > run.step:
                with writing(picture, RESUME):
                    picture.unlink()
        last = [line for line in kept if line["step"] == run.step]
        self._recorded = {name.partition("/")[0] for line in last for name in line}
        for line in kept:  # what the monitor knows is in the lines
            self.monitor.watch(line)
        best = run.out_dir / "best.pt"
        self.best = BestStudent(best, run.task.measure, resume=run.step > 0, report=report)
        self.table = Table(run.out_dir / "metrics.csv", self.path)
        self.board: Any = _board(run) if run.config.output.tensorboard else None
        self.start, self.first, self.since = time.monotonic(), run.step, time.monotonic()

    @property
    def alarmed(self) -> bool:
        """Whether an alarm is to stop the run."""
        return self.run.config.output.stop_on_alarm and bool(self.alarms)

    def lacks(self, kind: str) -> bool:
        """Whether a kind of line (``eval``, ``health``, ``stage``) of this update is still to be written. A resumed run
        may have it from before.
        """
        return self.run.step > self.first or kind not in self._recorded

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Take in the metrics of one update, 0-dim tensors."""
        self.window.append(metrics)

    def flush(self) -> None:
        """Write the means over the window and empty it; nothing if it is empty.

        Raises:
            TDMError: a loss or a gradient norm was not finite.
        """
        if not self.window:
            return
        names = {name for metrics in self.window for name in metrics}
        device = next(iter(self.window[0].values())).device
        nan = torch.tensor(math.nan, device=device)
        table = {name: torch.stack([m.get(name, nan) for m in self.window]).cpu() for name in sorted(names)}
        self._check_finite(table)
        line = {name: value for name in table if not math.isnan(value := float(table[name].nanmean()))}
        now = time.monotonic()
        line["seconds_per_update"] = (now - self.since) / len(self.window)  # of the clock, previews and all
        self.window, self.since = [], now
        self.write(line)

    def _check_finite(self, table: dict[str, Tensor]) -> None:
        begin = self.run.step - len(self.window)
        for i, metrics in enumerate(self.window):
            for name in ("critic_loss", "critic_grad", "student_loss", "student_grad"):
                if name in metrics and not table[name][i].isfinite():
                    self._record({"alarm/nan": float(begin + i + 1)})
                    kept = (self.run.out_dir / "checkpoint.pt").is_file()
                    raise TDMError(
                        f"{name} is {float(table[name][i])} at update {begin + i + 1}: "
                        f"{self._advice(name.partition('_')[0])}{'; the last checkpoint is kept' * kept}"
                    )

    def _advice(self, role: str) -> str:
        """What to do about a value that is not finite."""
        config = self.run.config
        # The other processes of a sharded base are not asked here.
        if not config.memory.shard and not self.run.base_is_finite():
            return (
                f"the base's own prediction is not finite. With memory.base={config.memory.base} it may overflow: take "
                "bf16 or fp32; or else its weights are damaged"
            )
        return f"lower {role}.lr, or raise objective.norm_min and trajectory.margin"

    def write(self, line: dict[str, float]) -> None:
        """One line to every sink, and to the monitor, whose alarms follow it."""
        line = self._record(line)
        done, left = self.run.step - self.first, self.run.updates - self.run.step
        eta = f"  ETA {duration((time.monotonic() - self.start) / done * left)}" if done else ""
        shown = "  ".join(f"{k} {v:.3g}" for k, v in line.items() if k != "step" and not k.startswith("gap_"))
        self.report(f"update {self.run.step}/{self.run.updates}  {shown}{eta}")
        for alarm in self.monitor.watch(line):
            self._record({f"alarm/{alarm.name}": alarm.value})
            self.alarms.append(alarm.message)
            self.report(f"ALARM  {alarm.message}")

    def evaluation(self, measures: dict[str, float]) -> None:
        """The task's measures as a line, and the student as best.pt if it is the best so far of the last stage, whose
        settings are those of the student file.
        """
        last = self.run.stage.end == self.run.updates
        kept = self.best.keep(self.run.step, self.run.ema.weights, measures) if last else {}
        self.write({f"eval/{name}": value for name, value in measures.items()} | kept)

    def stage(self, stages: int) -> None:
        """A line for the stage that begins, and one in the record."""
        stage = self.run.stage
        self.report(f"stage {stage.index + 1} of {stages}: {stage.name}, {stage.end - stage.begin} updates")
        if stage.index and self.run.step == stage.begin and self.lacks("stage"):
            self.monitor.watch(self._record({"stage": float(stage.index)}))

    def preview(self, preview: Preview) -> None:
        """The sheet of previews as a file, and how the student's samples compare with the teacher's as a line."""
        if preview.image is not None:
            with replacing(self.run.out_dir / "previews" / f"{self.run.step:06d}.png", remedy=RESUME) as file:
                preview.image.save(file, format="PNG")
            if self.board is not None:
                self.board.add_image("preview", np.asarray(preview.image), self.run.step, dataformats="HWC")
        if preview.ratios:
            self.write({f"health/{name}": value for name, value in preview.ratios.items()})

    def _record(self, line: dict[str, float]) -> dict[str, float]:
        line = {"step": self.run.step, **line}
        with writing(self.path, RESUME), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.table.write(line)
        if self.board is not None:
            for name, value in line.items():
                if name != "step":
                    self.board.add_scalar(name, value, self.run.step)
            self.board.flush()
        for callback in self.callbacks:
            callback(self.run, line)
        return line


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a metrics.jsonl; without those that a killed run or a power loss left torn, and [] if it is gone."""
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                lines.append(line)
    return lines


class Table:
    """metrics.csv: the lines of metrics.jsonl as rows. A name never seen before is a new column, on the right.

    Args:
        path: of the table, made from ``source`` at once and again for every new column.
        source: metrics.jsonl.
    """

    def __init__(self, path: Path, source: Path) -> None:
        self.path, self.source = path, source
        self._rebuild()

    def _rebuild(self) -> None:
        lines = read_metrics(self.source)
        self.columns = list(dict.fromkeys(["step", *(name for line in lines for name in line)]))
        rows = [",".join(self.columns), *(self._row(line) for line in lines)]
        with replacing(self.path, remedy=RESUME) as file:
            file.write("".join(f"{row}\n" for row in rows).encode())

    def _row(self, line: dict[str, float]) -> str:
        return ",".join(str(line.get(name, "")) for name in self.columns)

    def write(self, line: dict[str, float]) -> None:
        """Add the line that was just added to ``source``."""
        if not set(line) <= set(self.columns):
            self._rebuild()
            return
        with writing(self.path, RESUME), self.path.open("a", encoding="utf-8") as file:
            file.write(self._row(line) + "\n")


def _board(run: Run) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise TDMError(
            "output.tensorboard needs the package tensorboard: pip install tensorboard, or set it to false"
        ) from None
    return SummaryWriter(str(run.out_dir / "tensorboard"), purge_step=run.step + 1)  # hides what is later than that
