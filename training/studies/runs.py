"""The runs of a question: trained by the ordinary loop, kept as one line each."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...bench.machine import processor
from ...errors import TDMError
from ...files import replacing, user_cache, writing
from ..config import DistillConfig
from ..cost import passes_after
from ..loop import build_roles, distill, settled
from ..progress import Report, print_line
from ..roles import Ema
from ..run import Run
from ..stages import stages_of
from ..start import start
from ..tasks import build_task
from ..trajectory import build_trajectories
from .question import Question, is_of

FOLDER = Path(__file__).parent / "results"
BASE = "undistilled"  # the variant's name of what training starts from
TEACHER = "teacher"
SECONDS = "seconds"


@dataclass(frozen=True)
class Point:
    """The measures of one evaluation.

    Attributes:
        step: updates before it.
        passes: network passes per sample before it, a backward one counted as two.
        measures: of the task, by name.
    """

    step: int
    passes: float
    measures: dict[str, float]


@dataclass(frozen=True)
class StudyRun:
    """One run.

    Attributes:
        config: all its settings; see `question.is_of`.
        seconds: that it took, evaluations and all.
        machine: what it ran on.
        curve: its evaluations, in order.
    """

    variant: str
    seed: int
    config: dict[str, Any]
    seconds: float
    machine: str
    curve: list[Point]


def results_file(question: Question) -> Path:
    """Where a question's runs are kept, one line of JSON each."""
    return FOLDER / f"{question.name}.jsonl"


def read_runs(path: Path) -> list[StudyRun]:
    """All whole lines of a file of results; none if there is no file.

    Raises:
        TDMError: a line is no run.
    """
    if not path.is_file():
        return []
    runs = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            continue
        try:
            fields = json.loads(line)
            runs.append(StudyRun(**{**fields, "curve": [Point(**point) for point in fields["curve"]]}))
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise TDMError(f"{path}, line {number}, is no run: {error}") from None
    return runs


def valid_runs(question: Question, runs: Sequence[StudyRun]) -> dict[tuple[str, int], StudyRun]:
    """The runs that are still what the question asks for, by (variant, seed)."""
    wanted = _wanted(question)
    known = [run for run in runs if (run.variant, run.seed) in wanted]
    return {(run.variant, run.seed): run for run in known if is_of(run.config, wanted[run.variant, run.seed])}


def _wanted(question: Question) -> dict[tuple[str, int], DistillConfig]:
    wanted = {(variant, seed): question.config(variant, seed) for variant, seed in question.runs()}
    return wanted | {(name, 0): question.config(question.first, question.seeds[0]) for name in (BASE, TEACHER)}


def answer(
    question: Question,
    path: Path,
    *,
    only: Sequence[str] = (),
    seeds: Sequence[int] = (),
    report: Report = print_line,
    stop: Callable[[], bool] = lambda: False,
) -> dict[tuple[str, int], StudyRun]:
    """Make all runs that are missing, and keep each as soon as it has ended. A run of another question in the same
    folder is used if its configuration is the same. Two processes may share a question, each with variants or seeds of
    its own.

    Args:
        path: of the results.
        only: these variants; all if empty.
        seeds: these seeds; all if empty.

    Raises:
        TDMError: an unknown variant, a seed that the question does not have, or as `distill`.
    """
    for variant in only:
        if variant not in question.variants:
            raise TDMError(f"{question.name} has no variant {variant!r}; it has {', '.join(question.variants)}")
    for seed in seeds:
        if seed not in question.seeds:
            raise TDMError(f"{question.name} has no seed {seed}; it has {', '.join(map(str, question.seeds))}")
    borrow(question, path)
    if (BASE, 0) not in _kept(question, path):
        _keep(path, references(question, picture_folder(path)))
    kept = _kept(question, path)
    asked = [(v, s) for v, s in question.runs() if (not only or v in only) and (not seeds or s in seeds)]
    todo = [run for run in asked if run not in kept]
    begun, seconds = time.monotonic(), 0.0
    for i, (variant, seed) in enumerate(todo):
        left = f", about {(len(todo) - i) * seconds / i / 60:.0f} min left" if i else ""
        report(f"{question.name}: {variant}, seed {seed}, run {i + 1} of {len(todo)}{left}")
        here = picture_folder(path) if seed == question.seeds[0] else None
        trained = train(question, variant, seed, pictures=here, report=report, stop=stop)
        if trained is None:
            break
        _keep(path, [trained])
        seconds = time.monotonic() - begun
    kept = _kept(question, path)
    if len(kept) == len(question.runs()) + 2:  # complete: what it once asked for and no longer does goes
        with replacing(path, shared=True) as file:
            file.write("".join(json.dumps(asdict(kept[key])) + "\n" for key in sorted(kept)).encode())
    return kept


def borrow(question: Question, path: Path) -> None:
    """Keep as this question's what is missing, and was trained with the same configuration for another question whose
    results are in the folder of `path`; a variant's name may be another there.
    """
    for other in sorted(set(path.parent.glob("*.jsonl")) - {path}):
        kept = _kept(question, path)
        missing = {key: config for key, config in _wanted(question).items() if key not in kept}
        for run in read_runs(other):
            for name, seed in [key for key, config in missing.items() if _is_it(run, key, config)]:
                _keep(path, [replace(run, variant=name, seed=seed)])
                del missing[name, seed]
                picture = picture_folder(other) / f"{slug(run.variant)}.png"
                if seed == question.seeds[0] and picture.is_file():
                    with Image.open(picture) as image:
                        save_picture(picture_folder(path), name, image)


def _is_it(run: StudyRun, key: tuple[str, int], config: DistillConfig) -> bool:
    """Whether a run of any question is what `key` names, which has this configuration."""
    references = {run.variant, key[0]} & {BASE, TEACHER}
    return (not references or run.variant == key[0]) and is_of(run.config, config)


def _kept(question: Question, path: Path) -> dict[tuple[str, int], StudyRun]:
    return valid_runs(question, read_runs(path))


def _keep(path: Path, runs: Sequence[StudyRun]) -> None:
    """Add lines, so that two processes can; a line that is cut short by a kill counts for nothing."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(asdict(run)) + "\n" for run in runs))


def train(
    question: Question,
    variant: str,
    seed: int,
    *,
    pictures: Path | None = None,
    report: Report = print_line,
    stop: Callable[[], bool] = lambda: False,
) -> StudyRun | None:
    """Train one run in a folder that is removed when it ends. None if it was stopped: the next call then resumes it.

    Args:
        pictures: folder for what its student draws; None draws nothing.
    """
    config = question.config(variant, seed)

    def tell(run: Run, line: Mapping[str, float]) -> None:
        if (shown := line.get(f"eval/{question.measure}")) is not None:
            report(f"  {variant}, seed {seed}: update {run.step}/{run.updates}, {question.measure} {shown:.4g}")

    begun, brief_report = time.monotonic(), _in_brief(report)
    with unfinished(config) as folder:
        before = _seconds_before(folder)
        task = build_task(config.task, config.memory, device(), brief_report)
        resume = (folder / "checkpoint.pt").is_file()
        run = distill(task, config, folder, callbacks=[tell], resume=resume, report=brief_report, stop=stop)
        seconds = before + time.monotonic() - begun
        if run.step < run.updates:
            (folder / SECONDS).write_text(str(seconds), encoding="utf-8")
            return None
        (folder / SECONDS).unlink(missing_ok=True)
        curve = _curve(folder / "metrics.jsonl", config)
    if pictures is not None:
        save_picture(pictures, variant, task.show(run.student))
    return StudyRun(variant, seed, asdict(config), seconds, machine(), curve)


@contextlib.contextmanager
def unfinished(config: DistillConfig) -> Iterator[Path]:
    """The folder of a run with these settings, for the length of a `with`: an empty one, or that of a run that was
    stopped. It is kept for the next time if it says how long the run took so far, in a file `SECONDS`.

    Between two runs it lies in the user's cache. Who takes it moves it away, so that no two processes have it.
    """
    text = json.dumps(asdict(config), sort_keys=True)
    kept = user_cache() / "studies" / hashlib.sha256(text.encode()).hexdigest()[:32]
    with writing(kept):
        kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        folder = Path(scratch) / "run"
        with contextlib.suppress(FileNotFoundError):
            kept.rename(folder)
        folder.mkdir(exist_ok=True)
        try:
            yield folder
        except TDMError:  # it would not go on the next time, either
            (folder / SECONDS).unlink(missing_ok=True)
            raise
        finally:  # a run that goes on and is killed at once still has its earlier checkpoint
            if (folder / SECONDS).is_file() and not kept.exists():
                folder.rename(kept)


def _seconds_before(folder: Path) -> float:
    """What a run took before it was stopped; 0 of a new one."""
    file = folder / SECONDS
    return float(file.read_text(encoding="utf-8")) if file.is_file() else 0.0


def _curve(metrics: Path, config: DistillConfig) -> list[Point]:
    """The evaluations in a run's metrics.jsonl."""
    curve = []
    for line in map(json.loads, metrics.read_text(encoding="utf-8").splitlines()):
        if measures := {key.removeprefix("eval/"): v for key, v in line.items() if key.startswith("eval/")}:
            curve.append(Point(line["step"], passes_after(config, line["step"]), measures))
    return curve


def _in_brief(report: Report) -> Report:
    """A report for one run among many: its lines are indented, and of those about progress one a minute is kept."""
    last = time.monotonic()

    def say(line: str) -> None:
        nonlocal last
        if "  ETA " in line:
            if time.monotonic() - last < 60:
                return
            last = time.monotonic()
            line = f"{line.partition('  ')[0]}  {line[line.index('ETA') :]}"
        report(f"    {line}")

    return say


def picture_folder(results: Path) -> Path:
    """The pictures that belong to a file of results: of the first seed's students, named by their variant."""
    return results.with_suffix("")


def save_picture(folder: Path, name: str, picture: Image.Image) -> None:
    """Keep what a variant draws."""
    with replacing(folder / f"{slug(name)}.png", shared=True) as file:
        picture.save(file, format="PNG")


def slug(name: str) -> str:
    """A variant's name as that of a file."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def references(question: Question, pictures: Path) -> list[StudyRun]:
    """What training starts from, on the first variant's grid, and the guided teacher on its many steps: the same
    evaluation, without training.
    """
    config = question.config(question.first, question.seeds[0])
    measured = []
    for name in (BASE, TEACHER):
        begun = time.monotonic()
        run = untrained(config)
        teacher = run.teacher  # one object, by which a task knows it: its pictures are drawn once
        sampler = teacher if name == TEACHER else run.student
        measures = run.task.evaluate(sampler, teacher)
        save_picture(pictures, name, run.task.show(sampler))
        point = Point(0, 0.0, measures)
        measured.append(StudyRun(name, 0, asdict(config), time.monotonic() - begun, machine(), [point]))
    return measured


def untrained(config: DistillConfig) -> Run:
    """A run before its first update: its student is the base on the student's grid."""
    task = build_task(config.task, config.memory, device())
    config = settled(config, task.device.type)
    stage = stages_of(config)[-1]
    roles = build_roles(task, stage.config, torch.Generator().manual_seed(config.seed))
    if config.start_from is not None:
        start(roles, task, stage.config)
    trajectories = build_trajectories(stage.config.trajectory, task.schedule)
    return Run(task, config, Path(), roles, trajectories, Ema(roles, decay=0.0), stage)


def device() -> str:
    """Where runs are made: on a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> str:
    """What a run ran on, in a few words."""
    name = torch.cuda.get_device_name() if device() == "cuda" else processor()
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} of {os.cpu_count()} threads"
