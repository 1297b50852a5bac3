"""`tdm distill` for a user: the preset for their own base, the messages of the run, and the command to try it."""

from __future__ import annotations

import os
import pty
import shlex
import shutil
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from tdm.cli import main
from tdm.pipelines.students.file import read_student
from tdm.tests import tiny
from tdm.tests.commands import refused
from tdm.tests.pipelines.lora_files import LAYOUTS, diffusers_names, tensors_of, updates, write
from tdm.training.settings import load_config, read_settings

PROMPT = 'a cat\'s "$HOME" & dog'
SHORT = ("updates=1", "batch_size=2", "output.preview_every=0", "critic.rank=2", "student.rank=2")


def lines_of(error: str, start: str) -> list[str]:
    return [line for line in error.splitlines() if line.startswith(start)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_base_without_a_preset_gets_that_of_its_family(family: str, bases: Callable[[str], Path]) -> None:
    base, lines = bases(family), []
    arguments = [f"task.model={base}", "updates=3"]
    assert read_settings(["24gb", *arguments], lines.append) == load_config([family, "24gb"], arguments)
    assert lines == [
        f"{base} is a base of {family}: the preset {family} is taken, with the settings given in its place"
    ]
    assert read_settings([family, *arguments], lines.append) == load_config(family, arguments)  # named, it is not said
    assert len(lines) == 1


def test_the_bundled_base_by_name_has_its_own_preset() -> None:
    assert read_settings(["task.model=bundled"]) == load_config("bundled")


@pytest.mark.parametrize("family", ["sdxl", "wan"])
def test_the_line_to_try_is_of_the_users_own_prompts_and_runs(
    family: str,
    bases: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text(f"{PROMPT}\nanother\n")
    call = tiny.call_kwargs(family)
    frames = [f"task.num_frames={call['num_frames']}"] if "num_frames" in call else []
    size = [f"task.height={call['height']}", f"task.width={call['width']}", *frames]
    options = [
        f"task.model={bases(family)}",
        "task.prompts=prompts.txt",
        "task.cache=cache",
        *size,
        *SHORT,
        "stages=[]",  # Wan's preset has some
    ]
    assert main(["distill", *options, "--out", "a run"]) == 0
    printed = capsys.readouterr()
    (start,) = lines_of(printed.err, "distils ")
    assert start.endswith("into a run: 1 updates; Ctrl-C stops and keeps them")
    assert printed.err.index(start) < printed.err.index("update 1/1")
    (line,) = lines_of(printed.out, "try it   ")
    command = shlex.split(line.removeprefix("try it   "))
    compared = [] if family == "wan" else ["--compare"]
    assert command == ["tdm", "generate", PROMPT, *compared, "--student", "a run/student.safetensors"]
    assert main(command[1:]) == 0
    assert [path.suffix for path in Path("outputs").iterdir()] == [".mp4" if family == "wan" else ".png"]


def test_a_student_of_a_teacher_with_loras_is_tried_merged(
    bases: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a cat\n")
    pipe = tiny.build("sd15")
    lora = updates(pipe, "unet", diffusers_names(pipe.unet, ""))
    write(tmp_path / "style.safetensors", tensors_of(LAYOUTS["diffusers"], lora))
    options = [f"task.model={bases('sd15')}", "task.prompts=prompts.txt", "task.height=16", "task.width=16", *SHORT]
    assert main(["distill", *options, "task.loras=[style.safetensors@0.8]", "task.cache=cache", "--out", "run"]) == 0
    commands = [shlex.split(line.removeprefix("try it   ")) for line in lines_of(capsys.readouterr().out, "try it   ")]
    assert commands == [
        ["tdm", "export", "run", "--format", "merged"],
        ["tdm", "generate", "a cat", "--model", "run/merged"],
    ]
    assert [main(command[1:]) for command in commands] == [0, 0]
    assert len(list(Path("outputs").iterdir())) == 1


def test_a_terminal_has_a_bar_and_hears_at_once_what_starts(tmp_path: Path) -> None:
    """A terminal shows a bar. A pipe gets the lines alone, as in the test above."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    command = [sys.executable, "-m", "tdm.cli", "distill", "mixture", "updates=3", "output.log_every=2", "batch_size=4"]
    command += ["critic.head_start=0", "output.preview_every=0", "output.evaluate_every=0", "--out", "x"]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert run.wait() == 0
    text = shown.decode()
    assert text.startswith("tdm distill: loads mixture")
    assert "update 2/3" in text
    assert "| 3/3 [" in text
    assert "update/s" in text


def test_a_base_that_is_gone_is_named_in_the_words_of_the_command_line(
    bases: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bases("sd15"), "my-base")
    Path("prompts.txt").write_text("a cat\n")
    options = ["task.model=my-base", "task.prompts=prompts.txt", "task.cache=cache", "task.height=16", "task.width=16"]
    assert main(["distill", *options, *SHORT, "--out", "run"]) == 0
    assert read_student("run/student.safetensors").recipe.base_model == "my-base"
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    student = str(tmp_path / "run" / "student.safetensors")
    line = refused(["generate", "a cat", "--student", student], capsys)
    assert "cannot read the base 'my-base'" in line
    assert "a hub id or a folder relative to where the student was trained" in line
    assert line.strip().endswith("name a base with --model FOLDER_OR_HUB_ID")
    assert "from_pretrained" not in line
    assert main(["generate", "a cat", "--student", student, "--model", str(tmp_path / "my-base")]) == 0


def test_offline_mode_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for command in (
        ["generate", "x", "--model", "me/no-such-base", "--student", "bundled"],
        ["generate", "x", "--student", "me/no-such-student"],
        ["distill", "task.model=me/no-such-base", "task.prompts=p.txt"],
    ):
        assert "HF_HUB_OFFLINE is set" in refused(command, capsys)
