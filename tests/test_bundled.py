"""The bundled model: small, complete, usable with stock diffusers alone, and as good as docs/measurements.md says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtAlphaPipeline
from tdm import TDMPipeline
from tdm.pipelines.bases import bundled_path
from tdm.training.eval_report import table
from tdm.training.evaluate import Plan, Prompts, draw, evaluate, held_out_prompts
from tdm.training.metrics.colours import COLOURS
from tdm.training.worlds.stickers.verify import verify


@pytest.fixture(scope="module")
def pipe() -> TDMPipeline:
    pipe = TDMPipeline.from_pretrained()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def accuracy(pipe: TDMPipeline, name: str, count: int) -> float:
    prompts, wanted = held_out_prompts(count)
    (variant,) = (v for v in Plan(student_steps=[4]).variants(pipe.teacher_call) if v.name == name)
    pictures = draw(pipe, variant, prompts, list(range(count)))
    return sum(v.correct for v in verify(pictures, wanted)) / count


def test_weights_are_small() -> None:
    assert sum(f.stat().st_size for f in bundled_path().rglob("*") if f.is_file()) <= 25e6


def test_base_is_a_stock_pipeline() -> None:
    base = DiffusionPipeline.from_pretrained(bundled_path() / "teacher")
    assert type(base) is PixArtAlphaPipeline
    base.set_progress_bar_config(disable=True)
    image = base("a red ball at sea", num_inference_steps=2, height=64, width=64, use_resolution_binning=False).images[
        0
    ]
    assert image.size == (64, 64)


def test_student_at_four_calls_draws_what_it_is_asked(pipe: TDMPipeline) -> None:
    assert accuracy(pipe, "student, 4 steps", 64) >= 0.85


def test_undistilled_network_at_four_calls_is_worse(pipe: TDMPipeline) -> None:
    assert accuracy(pipe, "teacher, 4 steps", 192) <= accuracy(pipe, "student, 4 steps", 192) - 0.15


def test_a_seed_is_one_picture_alone_or_in_a_batch(pipe: TDMPipeline) -> None:
    def one(prompts: list[str], seeds: list[int]) -> torch.Tensor:
        generator = [torch.Generator().manual_seed(s) for s in seeds]
        return pipe(prompts, generator=generator, output_type="pt").images

    batch = one(["a red ball at sea", "two blue stars in the snow"], [1, 2])
    torch.testing.assert_close(one(["two blue stars in the snow"], [2])[0], batch[1], atol=1e-4, rtol=0)
    assert torch.equal(batch, one(["a red ball at sea", "two blue stars in the snow"], [1, 2]))


@pytest.mark.slow
def test_the_table_of_the_measurements(pipe: TDMPipeline, tmp_path: Path) -> None:
    rows, sheet = evaluate(pipe, Prompts(*held_out_prompts(256)))
    sheet.save(tmp_path / "grid.png")
    print(table(rows))
    four_steps = next(r for r in rows if r.name == "student, 4 steps")
    teacher, undistilled, four = (
        {name: measure.value for name, measure in row.measures.values.items()} for row in (*rows[:2], four_steps)
    )
    assert teacher["accuracy"] >= 0.95
    assert undistilled["accuracy"] <= teacher["accuracy"] - 0.2
    assert undistilled["distance"] >= 3 * four["distance"]
    assert four["accuracy"] >= teacher["accuracy"] - 0.02
    assert four["diversity"] >= 0.8
    assert all(abs(four[name] - 1) <= 0.05 for name in COLOURS)
