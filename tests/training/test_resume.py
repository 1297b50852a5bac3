"""What a run may go on with, and what it must not: damaged files, other settings, other content, another run."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tdm
import torch
from safetensors.torch import load_file, save_file
from tdm.cli import build_parser, main
from tdm.errors import TDMError
from tdm.tests.commands import refused
from tdm.tests.test_package import tracked
from tdm.training.card import write_card
from tdm.training.checkpoint import read_checkpoint
from tdm.training.curves import plot_curves
from tdm.training.export import export, read_run
from tdm.training.folder import held
from tdm.training.log import read_metrics
from tdm.training.loop import distill
from tdm.training.run import Run
from tdm.training.settings import load_config
from tdm.training.tasks import build_task
from tdm.training.tasks.mixture import MixtureTask
from tdm.training.tasks.pipeline import PipelineTask

MIXTURE = [
    "task.name=mixture",
    "task.width=16",
    "task.samples=100",
    "batch_size=8",
    "output.preview_every=0",
    "output.evaluate_every=1",
    "output.log_every=1",
]
Bases = Callable[[str], Path]


def train(out: Path, settings: list[str], *more: str, resume: bool = False, lines: list[str] | None = None) -> Run:
    config = load_config(None, [*settings, *more])
    report = (lambda _: None) if lines is None else lines.append
    return distill(build_task(config.task, config.memory, "cpu", report), config, out, resume=resume, report=report)


@pytest.fixture(scope="module")
def mixture_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    train(out, MIXTURE, "updates=2")
    return out


@pytest.fixture
def run_folder(mixture_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(mixture_run, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("tail", [None, b"", b"\0" * 8 + b"\n", b"\n\n", b'{"step": 2, "critic_lo', b"[1]\n7\nnull\n"])
def test_a_record_that_is_gone_or_torn_does_not_stop_a_resume(tail: bytes | None, run_folder: Path) -> None:
    log, lines = run_folder / "metrics.jsonl", []
    before = read_metrics(log)
    if tail is None:
        log.unlink()
    else:
        log.write_bytes(log.read_bytes() + tail)
    assert train(run_folder, MIXTURE, "updates=3", resume=True, lines=lines).step == 3
    after = read_metrics(log)
    # A record that is gone begins with the evaluation of the checkpoint's own update.
    assert [line["step"] for line in after] == [*([2] if tail is None else [line["step"] for line in before]), 3, 3]
    assert any("record begins at update 2" in line for line in lines) == (tail is None)
    assert plot_curves(run_folder) is not None


@pytest.mark.parametrize("content", [b"", b"\0" * 3000, b"PK\x03\x04 cut"])
def test_a_best_student_that_cannot_be_read_does_not_stop_a_resume(content: bytes, run_folder: Path) -> None:
    (run_folder / "best.pt").write_bytes(content)
    lines: list[str] = []
    train(run_folder, MIXTURE, "updates=3", resume=True, lines=lines)
    assert any("among the evaluations from here on" in line for line in lines)
    assert read_checkpoint(run_folder / "best.pt")["step"] == 3


@pytest.mark.parametrize("content", [b"", b"\0" * 3000, b"not a checkpoint\n", b"PK\x03\x04", None])
def test_a_checkpoint_that_is_damaged_is_one_line(content: bytes | None, run_folder: Path) -> None:
    file = run_folder / "checkpoint.pt"
    whole = file.read_bytes()
    if content is None:  # one bit among the tensors, which torch itself does not see
        weight = read_checkpoint(file)["adapters"]["student"]
        raw = max(weight.values(), key=torch.Tensor.numel).numpy().tobytes()
        content = bytearray(whole)
        content[whole.index(raw[:64]) + 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(TDMError, match="is not a readable checkpoint"):
        train(run_folder, MIXTURE, "updates=3", resume=True)


def test_a_folder_with_the_name_of_a_checkpoint_is_left_alone(run_folder: Path) -> None:
    (run_folder / "checkpoint-000001.pt").mkdir()
    train(run_folder, MIXTURE, "updates=5", "output.keep=2", "output.checkpoint_every=1", resume=True)
    assert sorted(p.name for p in run_folder.glob("checkpoint*")) == [
        "checkpoint-000001.pt",
        "checkpoint-000004.pt",
        "checkpoint.pt",
    ]


def test_previews_of_an_earlier_run_are_not_those_of_this_one(tmp_path: Path) -> None:
    (tmp_path / "previews").mkdir()
    for name in ("000001.png", "000009.png", "mine.png"):
        (tmp_path / "previews" / name).write_bytes(b"")
    train(tmp_path, MIXTURE, "updates=2")
    assert [p.name for p in (tmp_path / "previews").iterdir()] == ["mine.png"]


# ---------------------------------------------------------------------- settings and content


@pytest.mark.parametrize(
    "change",
    [
        "micro_batch_size=1",
        "memory.gradient_checkpointing=true",
        "memory.base=fp32",
        "task.cache={tmp}/elsewhere",
        "task.evaluate=8",
        "task.prompts={tmp}/moved.txt",
        "task.model={tmp}/moved",
    ],
)
def test_what_does_not_change_what_is_learned_may_change(
    change: str, runs: Callable[[str], Run], settings: Callable[[str], list[str]], bases: Bases, tmp_path: Path
) -> None:
    options = settings("sd15")
    prompts = next(s for s in options if s.startswith("task.prompts=")).partition("=")[2]
    shutil.copy(prompts, tmp_path / "moved.txt")
    shutil.copytree(bases("sd15"), tmp_path / "moved")
    shutil.copytree(runs("sd15").out_dir, tmp_path / "run")
    run = train(tmp_path / "run", options, "updates=3", change.format(tmp=tmp_path), resume=True)
    assert run.step == 3


@pytest.mark.parametrize("what", ["the prompts", "the base"])
def test_other_content_under_the_same_name_is_refused(
    what: str, settings: Callable[[str], list[str]], bases: Bases, tmp_path: Path
) -> None:
    base, prompts = tmp_path / "base", tmp_path / "p.txt"
    shutil.copytree(bases("sd15"), base)
    prompts.write_text("a cat\na dog\n")
    options = [*settings("sd15"), f"task.model={base}", f"task.prompts={prompts}", "output.preview_every=0"]
    train(tmp_path / "run", options)
    if what == "the prompts":
        prompts.write_text("something else\n")
    else:
        (file,) = (base / "unet").glob("*.safetensors")
        save_file({key: weight + 0.3 for key, weight in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(TDMError, match=f"other content of: {what}; put back"):
        train(tmp_path / "run", options, "updates=4", resume=True)


def test_other_settings_are_refused(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TDMError, match="batch_size: 8 there, 4 here"):
        train(run_folder, MIXTURE, "batch_size=4", resume=True)
    argv = ["distill", *MIXTURE, "batch_size=4", "--resume", "--out", str(run_folder), "--device", "cpu"]
    assert "batch_size: 8 there, 4 here" in refused(["distill", "mixture", *argv[1:]], capsys)


@pytest.mark.parametrize("alpha", [None, 1.0, 16.0])
def test_an_earlier_student_begins_as_it_was_whatever_alpha_is(
    alpha: float | None, runs: Callable[[str], Run], settings: Callable[[str], list[str]], tmp_path: Path
) -> None:
    first = runs("sd15")  # alpha 3, rank 2
    still = ["student.lr=1e-12", "critic.lr=1e-12", "updates=1", "output.preview_every=0"]
    start = f"start_from={first.out_dir / 'checkpoint.pt'}"
    run = train(tmp_path, settings("sd15"), *still, start, f"student.alpha={json.dumps(alpha)}", "critic.alpha=7")
    for role, before in (("student", 3 / 2), ("critic", 1.0)):
        saved = read_checkpoint(first.out_dir / "checkpoint.pt")
        old = saved["ema"]["weights"] if role == "student" else saved["adapters"]["critic"]
        scale = 7 / run.config.critic.rank if role == "critic" else (alpha / 2 if alpha else 1.0)
        new = run.ema.weights if role == "student" else run.roles.state("critic")
        moved = [key for key in old if "lora_B" in key and old[key].any()]
        assert moved
        for key in moved:
            torch.testing.assert_close(new[key] * scale, old[key] * before, rtol=1e-4, atol=1e-7)


# ---------------------------------------------------------------------- runs that fail


@pytest.mark.parametrize("step", ["preview", "evaluate"])
def test_a_preview_or_evaluation_that_fails_loses_no_update_and_is_made_on_resume(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    every = [f"output.{name}_every={3 * (name == step)}" for name in ("preview", "evaluate")]
    settings = [*MIXTURE, "updates=6", "output.checkpoint_every=3", *every]
    with monkeypatch.context() as patch:
        patch.setattr(MixtureTask, step, fail)
        with pytest.raises(torch.OutOfMemoryError):
            train(tmp_path / "run", settings)
    assert read_checkpoint(tmp_path / "run/checkpoint.pt")["step"] == 3
    train(tmp_path / "run", settings, resume=True)
    train(tmp_path / "whole", settings)
    record, whole = (
        [{k: v for k, v in line.items() if k != "seconds_per_update"} for line in read_metrics(out / "metrics.jsonl")]
        for out in (tmp_path / "run", tmp_path / "whole")
    )
    assert record == whole
    assert [line["step"] for line in record if any(f"{kind}/" in name for kind in ("eval", "health") for name in line)]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_is_one_line_of_advice(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("tdm.training.loop.distill", fail)
    assert main(["distill", "mixture", *MIXTURE, "--device", "cpu", "--out", str(tmp_path)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("tdm: out of memory: lower micro_batch_size")
    assert "--resume" in line


@pytest.mark.parametrize("kind", ["overflow", "nan"])
def test_a_base_that_gives_nan_is_named(
    kind: str, settings: Callable[[str], list[str]], bases: Bases, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(bases("sd15"), base)
    (file,) = (base / "unet").glob("*.safetensors")
    weights = load_file(file)
    if kind == "nan":
        weights["conv_in.weight"][0] = float("nan")
    else:
        weights["conv_in.weight"] *= 3e5
    save_file(weights, file, {"format": "pt"})
    storage = "fp16" if kind == "overflow" else "fp32"
    options = [*settings("sd15"), f"task.model={base}", "output.preview_every=0", f"memory.base={storage}"]
    with pytest.raises(TDMError, match=f"base's own prediction is not finite. With memory.base={storage}") as refusal:
        train(tmp_path / "run", options)
    assert "checkpoint is kept" not in str(refusal.value)


def test_a_student_that_was_never_trained_is_not_exported(settings: Callable[[str], list[str]], tmp_path: Path) -> None:
    learned = train(tmp_path / "mixture", [*MIXTURE, "critic.head_start=10", "updates=4"])  # 10 of the critic, then 4
    assert any(bool(weight.any()) for name, weight in learned.roles.state("student").items() if "lora_B" in name)
    config = load_config(None, [*settings("sd15"), "critic.head_start=3", "updates=5", "output.preview_every=0"])
    task = build_task(config.task, config.memory, "cpu", lambda _: None)
    distill(task, config, tmp_path / "run", report=lambda _: None, stop=lambda: True)
    run = read_run(tmp_path / "run")
    assert run is not None
    with pytest.raises(TDMError, match=r"every lora_B is 0 .*head_start is 3"):
        export(run, "student", tmp_path / "student.safetensors")
    assert not (tmp_path / "student.safetensors").exists()


# ---------------------------------------------------------------------- the folder


def test_one_folder_is_for_one_run_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["distill", "mixture", *MIXTURE, "updates=1", "--device", "cpu", "--out", str(tmp_path)]
    with held(tmp_path):
        assert "another run is already training in" in refused(argv, capsys)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert main(argv) == 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "already holds a run"),
        (["seed=9", "--resume"], "seed: 0 there, 9 here"),
        (["start_from=none.pt", "--resume"], "start_from: no file"),
        (["micro_batch_size=3", "--resume"], "micro_batch_size"),
    ],
)
def test_nothing_is_encoded_for_a_run_that_is_refused(
    arguments: list[str],
    reason: str,
    runs: Callable[[str], Run],
    settings: Callable[[str], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def build(*_: Any, **__: Any) -> PipelineTask:
        raise AssertionError("the base was read")

    monkeypatch.setattr("tdm.training.tasks.build_task", build)
    argv = ["distill", "bundled", *settings("sd15"), *arguments, "--out", str(runs("sd15").out_dir), "--device", "cpu"]
    assert reason in refused(argv, capsys)


@pytest.mark.parametrize(
    "name", ["[best] p.txt", "@list.txt", "p #1.txt", "123", "on", "%HOME%.txt", "*.txt", "{a}.txt"]
)
def test_names_of_files_are_taken_as_they_are_written(name: str) -> None:
    config = load_config(None, [f"task.prompts={name}", f"start_from={name}", "task.name=pipeline"])
    assert config.task["prompts"] == config.start_from == name


def test_other_values_are_yaml_or_one_line() -> None:
    assert load_config(None, ["start_from=null"]).start_from is None
    assert load_config(None, ["start_from=~/a.pt"]).start_from == str(Path("~/a.pt").expanduser())
    assert load_config(None, ['start_from="a b.pt"']).start_from == "a b.pt"
    for text in ("task.loras=[a.safetensors", "seed=@1", "trajectory.timesteps=[900, 600"):
        with pytest.raises(TDMError, match="cannot read the value as YAML"):
            load_config(None, [text])
    for seed in (-1, 99999999999999999999999):
        with pytest.raises(TDMError, match="seed must be 0 or more"):
            load_config(None, [f"seed={seed}"])


def test_a_card_can_be_written_again_after_a_full_disk(runs: Callable[[str], Run], tmp_path: Path) -> None:
    """With --force a curves.png that was cut off is replaced."""
    shutil.copytree(runs("sd15").out_dir, tmp_path / "run")
    plot_curves(tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run is not None
    (tmp_path / "out").mkdir()
    (tmp_path / "out/curves.png").write_bytes(b"")
    write_card(run, tmp_path / "out/student.safetensors", "student", force=True)
    assert (tmp_path / "out/curves.png").read_bytes() == (tmp_path / "run/curves.png").read_bytes()


def test_settings_may_stand_behind_options() -> None:
    parser = build_parser()
    for argv, settings in (
        (["distill", "mixture", "--out", "runs/x", "updates=3"], ["mixture", "updates=3"]),
        (["distill", "--resume", "mixture", "--out", "runs/x", "updates=4"], ["mixture", "updates=4"]),
        (["estimate", "sdxl", "--gpu", "rtx3060", "12gb"], ["sdxl", "12gb"]),
    ):
        assert parser.parse_args(argv).settings == settings
    drawn = parser.parse_args(["generate", "a cat", "--seed", "3", "a dog", "--", "-a bird"])
    assert (drawn.prompts, drawn.seed) == (["a cat", "a dog", "-a bird"], 3)
    with pytest.raises(TDMError, match="did you mean --steps"):
        parser.parse_args(["generate", "a cat", "--stpes", "4"])
    with pytest.raises(TDMError, match="required: PROMPT"):
        parser.parse_args(["generate", "--seed", "3"])


def test_every_text_file_says_its_encoding() -> None:
    """Where UTF-8 is not the default, a name in another alphabet would end a run."""
    for name in tracked():
        if not name.endswith(".py") or name.startswith("tests/"):
            continue
        tree = ast.parse((Path(tdm.__file__).parent / name).read_text(encoding="utf-8"))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "write_text"):
                assert any(keyword.arg == "encoding" for keyword in call.keywords), f"{name}:{call.lineno}"
