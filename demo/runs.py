"""Runs of `tdm distill`, each in a separate process, which goes on when the page, or the demo itself, is closed."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ..errors import TDMError
from ..files import replacing
from ..pipelines.students.recipe import STUDENT_FILE
from ..training.export import export_student, read_run
from ..training.health import Monitor
from ..training.settings import read_settings
from ..training.stages import total_updates
from . import APP

NOTE = "demo.json"  # in the run's folder: how it was started, and its process
OUTPUT = "output.txt"  # what it prints
# What a visitor may set. Not what is distilled, nor where anything lies: those are paths.
OPEN = ("updates", "stages", "seed", "batch_size", "trajectory", "objective", "student", "critic", "ema", "output")


@dataclass(frozen=True)
class State:
    """A run as its folder has it.

    Attributes:
        running: whether its process lives.
        step: updates that are done.
        updates: updates that it was started for.
        lines: the lines of metrics.jsonl.
        alarms: messages of the alarms that these lines raise.
        preview: the newest sheet of previews.
        last_line: the last line that it printed.
        stopped: whether the page asked it to stop.
        resumable: whether there is a checkpoint to resume from.
    """

    running: bool
    step: int
    updates: int
    lines: list[dict[str, float]]
    alarms: list[str]
    preview: Path | None
    last_line: str
    stopped: bool
    resumable: bool

    @property
    def finished(self) -> bool:
        """Whether all updates are done."""
        return not self.running and self.step >= self.updates


class Runs:
    """The runs below one folder.

    Args:
        folder: holds a folder for each run.
        configs: configurations to choose from, by name; the bundled teacher's is always there.
    """

    def __init__(self, folder: Path, configs: Sequence[str] = ()) -> None:
        self.folder = folder
        self.configs = {Path(config).stem: config for config in ("bundled", *configs)}
        self._starting = threading.Lock()
        self._children: list[subprocess.Popen[bytes]] = []  # held, so that one that ends is no zombie

    def names(self) -> list[str]:
        """Names of the runs, the newest first."""
        notes = sorted(self.folder.glob(f"*/{NOTE}"), key=lambda note: note.parent.stat().st_ctime, reverse=True)
        return [note.parent.name for note in notes if _is_name(note.parent.name)]

    def free_name(self) -> str:
        """Propose a name for the next run."""
        return next(name for i in itertools.count(1) if not (self.folder / (name := f"run-{i}")).exists())

    def start(self, name: str, config: str, settings: Sequence[str]) -> None:
        """Begin a run.

        Args:
            name: of its folder.
            config: a name of `configs`.
            settings: `key=value`.

        Raises:
            TDMError: the name or a setting is wrong, there is such a run, or another one runs.
        """
        folder = self._folder(name)
        if config not in self.configs:
            raise TDMError(f"there is no configuration {str(config)[:40]!r}; choose {', '.join(self.configs)}")
        for setting in settings:
            key, equals, _ = setting.partition("=")
            if not equals:  # `tdm distill` takes it for the file of a configuration
                raise TDMError(f"a setting is key=value, such as student.lr=1e-4, not {setting[:60]!r}")
            if key.split(".")[0] not in OPEN:
                raise TDMError(f"{setting[:60]!r} cannot be set here; only {', '.join(OPEN)} and what is below them")
        arguments = [self.configs[config], *settings]
        updates = total_updates(read_settings(arguments))
        with self._starting:
            self._require_idle()
            if folder.exists():
                raise TDMError(f"there is a run {name} already; resume it, or choose another name")
            folder.mkdir(parents=True)
            self._launch(folder, {"settings": arguments, "updates": updates}, resume=False)

    def resume(self, name: str) -> None:
        """Resume a run from its last checkpoint, or start it again if it has none.

        Raises:
            TDMError: there is no such run, or another one runs.
        """
        folder = self._folder(name)
        note = self._note(folder)
        with self._starting:
            self._require_idle()
            self._launch(folder, note, resume=(folder / "checkpoint.pt").is_file())

    def stop(self, name: str) -> None:
        """Ask a run to write a checkpoint and end, as Ctrl-C does.

        Raises:
            TDMError: the run is not running.
        """
        folder = self._folder(name)
        note = self._note(folder)
        process = self._process(note)
        if process is None:
            raise TDMError(f"{name} does not run")
        _write_note(folder, {**note, "stopped": True})
        process.terminate()

    def state(self, name: str) -> State:
        """Read the state of a run.

        Raises:
            TDMError: there is no such run.
        """
        folder = self._folder(name)
        note = self._note(folder)
        running = self._process(note) is not None
        lines, monitor = _lines(folder / "metrics.jsonl"), Monitor()
        alarms = [alarm.message for line in lines for alarm in monitor.watch(line)]
        previews = sorted((folder / "previews").glob("*.png"))
        text = (folder / OUTPUT).read_text(encoding="utf-8", errors="replace") if (folder / OUTPUT).is_file() else ""
        printed = text.split("\n")
        return State(
            running=running,
            step=int(lines[-1]["step"]) if lines else 0,
            updates=note["updates"],
            lines=lines,
            alarms=alarms,
            preview=previews[-1] if previews else None,
            last_line=next((line for line in reversed(printed) if line.strip()), ""),
            stopped=note.get("stopped", False),
            resumable=(folder / "checkpoint.pt").is_file(),
        )

    def student(self, name: str) -> str:
        """Write the student of the run's last checkpoint to a file, and return that file relative to `folder`.

        Raises:
            TDMError: there is no checkpoint yet.
        """
        folder = self._folder(name)
        self._note(folder)
        if not (folder / "checkpoint.pt").is_file():
            raise TDMError(f"{name} has no checkpoint yet; let it go on, or stop it, which writes one")
        trained = read_run(folder)
        if trained is None:
            raise TDMError(f"{name} distils no pipeline; there is nothing to draw with")
        file = folder / STUDENT_FILE
        if not file.is_file() or file.stat().st_mtime < (folder / "checkpoint.pt").stat().st_mtime:
            export_student(trained, file, force=True)
        return f"{name}/{STUDENT_FILE}"

    def _folder(self, name: Any) -> Path:
        if not _is_name(name):
            raise TDMError("the name of a run is 1 to 40 letters, digits, - and _")
        folder = self.folder / name
        if folder.is_symlink():
            raise TDMError(f"the folder of {name} is a link; it is left alone")
        return folder

    def _note(self, folder: Path) -> dict[str, Any]:
        try:
            return json.loads((folder / NOTE).read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError):
            raise TDMError(f"there is no run {folder.name} that was started here") from None

    def _require_idle(self) -> None:
        for name in self.names():
            if self._process(self._note(self.folder / name)) is not None:
                raise TDMError(f"the run {name} is at work; stop it first: one at a time")

    def _launch(self, folder: Path, note: dict[str, Any], *, resume: bool) -> None:
        command = [sys.executable, str(APP), "distill", *note["settings"], "--out", str(folder)]
        with (folder / OUTPUT).open("wb") as output:
            process = subprocess.Popen(
                [*command, "--resume"] if resume else command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C in the demo's terminal is not for it
            )
        self._children = [child for child in self._children if child.poll() is None] + [process]
        started = psutil.Process(process.pid).create_time()
        _write_note(folder, {**note, "process": [process.pid, started], "stopped": False})

    def _process(self, note: dict[str, Any]) -> psutil.Process | None:
        """Return the process of a run if it is alive. The start time tells it from a later one of the same number."""
        for child in self._children:
            child.poll()
        try:
            pid, created = note["process"]
            process = psutil.Process(pid)
            alive = process.create_time() == created and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, KeyError):
            return None
        return process if alive else None


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", name) is not None


def _write_note(folder: Path, note: dict[str, Any]) -> None:
    with replacing(folder / NOTE) as file:
        file.write(json.dumps(note).encode())


def _lines(path: Path) -> list[dict[str, float]]:
    """Read the lines of metrics.jsonl that are whole: the last may be half written."""
    if not path.is_file():
        return []
    return [
        json.loads(line) for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
    ]
