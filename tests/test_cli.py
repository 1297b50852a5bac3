"""The command line: what it makes, and one clear line and exit code 2 for every wrong input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tdm import TDMPipeline
from tdm.cli import main
from tdm.tests.commands import refused
from tdm.training.settings import load_config

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
    ("arguments", "message"),
    [
        (["generate", PROMPT, "--step", "4"], "did you mean --steps?"),
        (["generate"], "PROMPT"),
        (["generat", PROMPT], "there is no command generat; did you mean generate?"),
        (["nonsense"], "there are app, generate, distill"),
        (["distill", "--updates", "3"], "settings are key=value, without dashes: updates=..."),
        (["generate", PROMPT, "--steps", "0"], "at least 1"),
        (["generate", PROMPT, "--steps", "many"], "invalid int value: 'many'"),
        (["generate", PROMPT, "--seed", "-1"], "0 or more"),
        (["generate", PROMPT, "--solver-order", "3"], "invalid choice: 3"),
        (["generate", PROMPT, "--base-first", "--steps", "1"], "--steps 2 or more"),
        (["generate", PROMPT, "--strength", "0"], "--strength 0 is not above 0 and at most 2"),
        (["generate", PROMPT, "--strength", "70"], "--strength 70 is not above 0"),
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
        (["eval", "--strength", "0.5", "nan"], "--strength nan is not above 0"),
        (["eval", "--strength", "0.5", "0.50"], "a --strength is given twice"),
        (["distill", "{tmp}/missing.yaml"], "missing.yaml"),
        (["distill", "{tmp}/a.yaml"], "did you mean updates?"),
        (["distill", "sdlx", "24gb"], "did you mean sdxl?"),
        (["distill", "student.lrr=1"], "did you mean lr?"),
        (["distill", "student.lr=-1"], "student.lr must be positive"),
        (["distill", "--device", "gpu", "--out", "{tmp}/run"], "must be cpu, cuda or cuda:1 and so on, not gpu"),
        (["distill", "--device", "cuda:99", "--out", "{tmp}/run"], "leave it out for the best there is"),
        (["distill", "task.name=mixture", "memory.base=int8", "--out", "{tmp}/run"], "the mixture is computed in"),
        (["distill", "task.model={tmp}/nowhere", "--out", "{tmp}/run"], "nowhere"),
        (["distill", "task.prompts={tmp}/nothing.txt", "--out", "{tmp}/run"], "nothing.txt"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], message: str, wrong_files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {p: p.read_bytes() for p in wrong_files.iterdir() if p.is_file()}
    assert message in refused([a.replace("{tmp}", str(wrong_files)) for a in arguments], capsys)
    assert {p: p.read_bytes() for p in wrong_files.iterdir() if p.is_file()} == before


def test_without_a_command_it_is_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("usage: tdm")
    assert "tdm distill" in printed.out
    assert printed.err == ""


def test_info_of_a_header_says_what_the_tensors_say(capsys: pytest.CaptureFixture[str]) -> None:
    """The header alone and a reading of all tensors give the same answer."""
    assert main(["info", "bundled"]) == 0
    short = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.replace("LoRA ", "").splitlines())
    assert main(["info", "bundled", "--base", "bundled"]) == 0
    printed = capsys.readouterr().out.replace("LoRA ", "")
    whole = dict(line.split(maxsplit=1) for line in printed.splitlines())
    assert short["layers"].startswith("66 of the transformer")
    assert "all of its layers, 66 modules of bundled" in whole["matched"]
    for name in ("rank", "alpha", "scale", "weights", "recipe", "family", "4"):
        assert short[name] == whole[name]


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


def test_generate_has_the_options_of_the_sampler(tmp_path: Path) -> None:
    pipe = TDMPipeline.from_pretrained(recipe={"solver_order": 2})
    pipe.set_progress_bar_config(disable=True)

    def drawn(seed: int) -> bytes:
        return pipe(PROMPT, generator=torch.Generator().manual_seed(seed)).images[0].tobytes()

    expected = [drawn(0)]
    pipe.load_student("bundled")
    with pipe.base_first():
        expected.append(drawn(0))
    pipe.set_adapters("student", 0.5)
    expected.append(drawn(0))
    pipe.set_adapters("student", 1.0)
    expected.append(drawn(0))
    assert len(set(expected)) == 4
    for options, settings, picture in zip(
        (["--solver-order", "2"], ["--base-first"], ["--strength", "0.5"], []),
        ({"solver_order": 2}, {"base_first": True}, {"strength": 0.5}, {}),
        expected,
        strict=True,
    ):
        out = tmp_path / f"{len(options)}.png"
        assert main(["generate", PROMPT, *options, "--force", "--out", str(out)]) == 0
        image = Image.open(out)
        assert image.tobytes() == picture
        assert json.loads(image.info["tdm"]) == {"prompt": PROMPT, "seed": 0, "steps": 4, **settings}


@pytest.mark.parametrize("arguments", [["generate", PROMPT, "--out", "a.png"], ["distill", "--dry-run"]])
def test_nothing_is_said_but_what_was_asked(arguments: list[str], tmp_path: Path) -> None:
    """The optional quantisation libraries, both installed here, print remarks when they are imported."""
    done = subprocess.run([sys.executable, "-m", "tdm.cli", *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_reader_who_has_seen_enough_ends_it_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)  # as `| head` does
    command = [sys.executable, "-m", "tdm.cli", "distill", "--list"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


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


def test_a_dry_run_prints_settings_that_load_again_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    arguments = ["bundled", "24gb", f"task.prompts={tmp_path}/prompts.txt", "trajectory.timesteps=[900, 600, 300, 100]"]
    assert main(["distill", *arguments, "--dry-run", "--out", str(tmp_path / "run")]) == 0
    merged_settings, _, estimate = capsys.readouterr().out.partition("\n\n")
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.txt"]
    (tmp_path / "again.yaml").write_text(merged_settings)
    assert load_config(tmp_path / "again.yaml") == load_config(arguments[:2], arguments[2:])
    assert "rtx4090" in estimate


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task.model={tmp}/nowhere"], "nowhere"),
        (["task.prompts={tmp}/nothing.txt"], "nothing.txt"),
        (["task.height=63"], "multiples of"),
        (["trajectory.timesteps=[2000, 700, 500, 300]"], "2000"),
        (["start_from={tmp}/none.pt"], "none.pt"),
        (["--resume"], "no run to resume"),
        (["--out", "{tmp}/file/run"], "choose another --out"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    substituted = [a.replace("{tmp}", str(tmp_path)) for a in arguments]
    out = [] if "--out" in substituted else ["--out", str(tmp_path / "run")]
    assert message in refused(["distill", "--dry-run", *substituted, *out], capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_estimate_says_what_fits_and_what_to_lower(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "batch_size=512", "--gpu", "rtx4090", "--batch"]) == 0
    printed = capsys.readouterr().out
    assert "6.5 forwards, 2 backwards" in printed
    assert "largest micro_batch_size that fits rtx4090: 512" in printed
    assert main(["estimate", "--json"]) == 0
    estimate = json.loads(capsys.readouterr().out)
    assert estimate["total"] == pytest.approx(sum(estimate["memory"].values()))
    assert "did you mean rtx4090?" in refused(["estimate", "--gpu", "rtx409"], capsys)
    assert "needs a --gpu" in refused(["estimate", "--batch"], capsys)


def test_estimate_of_a_base_that_is_not_here_says_whose_shapes_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "pixart", "12gb"]) == 0
    printed = capsys.readouterr().out
    assert "\nshapes       published configs of PixArt-alpha/PixArt-XL-2-1024-MS, shipped with tdm\n" in printed
    assert "encoding      9.47" in printed
    assert main(["estimate", "bundled"]) == 0
    assert "\nshapes       configs of bundled\n" in capsys.readouterr().out
    assert "cannot read the base 'nobody/nothing'" in refused(["estimate", "sdxl", "task.model=nobody/nothing"], capsys)


def test_estimate_for_a_cpu_is_of_main_memory(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "bundled", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "fp32" in printed
    assert "Python and its libraries" in printed
    assert "rtx" not in printed
    assert "--gpu and --gpus are for GPUs" in refused(["estimate", "--device", "cpu", "--gpu", "h100"], capsys)


def test_distil_then_generate_with_the_new_student(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    short = ["updates=2", "batch_size=4", "output.preview_every=0", "output.evaluate_every=0", "critic.head_start=0"]
    short += ["task.prompt_count=8", f"task.cache={tmp_path / 'prompts'}"]
    assert main(["distill", *short, "--out", str(run)]) == 0
    student = run / "student.safetensors"
    assert (run / "curves.png").exists()
    assert all(torch.isfinite(t).all() for t in load_file(student).values())
    assert main(["info", str(student)]) == 0
    assert "2 updates of 4 prompts" in capsys.readouterr().out
    assert main(["generate", PROMPT, "--student", str(student), "--out", str(tmp_path / "a.png")]) == 0
    assert "already holds a run" in refused(["distill", *short, "--out", str(run)], capsys)


def test_a_student_that_can_be_no_file_is_told_of_before_it_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["updates=1", "batch_size=2", "output.preview_every=0", "output.evaluate_every=0", "critic.per_student=1"]
    short += ["task.prompt_count=8", f"task.cache={tmp_path / 'prompts'}", "trajectory.unify=[1, 4]"]
    short += ["trajectory.tell_steps=embedding", "--out", str(tmp_path / "run")]
    assert main(["distill", "bundled", *short, "--dry-run"]) == 0
    assert "nothing to export at the end: this student is told" in capsys.readouterr().out
    assert main(["distill", "bundled", *short]) == 2
    stderr = capsys.readouterr().err
    assert "this student is told its step count" in stderr.partition("update 1/1")[0]
    assert "tdm: this student is told its step count" in stderr.partition("update 1/1")[2]


def test_a_student_with_fresh_noise_is_a_file_that_draws_a_seed_as_one_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ["updates=1", "batch_size=2", "output.preview_every=0", "output.evaluate_every=0", "critic.per_student=1"]
    short += ["task.prompt_count=8", f"task.cache={tmp_path / 'prompts'}", "--out", str(tmp_path / "run")]
    assert main(["distill", "bundled", "dmd2", *short]) == 0
    file, pictures = tmp_path / "run" / "student.safetensors", [tmp_path / f"{name}.png" for name in "abc"]
    for seed, picture in zip((1, 1, 2), pictures, strict=True):
        assert main(["generate", PROMPT, "--student", str(file), "--seed", str(seed), "--out", str(picture)]) == 0
    first, repeated, other = (Image.open(picture).tobytes() for picture in pictures)
    assert first == repeated != other
    assert main(["info", str(file)]) == 0
    assert "fresh at each step" in capsys.readouterr().out
