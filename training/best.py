"""The best student of a run so far, by the task's own measure."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ..errors import TDMError
from ..files import save_tensors
from .checkpoint import FORMAT, read_checkpoint


class Metric(NamedTuple):
    """Which of a task's evaluation measures ranks its students."""

    name: str
    higher_is_better: bool


class BestStudent:
    """``best.pt``: the mean weights that had the best value of ``measure`` so far; no file without a measure.

    It holds ``format``, ``step``, ``measure`` (its name), ``value`` and ``weights`` (as a checkpoint's
    ``ema.weights``), and outlives a resume.

    Args:
        resume: go on from the file that is there; False removes it, since it is of another run. A file that cannot be
            read is passed over with a line to ``report``.

    Raises:
        TDMError: the file is not one of this measure.
    """

    def __init__(
        self,
        path: Path,
        measure: Metric | None,
        *,
        resume: bool,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.path, self.measure = path, measure
        self.step: int | None = None
        self.value = 0.0
        if not resume:
            path.unlink(missing_ok=True)
        elif measure is not None and path.exists():
            try:
                payload = read_checkpoint(path)
            except TDMError as error:
                report(f"note: {error}; the best student is chosen among the evaluations from here on")
                return
            if payload["measure"] != measure.name:
                raise TDMError(f"{path} ranks students by {payload['measure']}, not {measure.name}; move it away")
            self.step, self.value = payload["step"], payload["value"]

    def keep(self, step: int, weights: dict[str, Tensor], measures: dict[str, float]) -> dict[str, float]:
        """Take in an evaluation after ``step`` updates; returns what to log: ``best/step`` and ``best/<measure>``.

        Raises:
            TDMError: the write failed; the best so far is kept.
        """
        if self.measure is None:
            return {}
        name, value = self.measure.name, measures[self.measure.name]
        if self.step is None or (value > self.value if self.measure.higher_is_better else value < self.value):
            payload = {"format": FORMAT, "step": step, "measure": name, "value": value, "weights": weights}
            save_tensors(payload, self.path)
            self.step, self.value = step, value
        return {"best/step": self.step, f"best/{name}": self.value}
