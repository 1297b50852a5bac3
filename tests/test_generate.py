"""tdm generate: where its pictures and videos go, what kind of file they are, and which sizes it draws."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import av
import pytest
from PIL import Image
from tdm.cli import main
from tdm.pipelines.families import family_of_name
from tdm.pipelines.students.file import Student, save_student
from tdm.tests import tiny
from tdm.tests.commands import refused
from tdm.tests.pipelines.students import lora_for, recipe_for

PROMPT = "a red star"
VIDEOS = [name for name in tiny.FAMILIES if family_of_name(name).video]


@pytest.fixture
def video_student(bases: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """The file of a 2-step student of a family's tiny base."""

    def student(family: str) -> Path:
        base = shutil.copytree(bases(family), tmp_path / family)
        config = base / "transformer" / "config.json"
        settings = json.loads(config.read_text())
        if "max_text_seq_length" in settings:  # the command line leaves the length of prompts to the pipeline
            config.write_text(json.dumps({**settings, "max_text_seq_length": 226}))
        denoiser = getattr(tiny.build(family), family_of_name(family).denoiser)
        recipe = recipe_for(family, base, trained_timesteps={2: [900.0, 450.0]})
        return save_student(tmp_path / f"{family}.safetensors", Student.from_state_dict(recipe, lora_for(denoiser)))

    return student


@pytest.mark.parametrize("family", VIDEOS)
def test_a_student_of_videos_writes_an_mp4(
    family: str,
    video_student: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", PROMPT, "--student", str(video_student(family)), "--seed", "3"]) == 0
    file = Path("outputs/a-red-star-3.mp4")
    with av.open(file) as container:
        stream = container.streams.video[0]
        shown = [frame.to_image() for frame in container.decode(stream)]
        assert stream.average_rate == family_of_name(family).frames_per_second
        assert json.loads(container.metadata["comment"])["seed"] == 3
    call = tiny.call_kwargs(family)
    assert [frame.size for frame in shown] == [(call["width"], call["height"])] * call["num_frames"]
    assert f"{file}  16x16, 9 frames  2 network calls" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_a_video_may_be_an_animated_picture(
    suffix: str, video_student: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, student = tmp_path / f"x.{suffix}", str(video_student("wan"))
    assert main(["generate", PROMPT, "--student", student, "--out", str(out)]) == 0
    with Image.open(out) as image:
        assert (image.format, image.n_frames) == (suffix.upper(), 9)
    assert ".mp4 or .gif or .webp" in refused(
        ["generate", PROMPT, "--student", student, "--out", str(tmp_path / "x.png")], capsys
    )


def test_videos_are_compared_by_their_middle_frames(
    video_student: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    arguments = ["--student", str(video_student("wan")), "--out", str(out)]
    assert main(["generate", "--compare", PROMPT, "a dog", *arguments]) == 0
    assert f"{out}, the middle frame of each video" in capsys.readouterr().out
    assert Image.open(out).width > 2 * 160


def test_a_picture_is_no_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is written as .png" in refused(["generate", PROMPT, "--out", str(tmp_path / "x.mp4")], capsys)


def test_names_of_our_own_are_numbered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        assert main(["generate", PROMPT]) == 0
    names = sorted(path.name for path in (tmp_path / "outputs").iterdir())
    assert names == ["a-red-star-0-2.png", "a-red-star-0-3.png", "a-red-star-0.png"]
    assert main(["generate", PROMPT, PROMPT, "--out", "mine"]) == 0
    assert main(["generate", PROMPT, PROMPT, "--out", "mine", "--force"]) == 0
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["a-red-star-0.png", "a-red-star-1.png"]


def test_sizes_far_above_the_students_need_a_flag(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "x.png")]
    line = refused(["generate", PROMPT, "--size", "136x128", *out], capsys)
    assert "more than 4 times the area of 64x64" in line
    assert "--any-size" in line
    assert main(["generate", PROMPT, "--size", "128", *out]) == 0
    assert main(["generate", PROMPT, "--size", "136x128", "--any-size", "--force", *out]) == 0
    assert Image.open(tmp_path / "x.png").size == (136, 128)
