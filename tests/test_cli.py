"""The command line: what it makes, and one clear line and exit code 2 for every wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tdm.cli import main
from tdm.tests.commands import refused

PROMPT = "two red stars above a blue ball at night"


@pytest.fixture
def wrong_files(tmp_path: Path) -> Path:
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickle.safetensors")
    save_file({"unet.down.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "half.safetensors")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "a.yaml").write_text("updats: 3\n")
    (tmp_path / "notes.txt").write_text("hello")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["generate", PROMPT, "--step", "4"], "did you mean --steps?"),
        (["generate"], "PROMPT"),
        (["generat", PROMPT], "invalid choice: 'generat'"),
        (["generate", PROMPT, "--steps", "0"], "at least 1"),
        (["generate", PROMPT, "--steps", "many"], "invalid int value: 'many'"),
        (["generate", PROMPT, "--seed", "-1"], "0 or more"),
        (["generate", PROMPT, "--size", "big"], "is not a size"),
        (["generate", PROMPT, "--size", "60"], "multiples of 8"),
        (["generate", PROMPT, PROMPT, "--out", "x.png"], "give a folder"),
        (["generate", PROMPT, "--student", "{tmp}/missing.safetensors"], "missing.safetensors"),
        (["generate", PROMPT, "--student", "{tmp}/pickle.safetensors"], "pickle.safetensors"),
        (["generate", PROMPT, "--student", "{tmp}/empty.safetensors"], "empty.safetensors"),
        (
            ["generate", PROMPT, "--model", "bundled", "--student", "{tmp}/half.safetensors"],
            "metadata lacks: trained_timesteps",
        ),
        (["generate", PROMPT, "--out", "{tmp}/notes.txt/x.png"], "notes.txt"),
        (["info", "{tmp}/missing.safetensors"], "missing.safetensors"),
        (["info", "{tmp}/pickle.safetensors"], "pickle.safetensors"),
        (["eval", "--steps", "1,x"], "whole numbers"),
        (["distill", "{tmp}/missing.yaml"], "missing.yaml"),
        (["distill", "{tmp}/a.yaml"], "did you mean updates?"),
        (["distill", "sdlx", "24gb"], "did you mean sdxl?"),
        (["distill", "student.lrr=1"], "did you mean lr?"),
        (["distill", "student.lr=-1"], "student.lr must be positive"),
        (["distill", "task.model={tmp}/nowhere", "--out", "{tmp}/run"], "nowhere"),
        (["distill", "task.prompts={tmp}/nothing.txt", "--out", "{tmp}/run"], "nothing.txt"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], said: str, wrong_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in wrong_files.iterdir() if p.is_file()}
    assert said in refused([a.replace("{tmp}", str(wrong_files)) for a in arguments], capsys)
    assert {p: p.read_bytes() for p in wrong_files.iterdir() if p.is_file()} == before


def test_an_existing_picture_is_kept_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "x.png"
    out.write_bytes(b"mine")
    assert "--force" in refused(["generate", PROMPT, "--out", str(out)], capsys)
    assert out.read_bytes() == b"mine"
    assert main(["generate", PROMPT, "--out", str(out), "--force"]) == 0
    assert Image.open(out).size == (64, 64)


def test_generate_is_reproducible_and_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a.png", "b.png"):
        assert main(["generate", PROMPT, "--seed", "5", "--out", str(tmp_path / name)]) == 0
    assert "4 network calls" in capsys.readouterr().out
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert json.loads(Image.open(tmp_path / "a.png").info["tdm"]) == {"prompt": PROMPT, "seed": 5, "steps": 4}
    assert main(["generate", PROMPT, "--seed", "6", "--out", str(tmp_path / "c.png")]) == 0
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "a.png").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.png", "c.png"]


def test_unknown_words_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "a red Cat at sea", "--out", str(tmp_path / "a.png")]) == 0
    assert "does not know 'cat'" in capsys.readouterr().out


def test_compare_writes_one_sheet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--compare", PROMPT, "a green ring at sea", "--out", str(tmp_path / "s.png")]) == 0
    printed = capsys.readouterr().out
    assert "100 network calls" in printed
    assert "speed-up" in printed
    width, height = Image.open(tmp_path / "s.png").size
    assert width > 2 * 160
    assert height > 2 * 160


def test_the_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--list"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert "one GPU with 12 GB" in lines["12gb"]
    assert "Stable Diffusion XL" in lines["sdxl"]


def test_distil_then_generate_with_the_new_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    short = ["updates=2", "batch_size=4", "output.preview_every=0", "output.evaluate_every=0", "critic.head_start=0"]
    assert main(["distill", *short, "--out", str(run)]) == 0
    student = run / "student.safetensors"
    assert (run / "curves.png").exists()
    assert all(torch.isfinite(t).all() for t in load_file(student).values())
    assert main(["info", str(student)]) == 0
    assert "2 updates of 4 prompts" in capsys.readouterr().out
    assert main(["generate", PROMPT, "--student", str(student), "--out", str(tmp_path / "a.png")]) == 0
    assert "already holds a run" in refused(["distill", *short, "--out", str(run)], capsys)
